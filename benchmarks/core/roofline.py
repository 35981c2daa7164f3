"""The limits of this device, measured in this run: what a copy moves, what a product multiplies."""

from functools import cache

import torch

from benchmarks.core.clock import median_seconds
from benchmarks.core.shapes import DTYPES
from grpo_kernels.lm_head.matmul import has_bf16_units

COPIED = {"cuda": 2 << 30, "cpu": 256 << 20}  # bytes; far more than any cache holds
# Sizes (n, k, m) of [n, k] times [m, k]; the fastest is the roof, as no one size is everywhere.
PRODUCTS = {
    "cuda": ((8192, 2048, 16_384), (8192, 8192, 8192)),
    "cpu": ((512, 2048, 4096), (512, 576, 8192), (2048, 2048, 2048)),
}


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written both counted."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / median_seconds(lambda: target.copy_(source))


@cache
def product_rate(device: torch.device, dtype: str) -> float:
    """Floating-point operations per second of torch.mm on operands of a dtype.

    A CPU without units for bf16 multiplies it far more slowly than what it has been upcast to:
    there fp32 is the limit of bf16 as well.
    """
    if device.type == "cpu" and dtype == "bf16" and not has_bf16_units():
        return product_rate(device, "fp32")
    return max(_product_rate(device, DTYPES[dtype], *size) for size in PRODUCTS[device.type])


def _product_rate(device: torch.device, dtype: torch.dtype, n: int, k: int, m: int) -> float:
    # Random numbers: a GPU multiplies zeros faster, as they take less power.
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((n, k), (m, k)))
    out = torch.empty(n, m, dtype=dtype, device=device)
    return 2 * n * k * m / median_seconds(lambda: torch.mm(a, b.T, out=out))


def all_roofs(device: torch.device) -> dict[str, float]:
    """GB/s and TFLOP/s."""
    rates = {f"TFLOP/s, {dtype}": product_rate(device, dtype) / 1e12 for dtype in DTYPES}
    return {"copy GB/s": copy_bandwidth(device) / 1e9, **rates}
