"""fp16: gradients from 1e-13 to 1e9 keep their digits, whatever the gradients of other tokens."""

import pytest
import torch

import grpo_kernels
from grpo_kernels import HeadAdapter, LossConfig, linear_token_stats
from reference import losses
from tests.helpers.linear import doubled, make_linear_case, relative_error, without_reference
from tests.helpers.tensors import normal

B, T, V, H, R = 2, 5, 37, 16, 3
LEAVES = ("hidden", "weight", "bias", "a", "b")
# Gradients of neighbouring tokens differ by up to 1e6, in both directions along the chunks.
VARIED = 10.0 ** torch.tensor([[0.0, -2, 0, -4, -6], [-6, -3, -5, -1, 0]], dtype=torch.float64)
# Upstream gradients of the tokens.
UPSTREAM = {
    "tiny": torch.full((B, T), 1e-7),
    "loss scale": torch.full((B, T), 65536.0),
    "large": torch.full((B, T), 1e9),
    "varied": VARIED,
    "varied and tiny": VARIED * 1e-7,
}


def make_case(seed=0, **stretch):
    """Values that fp16 and bf16 both represent exactly; stretch: factors of tensors, by name."""
    case = make_linear_case(seed, B, T, V=V, H=H, ref_H=H)
    case["a"] = normal(seed + 7, R, H, std=H**-0.5)
    case["b"] = normal(seed + 8, V, R, std=1e-5)  # as after the first steps of training
    for name in case.keys() - {"tokens", "b"}:
        case[name] = (case[name] * stretch.get(name, 1.0)).bfloat16().half().float()
    return case


def gradients(package, case, value, dtype=None, trained=LEAVES, **keywords):
    """Gradients by leaf; with a dtype the products are of that dtype."""
    case = dict(case)
    leaves = [case[name].detach().clone().requires_grad_() for name in trained]
    case |= dict(zip(trained, leaves, strict=True))
    inputs = [case.pop(name) for name in ("hidden", "weight", "tokens")]
    case["adapter"] = HeadAdapter(case.pop("a"), case.pop("b"), 2.0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        total = value(package, *inputs, **case, **keywords)
    return dict(zip(trained, torch.autograd.grad(total, leaves), strict=True))


def assert_better_than_bf16(case, value, trained=LEAVES, **keywords):
    exact = gradients(
        losses, {name: doubled(x) for name, x in case.items()}, value, trained=trained
    )
    fp16 = gradients(grpo_kernels, case, value, torch.float16, trained, **keywords)
    bf16 = gradients(grpo_kernels, case, value, torch.bfloat16, trained, **keywords)
    for name, expected in exact.items():
        # Each hidden state on its own: a large gradient must not hide the error of a small one.
        dims = (0, 1) if name == "hidden" else ()
        results = (
            x.flatten(*dims) if dims else x[None] for x in (fp16[name], bf16[name], expected)
        )
        errors = [
            (relative_error(x, like), relative_error(y, like))
            for x, y, like in zip(*results, strict=True)
        ]
        ours, theirs = torch.tensor(errors).mean(0)
        assert ours <= min(theirs, 1e-3), name


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("trained", [LEAVES, ("hidden",)], ids=["all", "hidden"])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_statistics_under_any_upstream_gradient(
    pytorch_backend, upstream, kl, trained, chunk_tokens
):
    signs = normal(9, 3, B, T, dtype=torch.float64)

    def value(package, *inputs, **keywords):
        stats = package.linear_token_stats(*inputs, kl=kl, **keywords)
        weights = [sign * UPSTREAM[upstream] for sign in signs]
        return sum((x.double() * g).sum() for x, g in zip(stats[:3], weights, strict=True))

    assert_better_than_bf16(make_case(), value, trained, chunk_tokens=chunk_tokens)


CONFIGS = {
    "token": LossConfig(entropy_coef=0.05),
    "token, kl": LossConfig(beta=0.1, kl_estimator="reverse"),
    "sequence": LossConfig.gspo(aggregation="token_mean"),
}


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("normalizer", [1.0, 1e9])
@pytest.mark.parametrize("config", CONFIGS)
def test_losses(pytorch_backend, config, normalizer, scale, chunk_tokens):
    config, advantages = CONFIGS[config], VARIED * normal(1, B, T, dtype=torch.float64).sign()
    unread = () if config.beta else ("ref_hidden", "ref_weight", "ref_bias")
    case = {name: x for name, x in make_case().items() if name not in unread}
    if config.ratio_level == "sequence":
        advantages = advantages[:, 0]

    def value(package, hidden, *inputs, **keywords):
        return scale * package.linear_grpo_loss(
            hidden, *inputs, advantages.to(hidden.dtype), config=config, normalizer=normalizer,
            entropy_normalizer=normalizer, **keywords,
        ).loss  # fmt: skip

    assert_better_than_bf16(case, value, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize(("kl", "peaked"), [("forward", "weight"), ("reverse", "ref_weight")])
def test_kl_of_50_nats(backend, kl, peaked):
    case = make_case(**{peaked: 16.0})

    def value(package, *inputs, **keywords):
        stats = package.linear_token_stats(*inputs, kl=kl, **keywords)
        assert stats.kl.mean() > 40
        return (stats.kl.double() * VARIED).sum()

    assert_better_than_bf16(case, value, chunk_tokens=3)


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_adapter_beyond_the_range_of_fp16(pytorch_backend, chunk_tokens):
    """Each row of a has its own size, and the columns of b the inverse."""
    case = without_reference(make_case())
    size = torch.tensor([1e-9, 1e9, 0.0])
    case["a"], case["b"] = case["a"] * size[:, None], case["b"] * 1e-2 / size.clamp(min=1e-9)

    def value(package, *inputs, **keywords):
        return (package.linear_token_stats(*inputs, **keywords).logprob.double() * VARIED).sum()

    assert_better_than_bf16(case, value, chunk_tokens=chunk_tokens)


def test_special_values_stay_in_their_row(backend):
    case = {name: x for name, x in make_case().items() if not name.startswith("ref_")}
    case["hidden"][0, 1] = torch.nan

    def value(package, *inputs, **keywords):
        stats = package.linear_token_stats(*inputs, **keywords)
        return (stats.logprob * torch.tensor([[1.0, 1, 0, 1, 1], [1, torch.inf, 1, 1, 1]])).sum()

    found = gradients(grpo_kernels, case, value, torch.float16, chunk_tokens=3)
    is_finite = found["hidden"].isfinite().all(-1)
    assert is_finite.tolist() == [[True, False, True, True, True], [True, False, True, True, True]]
    assert (found["hidden"][0, 2] == 0).all()
    assert not found["weight"].isfinite().all()  # a GradScaler skips this step


def test_zero_upstream_gradient(backend):
    case = make_case()
    inputs = [case[name].half() for name in ("hidden", "weight")]
    hidden, weight = (x.requires_grad_() for x in inputs)
    entropy = linear_token_stats(hidden, weight, case["tokens"], chunk_tokens=3).entropy
    gradient = torch.autograd.grad(entropy, (hidden, weight), torch.zeros(B, T))
    assert not any(x.any() for x in gradient)
