"""A low-rank adapter on the head: values, gradients, FLOPs, and how it works with torch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import grpo_kernels
from grpo_kernels import HeadAdapter, LossConfig, linear_grpo_loss, linear_token_stats
from reference import losses
from tests.helpers.count_flops import count_flops
from tests.helpers.linear import (
    doubled,
    half_gradient_tolerance,
    make_linear_case,
    relative_error,
    without_reference,
)
from tests.helpers.tensors import coin, normal

B, T, V, H, R = 2, 5, 37, 16, 3
LEAVES = ("hidden", "weight", "bias", "a", "b")
UPSTREAM = normal(9, 2, B, T)
ADVANTAGES = torch.tensor([1.0, -2.0])
MODES = ("statistics", "token", "sequence")


def make_case(dtype=torch.float64, adapter_dtype=torch.float64, seed=0):
    case = without_reference(make_linear_case(seed, B, T, V=V, H=H, dtype=dtype))
    case["a"] = normal(seed + 7, R, H, dtype=adapter_dtype, std=H**-0.5)
    case["b"] = normal(seed + 8, V, R, dtype=adapter_dtype)
    return case


def value(package, case, mode, scale=0.7, **keywords):
    """A number made of all statistics, or the loss."""
    adapter = HeadAdapter(case["a"], case["b"], scale)
    inputs = [case[name] for name in ("hidden", "weight", "tokens")]
    keywords |= {"bias": case["bias"], "adapter": adapter, "temperature": 0.9, "softcap": 8.0}
    if mode == "statistics":
        stats = package.linear_token_stats(*inputs, **keywords)
        return (stats.logprob * UPSTREAM[0] + stats.entropy * UPSTREAM[1]).sum()
    config = LossConfig(ratio_level=mode, entropy_coef=0.05)
    advantages = ADVANTAGES.to(torch.promote_types(torch.float32, case["hidden"].dtype))
    return package.linear_grpo_loss(*inputs, advantages, config=config, **keywords).loss


def gradients(package, case, mode, frozen=(), **keywords):
    """The value, and the gradients of the trained leaves, by name."""
    case, trained = dict(case), [name for name in LEAVES if name not in frozen]
    for name in trained:
        case[name] = case[name].detach().clone().requires_grad_()
    total = value(package, case, mode, **keywords)
    found = torch.autograd.grad(total, [case[name] for name in trained])
    return {"value": total.detach(), **dict(zip(trained, found, strict=True))}


def exact_gradients(case, mode, **keywords):
    case = {name: doubled(x) for name, x in case.items()}
    return gradients(losses, case, mode, **keywords)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize(
    "frozen", [(), ("weight", "bias"), ("weight", "a"), ("hidden", "b")], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_match_autograd_in_fp64(backend, mode, frozen, chunk_tokens):
    case, mask = make_case(), coin(1, B, T)
    keywords = {"mask": mask, "frozen": frozen}
    exact = exact_gradients(case, mode, **keywords)
    case["hidden"] = torch.where(mask[..., None], case["hidden"], torch.nan)
    ours = gradients(grpo_kernels, case, mode, chunk_tokens=chunk_tokens, **keywords)
    assert ours.keys() == exact.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, exact[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_accuracy_in_lower_precision(pytorch_backend, dtype, adapter_dtype, mode, chunk_tokens):
    case = make_case(dtype, adapter_dtype)
    exact = exact_gradients(case, mode)
    ours = gradients(grpo_kernels, case, mode, chunk_tokens=chunk_tokens)
    for name, x in ours.items():
        is_gradient = name != "value"
        assert not is_gradient or x.dtype == case[name].dtype
        is_rounded = is_gradient and (dtype != torch.float32 or x.dtype != torch.float32)
        allowed = half_gradient_tolerance() if is_rounded else 2e-6
        assert relative_error(x, exact[name]) <= allowed, name


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_adapter_adds_no_product_of_vocabulary_and_hidden_size(pytorch_backend, mode):
    case = make_case(torch.float32, torch.float32)
    for name in ("hidden", "a", "b"):
        case[name].requires_grad_()
    flops = count_flops(lambda: value(grpo_kernels, case, mode).backward())
    logits = V * H + R * V  # made once, as all tokens fit one chunk
    states = R * H * (1 if mode == "token" else 2)
    gradient = V * H + R * V + R * H + R * H + R * V  # d_hidden (3 products), d_a and d_b
    assert flops == 2 * B * T * (logits + states + gradient)


def test_without_gradient_of_adapter_its_gradient_products_are_left_out(pytorch_backend):
    case = make_case(torch.float32, torch.float32)
    case["bias"].requires_grad_()
    flops = count_flops(lambda: value(grpo_kernels, case, "token").backward())
    assert flops == 2 * B * T * (V * H + R * (H + V))


@pytest.mark.parametrize("mode", MODES)
def test_no_grad_autocast_compile_and_checkpointing(pytorch_backend, mode):
    case = make_case(torch.float32, torch.float32)
    expected = gradients(grpo_kernels, case, mode)
    with torch.no_grad():
        torch.testing.assert_close(value(grpo_kernels, case, mode), expected["value"])

    leaves = [case[name].requires_grad_() for name in LEAVES]

    def function(*leaves):
        return value(grpo_kernels, case | dict(zip(LEAVES, leaves, strict=True)), mode)

    wrapped = {
        "compile": torch.compile(function, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda *leaves: checkpoint(function, *leaves, use_reentrant=False),
    }
    for name, call in wrapped.items():
        total = call(*leaves)
        found = torch.autograd.grad(total, leaves)
        torch.testing.assert_close(total.detach(), expected["value"], msg=name)
        torch.testing.assert_close(found, tuple(expected[leaf] for leaf in LEAVES), msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        total = function(*leaves)
    for leaf, grad in zip(LEAVES, torch.autograd.grad(total, leaves), strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected[leaf].double()) < 2e-2, leaf


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        ((1, 2, 3), TypeError, r"adapter must be a HeadAdapter\(a, b, scale\), got tuple"),
        (
            HeadAdapter(torch.zeros(R, H + 1), torch.zeros(V, R), 1.0),
            ValueError,
            r"adapter.a must be \[r, 16\], where 16 is the size of hidden, got shape \(3, 17\)",
        ),
        (
            HeadAdapter(torch.zeros(R, H), torch.zeros(R, V), 1.0),
            ValueError,
            r"adapter.b must have shape \(37, 3\), got shape \(3, 37\)",
        ),
        (
            HeadAdapter(torch.zeros(R, H).int(), torch.zeros(V, R), 1.0),
            TypeError,
            "adapter.a must be floating point, got torch.int32",
        ),
        (
            HeadAdapter(torch.zeros(R, H), torch.zeros(V, R), torch.inf),
            ValueError,
            "adapter.scale must be finite, got inf",
        ),
    ],
)
def test_error_messages(adapter, error, message):
    case = make_case()
    inputs = [case[name] for name in ("hidden", "weight", "tokens")]
    with pytest.raises(error, match=message):
        linear_token_stats(*inputs, adapter=adapter)
    with pytest.raises(error, match=message):
        linear_grpo_loss(*inputs, ADVANTAGES, adapter=adapter)
