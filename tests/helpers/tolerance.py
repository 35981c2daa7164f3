"""The tolerance rule: at most twice the error of PyTorch in the same dtype, plus one rounding."""

import torch

# Accumulation error allowed before the result is rounded to this dtype, because PyTorch's error at
# an entry may be 0 by chance. In fp32: two differences of about 32 nats, each rounded once.
FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 4e-6,
    torch.float16: 4e-6,
}


def assert_as_accurate(name, ours, same_dtype, exact):
    """|ours - exact| <= 2·|same_dtype - exact| + eps·|exact| + FLOOR, entry by entry.

    exact is computed in fp64, same_dtype by plain PyTorch in the dtype of the inputs. Where exact
    is infinite or NaN, ours must be equal to it; so must ids and flags be.
    """
    assert ours.dtype == same_dtype.dtype, f"{name}: {ours.dtype}, not {same_dtype.dtype}"
    assert ours.shape == exact.shape, f"{name}: {tuple(ours.shape)}, not {tuple(exact.shape)}"
    if not ours.dtype.is_floating_point:
        assert torch.equal(ours, exact), f"{name}: {ours}, not {exact}"
        return
    rounding = torch.finfo(ours.dtype).eps * exact.abs() + FLOOR[ours.dtype]
    finite = exact.isfinite()
    special = torch.where(finite, 0.0, exact)
    torch.testing.assert_close(
        torch.where(finite, 0.0, ours.double()), special, rtol=0, atol=0, equal_nan=True
    )
    error = torch.where(finite, (ours.double() - exact).abs(), 0.0)
    allowed = torch.where(finite, 2 * (same_dtype.double() - exact).abs() + rounding, 0.0)
    excess = (error - allowed).nan_to_num(nan=torch.inf)
    if (excess > 0).any():
        worst = excess.argmax()
        raise AssertionError(
            f"{name}: {(excess > 0).sum()} of {excess.numel()} entries too far from fp64; the "
            f"worst is {ours.flatten()[worst]:.9g}, fp64 {exact.flatten()[worst]:.9g}, PyTorch "
            f"{same_dtype.flatten()[worst]:.9g}"
        )
