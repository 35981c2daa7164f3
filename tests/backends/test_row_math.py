"""Device functions of one row against fp64: accuracy over their whole range, and special values."""

import pytest
import torch

from grpo_kernels import backends

if not backends.HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl

from grpo_kernels.backends.triton.row_math import softcapped, softcapped_derivative

needs_kernels = pytest.mark.skipif(
    not (backends.INTERPRETED or torch.cuda.is_available()), reason="needs Triton's interpreter"
)


@triton.jit
def _softcap_kernel(x_ptr, y_ptr, derivative_ptr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, softcapped(x, SOFTCAP))
    tl.store(derivative_ptr + offsets, softcapped_derivative(x, SOFTCAP))


def softcap_of(x, softcap):
    """softcap · tanh(x / softcap) and its derivative, by the device functions."""
    x = x.to("cpu" if backends.INTERPRETED else "cuda")
    y, derivative = torch.empty_like(x), torch.empty_like(x)
    _softcap_kernel[(1,)](x, y, derivative, BLOCK=x.numel(), SOFTCAP=softcap)
    return y.cpu(), derivative.cpu()


@needs_kernels
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-23), (torch.float64, 2**-51)])
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_is_accurate_to_a_few_units_of_the_result(dtype, unit, softcap):
    u = torch.linspace(-9, 9, 1 << 15, dtype=torch.float64)
    u[: 1 << 12] = torch.logspace(-9, 0, 1 << 12, dtype=torch.float64)
    x = (softcap * u).to(dtype)
    y, derivative = softcap_of(x, softcap)
    u = x.double() / softcap
    expected, slope = softcap * u.tanh(), u.cosh() ** -2.0
    assert ((y.double() - expected).abs() / expected.abs()).max() <= 4 * unit
    # The exponent of the derivative, 2u log2(e), is rounded: its error grows with u.
    assert ((derivative.double() - slope).abs() / slope / (1 + u.abs())).max() <= 4 * unit


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softcap_of_special_values(dtype):
    infinity, nan = float("inf"), float("nan")
    x = torch.tensor([-infinity, infinity, nan, -3e38, 3e38, 1e4, 0.0, 1e-30], dtype=dtype)
    y, derivative = softcap_of(x, 5.0)
    expected = torch.tensor([-infinity, 5.0, nan, -5.0, 5.0, 5.0, 0.0, 1e-30], dtype=dtype)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-15, atol=0)
    expected = torch.tensor([0.0, 0.0, nan, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=dtype)
    torch.testing.assert_close(derivative, expected, equal_nan=True, rtol=1e-15, atol=1e-300)
