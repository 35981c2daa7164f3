"""mini-GRPO's approximate KL and its gradient, a block of rows at a time.

The quantities are those of backends/triton/approximate_kl.py: t is log2(q / p) with both at least
eps, and w = 1 - 2^t where p >= eps, else 0.
"""

import torch
from torch import Tensor

from ...workspace import thread_workspace
from ..interface import ApproximateKL, accumulation_dtype
from .softmax import LN2, LOG2E, Softmax, exp2, row_blocks, row_sum, softmax, zero_rows


def _log_ratio(p: Softmax, q: Softmax, log2_eps: float) -> Tensor:
    """t of every entry, written to q.z; p.z is not changed."""
    least_p = torch.maximum(p.z, log2_eps + p.log_sum, out=p.product)
    least_q = torch.maximum(q.z, log2_eps + q.log_sum, out=q.z)
    return least_q.sub_(least_p).add_(p.log_sum - q.log_sum)


def _zero_below_eps(excess: Tensor, p: Softmax, log2_eps: float) -> Tensor:
    """Zero the entries whose p is below eps, in place.

    A mask of 0 and 1 in the dtype of excess: for 49,152 entries on one core, comparison and product
    take 11 us, a bool mask with masked_fill 72.
    """
    return excess.mul_(torch.ge(p.z, log2_eps + p.log_sum, out=p.product))


def approximate_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float
) -> ApproximateKL:
    """The approximate KL of every row of [B, T, V]; mask [B, T]."""
    total = logits.new_zeros(mask.shape, dtype=accumulation_dtype(logits.dtype))
    row_lse = total.new_zeros((*mask.shape, 2))
    kl = ApproximateKL(total, torch.zeros_like(total), row_lse, torch.zeros_like(row_lse))
    scale = total.new_full((1, 1), LOG2E)
    workspace = thread_workspace(logits.device)
    for block in row_blocks(mask, logits.shape[-1]):
        p = softmax(logits[block], scale, None, workspace, "policy")
        q = softmax(ref_logits[block], scale, None, workspace, "reference")
        kl.row_lse[block], kl.ref_row_lse[block] = p.row_lse, q.row_lse
        t = _log_ratio(p, q, log2_eps)
        excess = exp2(t, out=p.e).sub_(1.0)
        total[block] = row_sum(torch.sub(excess, t, alpha=LN2, out=t)).squeeze(-1)
        kl.weight_sum[block] = -row_sum(_zero_below_eps(excess, p, log2_eps)).squeeze(-1)
    return kl


def approximate_kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    kl: ApproximateKL,
    d_total: Tensor,
    log2_eps: float,
    d_logits: Tensor,
) -> None:
    """Write the gradient of every row to d_logits [B, T, V]."""
    scale = kl.weight_sum.new_full((1, 1), LOG2E)
    zero_rows(d_logits, ~mask)
    workspace = thread_workspace(logits.device)
    for block in row_blocks(mask, logits.shape[-1]):
        of_rows = scale, None, workspace
        p = softmax(logits[block], *of_rows, "policy", kl.row_lse[block])
        q = softmax(ref_logits[block], *of_rows, "reference", kl.ref_row_lse[block])
        t = _log_ratio(p, q, log2_eps)
        excess = _zero_below_eps(exp2(t, out=q.e).sub_(1.0), p, log2_eps)
        row_weight = kl.weight_sum[block].unsqueeze(-1) / p.total
        dx = exp2(p.z, out=p.e).mul_(row_weight).add_(excess)
        d_logits[block] = dx.mul_(-d_total[block].unsqueeze(-1)).to(d_logits.dtype)
