"""mini-GRPO's functions, fused: values, gradients, masks, error messages."""

import pytest
import torch

import grpo_kernels
from reference import losses
from tests.helpers.tolerance import assert_as_accurate

PAIRED = ("cross_entropy_from_logits", "kl_divergence", "approximate_kl_divergence")
V = 70


def logits(seed: int, *shape: int, dtype=torch.float64, std: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def value_and_gradient(function, new: torch.Tensor, *arguments, **keywords):
    new = new.clone().requires_grad_()
    value = function(new, *arguments, **keywords)
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    (gradient,) = torch.autograd.grad(value, new, upstream)
    return value.detach(), gradient


def paired(module, name: str, ref: torch.Tensor, mask, **keywords):
    return lambda new: getattr(module, name)(ref, new, mask, **keywords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["entropy_from_logits", *PAIRED])
def test_value_and_gradient_accuracy(backend, name, dtype):
    # Small logits, because the ratios of the approximate KL would reach 1e6 and hide errors.
    new, ref = logits(0, 2, 3, V, dtype=dtype, std=1), logits(1, 2, 3, V, dtype=dtype, std=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])

    def run(module, to: torch.dtype):
        if name == "entropy_from_logits":
            return value_and_gradient(module.entropy_from_logits, new.to(to), mask, detach=False)
        return value_and_gradient(paired(module, name, ref.to(to), mask), new.to(to))

    for what, ours, exact, theirs in zip(
        ("value", "gradient"),
        run(grpo_kernels, dtype),
        run(losses, torch.float64),
        run(losses, dtype),
        strict=True,
    ):
        assert_as_accurate(what, ours, theirs, exact.double())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_approximate_kl_reductions(backend, reduction):
    new, ref = logits(0, 2, 3, V), logits(1, 2, 3, V)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    q = ref.softmax(-1).clamp_min(1e-6)

    def formula(new):
        p = new.softmax(-1).clamp_min(1e-6)
        entries = (q / p - (q / p).log() - 1) * mask.unsqueeze(-1)
        return {"mean": entries.mean(), "sum": entries.sum(), "none": entries}[reduction]

    ours = paired(grpo_kernels, "approximate_kl_divergence", ref, mask, reduction=reduction)
    for got, expected in zip(
        value_and_gradient(ours, new), value_and_gradient(formula, new), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_approximate_kl_gradient_below_the_floor(backend):
    new = torch.tensor([[[0.0, -1.0, -30.0]]], dtype=torch.float64)
    ref = torch.tensor([[[0.0, -2.0, -1.0]]], dtype=torch.float64)
    (_, ours), (_, expected) = (
        value_and_gradient(paired(module, "approximate_kl_divergence", ref, None), new)
        for module in (grpo_kernels, losses)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert ours[0, 0, 2].abs() < 1e-6  # 1 - r is about -2e5 there


def test_approximate_kl_gradcheck(backend):
    new, ref = logits(0, 1, 2, 5, std=1), logits(1, 1, 2, 5, std=1)
    for reduction in ("mean", "none"):
        function = paired(grpo_kernels, "approximate_kl_divergence", ref, None, reduction=reduction)
        assert torch.autograd.gradcheck(function, new.requires_grad_(), fast_mode=True)


def test_entropy_is_detached_by_default(backend):
    new = logits(0, 2, 3, V).requires_grad_()
    assert not grpo_kernels.entropy_from_logits(new).requires_grad
    assert grpo_kernels.entropy_from_logits(new, detach=False).requires_grad


def test_ref_logits_have_no_gradient(backend):
    new, ref = logits(0, 2, 3, V).requires_grad_(), logits(1, 2, 3, V).requires_grad_()
    for name in PAIRED:
        getattr(grpo_kernels, name)(ref, new).backward()
        assert ref.grad is None and new.grad is not None


@pytest.mark.parametrize("name", ["entropy_from_logits", *PAIRED])
def test_masked_tokens_have_no_effect(backend, name):
    new, ref = logits(0, 2, 3, V), logits(1, 2, 3, V)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    dirty = new.clone()
    dirty[0, 2], dirty[1, 1] = torch.nan, torch.inf

    def run(new):
        if name == "entropy_from_logits":
            return value_and_gradient(grpo_kernels.entropy_from_logits, new, mask, detach=False)
        return value_and_gradient(paired(grpo_kernels, name, ref, mask), new)

    for clean, under in zip(run(new), run(dirty), strict=True):
        assert torch.equal(clean, under)


@pytest.mark.parametrize("name", ["entropy_from_logits", *PAIRED])
def test_all_masked(backend, name):
    new, mask = logits(0, 2, 3, V), torch.zeros(2, 3, dtype=torch.bool)
    arguments = (new, mask) if name == "entropy_from_logits" else (new, new, mask)
    assert getattr(grpo_kernels, name)(*arguments).item() == 0


def test_leading_dimensions(backend):
    new, ref = logits(0, 2, 3, 2, V), logits(1, 2, 3, 2, V)
    for name in PAIRED:
        function = getattr(grpo_kernels, name)
        flat = function(ref.reshape(-1, V), new.reshape(-1, V))
        torch.testing.assert_close(function(ref, new), flat, rtol=1e-12, atol=0)


def test_kl_with_itself_is_zero(backend):
    new = logits(0, 2, 3, V, dtype=torch.float32)
    assert grpo_kernels.kl_divergence(new, new).item() == 0
    assert grpo_kernels.approximate_kl_divergence(new, new).item() == 0


def test_wrong_arguments_raise(backend):
    new = logits(0, 2, 3, V)
    with pytest.raises(ValueError, match=r"reduction must be one of 'none', 'mean', 'sum'"):
        grpo_kernels.approximate_kl_divergence(new, new, reduction="max")
    with pytest.raises(ValueError, match=r"ref_logits must have the shape of new_logits"):
        grpo_kernels.kl_divergence(new[:, :2], new)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\), got shape \(3, 2\)"):
        grpo_kernels.entropy_from_logits(new, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"eps must be less than 1"):
        grpo_kernels.approximate_kl_divergence(new, new, eps=1.0)
