"""Which products need operands in fp32."""

import pytest
import torch

from grpo_kernels.lm_head.matmul import is_upcast

HALF, WIDE = torch.float16, torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta" stands for any other than CUDA
@pytest.mark.parametrize(
    ("dtype", "operand_dtype", "expected"),
    [(HALF, HALF, True), (HALF, WIDE, True), (torch.bfloat16, WIDE, True), (WIDE, WIDE, False)],
)
def test_products_that_only_cuda_makes_of_half_precision(device, dtype, operand_dtype, expected):
    d_logits = torch.empty(2, 3, dtype=dtype, device=device)
    assert is_upcast(d_logits, torch.empty(3, 4, dtype=operand_dtype, device=device)) is expected
