"""Workspace, and the row stride of logits and their gradient."""

import pytest
import torch

from grpo_kernels.workspace import ROW_BYTES, Workspace, new_rows, row_stride

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 3, 16_033, 50_257, 128_256])
def test_rows_start_at_multiples_of_16_bytes(V, dtype):
    stride = row_stride(V, dtype)
    assert V <= stride < V + ROW_BYTES // dtype.itemsize
    assert stride * dtype.itemsize % ROW_BYTES == 0
    workspace = Workspace(torch.device("cpu"))
    for rows in (workspace.rows("logits", 3, V, dtype), new_rows(torch.ones(1).to(dtype), 3, V)):
        assert rows.shape == (3, V) and rows.dtype == dtype and rows.stride() == (stride, 1)
        assert all(row.data_ptr() % ROW_BYTES == 0 for row in rows)
    assert workspace.rows("logits", 2, V, dtype).data_ptr() == (
        workspace.rows("logits", 3, V, dtype).data_ptr()
    )
