"""The chunk loop: the rows that it passes to the backends."""

import pytest
import torch

from grpo_kernels.lm_head.backward_plan import BackwardPlan
from grpo_kernels.lm_head.chunk_loop import ChunkedLMHead, Logits
from grpo_kernels.lm_head.inputs import prepare_inputs
from grpo_kernels.lm_head.row_groups import RowGroups
from grpo_kernels.workspace import ROW_BYTES
from tests.helpers.tensors import normal

N, H = 7, 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("V", [33, 34, 64])
def test_rows_of_logits_and_gradient_start_at_multiples_of_16_bytes(V, is_kept, dtype):
    hidden, weight = normal(1, N, H).to(dtype), normal(2, V, H).to(dtype)
    inputs = prepare_inputs(
        hidden, weight, torch.zeros(N, dtype=torch.long),
        kl="reverse", ref_hidden=hidden, ref_weight=weight,
    )  # fmt: skip
    kept = None
    if is_kept:
        logits, ref_logits, _ = BackwardPlan((N, V), ()).allocate(inputs)
        kept = Logits(logits, ref_logits).select(torch.arange(N).flip(0))
    head = ChunkedLMHead(inputs, N, None if is_kept else 3, grad=True, logits=kept)
    for chunk in head.chunks(RowGroups.of(torch.arange(N), None)):
        rows = [*chunk.rows.logits[0], *chunk.rows.ref_logits[0], *chunk.d_logits]
        assert all(row.data_ptr() % ROW_BYTES == 0 and row.stride() == (1,) for row in rows)
        expected = chunk.hidden.float() @ weight.float().T
        torch.testing.assert_close(chunk.rows.logits[0], expected[: len(chunk.groups)])
