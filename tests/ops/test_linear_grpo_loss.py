"""linear_grpo_loss against the reference implementation: value, gradients and metrics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels
from grpo_kernels import (
    LossConfig,
    distillation_loss,
    grpo_loss,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_token_stats,
    pack_tokens,
)
from grpo_kernels.ops import linear_grpo_loss as operators
from grpo_kernels.ops import linear_token_stats as statistics_operators
from reference import losses
from tests.helpers.grpo_loss import CONFIGS
from tests.helpers.linear import make_linear_case, relative_error
from tests.helpers.loss_configs import loss_configs
from tests.helpers.tensors import assert_same_bits, coin, normal

B, T = 4, 3
ADVANTAGES = torch.tensor([1.2, -0.7, 0.0, 0.4], dtype=torch.float64)


def make_inputs(seed, *leading, dtype=torch.float64, advantages=ADVANTAGES, device="cpu"):
    """Tensor arguments, advantages, and keywords that serve every config."""
    case = make_linear_case(seed, *leading, dtype=dtype, device=device)
    head = {name: case[name] for name in ("hidden", "weight", "tokens", "bias")}
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    logprob = linear_token_stats(**head, entropy=False).logprob
    mask = coin(seed + 20, *leading, p=0.8, device=device)
    weights = normal(seed + 23, *leading, device=device)
    keywords = {
        "mask": mask,
        "nll_weight": weights * (mask & coin(seed + 24, *leading, p=0.6, device=device)),
        "old_logprob": logprob + normal(seed + 21, *leading, dtype=acc, std=0.3, device=device),
        "sampling_logprob": logprob
        + normal(seed + 22, *leading, dtype=acc, std=0.3, device=device),
    }
    return case, advantages.to(device, acc), keywords


def run(module, case, advantages, scale=1.0, **keywords):
    """Return the loss, the metrics and the gradients of scale · loss by leaf."""
    case = dict(case)
    leaves = {
        name: case.pop(name).detach().clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
    }
    config = keywords.pop("config", LossConfig())
    loss, metrics = module.linear_grpo_loss(
        leaves["hidden"], leaves["weight"], case.pop("tokens"), advantages,
        bias=leaves["bias"], config=config, **case, **keywords,
    )  # fmt: skip
    (scale * loss).backward()
    return loss.detach(), metrics, {name: leaf.grad for name, leaf in leaves.items()}


def check_against_reference(case, advantages, **keywords):
    loss, metrics, gradients = run(grpo_kernels, case, advantages, 1.7, **keywords)
    keywords.pop("packing", None)  # changes no result; the reference has no such argument
    exact_loss, exact_metrics, exact = run(losses, case, advantages, 1.7, **keywords)
    tight = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(loss, exact_loss, **tight)
    torch.testing.assert_close(gradients, exact, **tight)
    assert metrics.keys() == exact_metrics.keys()
    for name, value in metrics.items():
        assert value.dim() == 0 and not value.requires_grad, name
        torch.testing.assert_close(value, exact_metrics[name], **tight)
    return loss, metrics, gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_gradients_and_metrics_match_reference(backend, device, name):
    case, advantages, keywords = make_inputs(11, B, T, device=device)
    _, metrics, gradients = check_against_reference(
        case, advantages, config=CONFIGS[name], temperature=0.8, chunk_tokens=4, **keywords
    )
    assert (gradients["hidden"][~keywords["mask"]] == 0).all()
    assert gradients["weight"].abs().sum() > 0
    assert {"kl", "entropy", "policy_loss", "num_tokens"} <= metrics.keys()


@given(
    seed=st.integers(0, 2**31),
    config=loss_configs(),
    per_token=st.booleans(),
    chunk_tokens=st.sampled_from([None, 3, 32]),
)
@settings(max_examples=8)
def test_any_config_and_chunk_size_matches_reference(
    backend, seed, config, per_token, chunk_tokens
):
    case, advantages, keywords = make_inputs(seed, B, T)
    if per_token:
        advantages = normal(seed + 6, B, T, dtype=torch.float64) * coin(seed + 7, B, T)
    check_against_reference(
        case, advantages, config=config, chunk_tokens=chunk_tokens, softcap=8.0, **keywords
    )


@pytest.mark.parametrize("name", ["grpo", "every term", "gspo", "beta, k3"])
def test_packed_input_matches_reference(backend, name):
    case, advantages, keywords = make_inputs(2, 7, advantages=ADVANTAGES)
    check_against_reference(
        case, advantages, config=CONFIGS[name], cu_seqlens=torch.tensor([0, 2, 3, 5, 7]), **keywords
    )


NLL = {
    "token": LossConfig(nll_coef=0.3, beta=0.2, entropy_coef=0.1),
    "sequence": LossConfig.gspo(nll_coef=0.3, entropy_coef=0.1),
    "forward": LossConfig(nll_coef=0.3, beta=0.2, kl_estimator="forward"),
}


@pytest.mark.parametrize("name", NLL)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_nll_outside_of_the_mask(backend, name, per_sequence):
    """Tokens with an nll_weight alone: masked ones, and those of advantage 0."""
    case, _, keywords = make_inputs(5, B, T)
    advantages = torch.tensor([0.0, 0.0, 1.3, 0.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 0.0, -2.0])
    if not per_sequence:
        weight = weight[:, None] * torch.tensor([0.0, 1.0, 0.5])
    keywords |= {"mask": torch.eye(B, T).flip(0) == 0, "nll_weight": weight}
    arguments = {"config": NLL[name], "chunk_tokens": 5, **keywords}
    _, metrics, gradients = check_against_reference(case, advantages, **arguments)
    spread = weight if not per_sequence else weight[:, None].expand(B, T)
    reached = (gradients["hidden"] != 0).any(-1)
    assert reached[spread != 0].all() and not reached[~keywords["mask"] & (spread == 0)].any()
    assert metrics["num_tokens"] == keywords["mask"].sum()
    if name == "token":
        packing = pack_tokens(
            keywords["mask"] | (spread != 0), (advantages[:, None] != 0) | (spread != 0)
        )
        check_against_reference(case, advantages, packing=packing, **arguments)


def test_per_token_advantages_and_ref_logprob(backend):
    case, _, keywords = make_inputs(5, B, T)
    case = {name: value for name, value in case.items() if not name.startswith("ref_")}
    advantages = normal(3, B, T, dtype=torch.float64)
    keywords["ref_logprob"] = -normal(8, B, T, dtype=torch.float64).abs()
    check_against_reference(case, advantages, config=LossConfig(beta=0.1), **keywords)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("skips_zero_gradients", [False, True])
def test_zero_advantage_tokens_in_active_sequence(
    backend, level, packed, skips_zero_gradients, monkeypatch
):
    """At sequence level such a token has a gradient through its sequence's ratio."""
    case, _, keywords = make_inputs(6, B, T)
    advantages = normal(3, B, T, dtype=torch.float64) * coin(4, B, T)
    advantages[1] = 0.0
    if packed:
        keywords["packing"] = pack_tokens(keywords["mask"], advantages)
    if not skips_zero_gradients:  # as on a GPU, where upstream gradients are not inspected
        monkeypatch.setattr(
            statistics_operators, "_tokens_with_grad",
            lambda token_idx, _: token_idx,
        )  # fmt: skip
    config = LossConfig(ratio_level=level)
    _, _, gradients = check_against_reference(case, advantages, config=config, **keywords)
    zero_advantage = (advantages == 0) & keywords["mask"]
    assert (gradients["hidden"][zero_advantage] == 0).all() == (level == "token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grpo", "every term", "beta, k3"])
def test_one_pass_and_two_pass_agree(backend, device, dtype, name, monkeypatch):
    """Three matmuls, or four through linear_token_stats and policy_loss."""
    case, advantages, keywords = make_inputs(7, B, T, dtype=dtype, device=device)
    keywords |= {"config": CONFIGS[name], "chunk_tokens": 4}
    loss, metrics, gradients = run(grpo_kernels, case, advantages, **keywords)
    monkeypatch.setattr(operators, "is_token_level", lambda *_, **__: False)
    other_loss, other_metrics, others = run(grpo_kernels, case, advantages, **keywords)
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(metrics, other_metrics, rtol=0, atol=0)
    for leaf, gradient in gradients.items():
        allowed = 4e-3 if dtype == torch.bfloat16 else 1e-6
        assert relative_error(gradient, others[leaf].double()) <= allowed, leaf


def test_zero_advantage_tokens_have_stats_and_zero_gradient(backend):
    case, advantages, keywords = make_inputs(3, B, T)
    _, metrics, gradients = run(grpo_kernels, case, advantages, **keywords)
    assert (gradients["hidden"][2] == 0).all() and gradients["hidden"][0].abs().sum() > 0
    assert metrics["num_tokens"] == keywords["mask"].sum()
    stats = linear_token_stats(
        case["hidden"], case["weight"], case["tokens"], bias=case["bias"], mask=keywords["mask"]
    )
    torch.testing.assert_close(
        metrics["entropy"], stats.entropy.sum() / keywords["mask"].sum(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_precomputed_packing_is_bitwise_equal(backend, level):
    case, advantages, keywords = make_inputs(4, B, T, dtype=torch.float32)
    keywords |= {"config": LossConfig(ratio_level=level), "chunk_tokens": 4}
    expected = run(grpo_kernels, case, advantages, **keywords)
    packing = pack_tokens(keywords["mask"], advantages)
    ours = run(grpo_kernels, case, advantages, packing=packing, **keywords)
    assert torch.equal(ours[0], expected[0])
    assert_same_bits(ours[1], expected[1])
    assert_same_bits(ours[2], expected[2])


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_micro_batches_add_up_to_batch(backend, aggregation, level):
    case, advantages, keywords = make_inputs(11, B, T)
    config = LossConfig(
        aggregation=aggregation, entropy_coef=0.1, beta=0.1, kl_estimator="reverse",
        ratio_level=level,
    )  # fmt: skip
    whole_loss, _, whole = run(grpo_kernels, case, advantages, config=config, **keywords)
    num_tokens = keywords["mask"].sum()
    total, weight = 0.0, 0.0
    for sequences in (slice(0, 1), slice(1, 4)):
        batch = {
            name: value[sequences] if name in ("hidden", "tokens", "ref_hidden") else value
            for name, value in case.items()
        }
        loss, _, gradients = run(
            grpo_kernels, batch, advantages[sequences], config=config,
            normalizer=num_tokens if aggregation == "token_mean" else B,
            entropy_normalizer=num_tokens,
            **{name: value[sequences] for name, value in keywords.items()},
        )  # fmt: skip
        total, weight = total + loss, weight + gradients["weight"]
        torch.testing.assert_close(gradients["hidden"], whole["hidden"][sequences])
    torch.testing.assert_close(total, whole_loss)
    torch.testing.assert_close(weight, whole["weight"])


def test_loss_without_gradient(backend):
    case, advantages, keywords = make_inputs(9, B, T, dtype=torch.float32)
    keywords["chunk_tokens"] = 4  # equal matmul shapes, so that the metrics are bitwise equal
    expected, metrics, _ = run(grpo_kernels, case, advantages, **keywords)
    with torch.no_grad():
        loss, others = linear_grpo_loss(
            case["hidden"].requires_grad_(), case["weight"], case["tokens"], advantages,
            bias=case["bias"], **keywords,
            **{name: value for name, value in case.items() if name.startswith("ref_")},
        )  # fmt: skip
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    assert_same_bits(others, metrics)


@pytest.mark.parametrize("name", ["grpo", "every term", "gspo"])
def test_all_tokens_masked(backend, name):
    case, advantages, keywords = make_inputs(11, B, T)
    keywords["mask"] = torch.zeros(B, T, dtype=torch.bool)
    case |= {"hidden": case["hidden"] * torch.nan, "tokens": case["tokens"] - 1000}
    loss, metrics, gradients = run(grpo_kernels, case, advantages, config=CONFIGS[name], **keywords)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())
    assert all((value == 0).all() for value in metrics.values())


def test_second_backward_gives_same_gradient(backend):
    case, advantages, keywords = make_inputs(6, B, T, dtype=torch.float32)
    weight = case["weight"].clone().requires_grad_()
    loss, _ = linear_grpo_loss(case["hidden"], weight, case["tokens"], advantages, **keywords)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, weight)
    torch.testing.assert_close(second, 3 * first)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_inputs_are_not_modified(backend, level):
    case, advantages, keywords = make_inputs(8, B, T, dtype=torch.float32)
    given = {**case, **keywords, "advantages": advantages}
    copies = {name: value.clone() for name, value in given.items()}
    run(grpo_kernels, case, advantages, config=LossConfig(ratio_level=level, beta=0.1), **keywords)
    assert_same_bits(given, copies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_distillation_without_advantages_is_the_distillation_loss(backend, divergence, dtype):
    """The teacher has another width."""
    hidden, weight, teacher_hidden, teacher_weight = (
        normal(seed, *shape, dtype=dtype)
        for seed, shape in ((1, (2, 3, 6)), (2, (37, 6)), (3, (2, 3, 5)), (4, (37, 5)))
    )
    teacher = {"ref_hidden": teacher_hidden, "ref_weight": teacher_weight}
    teacher_logits = teacher_hidden @ teacher_weight.T
    tokens, mask = torch.arange(6).view(2, 3), coin(5, 2, 3)
    config = LossConfig.distillation(kl_estimator=divergence)
    common = {"mask": mask, "temperature": 0.7}
    zeros = {"tokens": tokens, "advantages": torch.zeros(2, dtype=dtype), "config": config}
    losses_and_leaves = (
        (lambda h, w: linear_grpo_loss(h, w, **teacher, **zeros, **common), [hidden, weight]),
        (
            lambda h, w: linear_distillation_loss(
                h, w, teacher_hidden, teacher_weight, divergence=divergence, **common
            ),
            [hidden, weight],
        ),
        (
            lambda x: grpo_loss(x, ref_logits=teacher_logits, **zeros, **common),
            [hidden @ weight.T],
        ),
        (
            lambda x: distillation_loss(x, teacher_logits, divergence=divergence, **common),
            [hidden @ weight.T],
        ),
    )
    found = []
    for function, leaves in losses_and_leaves:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        loss, metrics = function(*leaves)
        kl = metrics.get("kl", metrics.get("divergence"))
        found.append([loss.detach(), kl, *torch.autograd.grad(loss, leaves)])
    assert found[0][0] > 0.1
    tight = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {}
    torch.testing.assert_close(found[0], found[1], **tight)
    torch.testing.assert_close(found[2], found[3], **tight)
    torch.testing.assert_close(found[0][0], found[2][0], **tight)
