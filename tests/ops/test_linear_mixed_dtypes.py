"""Hidden states and a head of different dtypes, without autocast."""

import pytest
import torch

import grpo_kernels
from grpo_kernels import LossConfig
from tests.helpers.linear import make_linear_case
from tests.helpers.tensors import normal

HALF = (torch.bfloat16, torch.float16)
PAIRS = [
    *((half, torch.float32) for half in HALF),
    *((torch.float32, half) for half in HALF),
    (torch.bfloat16, torch.float16),
    (torch.float64, torch.float32),
]
CONFIGS = {
    "token": LossConfig(beta=0.1, kl_estimator="reverse"),
    "sequence": LossConfig.gspo(beta=0.1, kl_estimator="forward"),
}


@pytest.mark.parametrize("mode", [*CONFIGS, "statistics"])
@pytest.mark.parametrize(("dtype", "head_dtype"), PAIRS, ids=str)
def test_weight_is_cast_to_the_dtype_of_hidden(backend, dtype, head_dtype, mode):
    """Values and gradients equal those of an explicit cast; gradients have their leaf's dtype."""
    case = make_linear_case(0, 2, 3, dtype=dtype)
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        case[name] = case[name].to(head_dtype)
    leaves = [case.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    ref_weight, tokens = case.pop("ref_weight"), case.pop("tokens")

    def value(hidden, weight, bias, ref_weight):
        keywords = case | {"bias": bias, "ref_weight": ref_weight}
        if mode == "statistics":
            stats = grpo_kernels.linear_token_stats(
                hidden, weight, tokens, kl="reverse", **keywords
            )
            return sum((x * normal(i, 2, 3)).sum() for i, x in enumerate(stats[:3]))
        return grpo_kernels.linear_grpo_loss(
            hidden, weight, tokens, torch.tensor([1.0, -0.5]), config=CONFIGS[mode], **keywords
        ).loss

    hidden, weight, bias = leaves
    # The cast's gradient is rounded to the dtype of hidden, and atol is the smallest fp16 number.
    rounding = {"rtol": max(torch.finfo(dtype).eps, torch.finfo(head_dtype).eps), "atol": 1e-7}
    ours = value(hidden, weight, bias, ref_weight)
    expected = value(hidden, weight.to(dtype), bias, ref_weight.to(dtype))
    assert ours == expected
    gradients = torch.autograd.grad(ours, leaves)
    for gradient, like, leaf in zip(
        gradients, torch.autograd.grad(expected, leaves), leaves, strict=True
    ):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient, like, **rounding)
