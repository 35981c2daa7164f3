"""Checks of pairs of logits."""

from torch import Tensor

from ..validation import expect_tensor, shape_of


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two logits of one shape on one device."""
    expect_tensor(name, tensor, floating=True)
    expect_tensor(other_name, other, floating=True)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {shape_of(tensor)}"
        )
    expect_tensor(name, tensor, device_of=other)
