"""The generalised Jensen-Shannon divergence of rows and its gradient, a block of rows at a time.

The formulas are those of backends/triton/jsd.py.
"""

import torch
from torch import Tensor

from ...workspace import thread_workspace
from ..interface import RowInputs, RowStats
from .softmax import LN2, LOG2E, Softmax, exp2, row_blocks, row_sum, softmax, zero_rows


def _log_mixture(p: Softmax, q: Softmax, jsd_weight: float) -> tuple[Tensor, Tensor]:
    """(t, g) of every entry: t is written to q.z, g to scratch; p.z is not changed."""
    t = q.z.sub_(p.z).add_(p.log_sum - q.log_sum)
    smaller = torch.abs(t, out=p.product).neg_()
    exp2(smaller, out=smaller)
    if jsd_weight == 0.5:
        return t, smaller.add_(1.0).mul_(0.5).log2_()
    weight = torch.full_like(t, 1.0 - jsd_weight).masked_fill_(t > 0, jsd_weight)
    return t, smaller.lerp_(torch.ones_like(smaller), weight).log2_()


def jsd_forward(rows: RowInputs, stats: RowStats, jsd_weight: float) -> tuple[Tensor, Tensor]:
    """(jsd, KL(p‖m)) of every row, [B, T]; stats: row_lse and ref_row_lse of whole rows."""
    assert rows.ref_logits is not None and stats.ref_row_lse is not None
    jsd = torch.zeros_like(stats.row_lse[..., 0])
    kl_policy = torch.zeros_like(jsd)
    active = torch.ones_like(rows.tokens, dtype=torch.bool) if rows.mask is None else rows.mask
    workspace = thread_workspace(rows.logits.device)
    for block in row_blocks(active, rows.logits.shape[-1]):
        of_rows = LOG2E / rows.temperature[block].unsqueeze(-1), rows.softcap, workspace
        p = softmax(rows.logits[block], *of_rows, "policy", stats.row_lse[block])
        q = softmax(rows.ref_logits[block], *of_rows, "reference", stats.ref_row_lse[block])
        exp2(p.z, out=p.e)
        exp2(q.z, out=q.e)
        t, g = _log_mixture(p, q, jsd_weight)
        policy = row_sum(torch.clamp(t, min=0.0, out=p.z).add_(g).mul_(p.e)) * -LN2 / p.total
        ref = row_sum(t.clamp_(max=0.0).sub_(g).mul_(q.e)) * LN2 / q.total
        policy, ref = policy.squeeze(-1), ref.squeeze(-1)
        kl_policy[block] = policy
        jsd[block] = (1.0 - jsd_weight) * policy + jsd_weight * ref
    return jsd, kl_policy


def jsd_backward(
    rows: RowInputs,
    stats: RowStats,
    kl_policy: Tensor,
    d_jsd: Tensor,
    jsd_weight: float,
    d_logits: Tensor,
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be rows.logits itself."""
    assert rows.ref_logits is not None and stats.ref_row_lse is not None
    active = d_jsd != 0
    if rows.mask is not None:
        active = active & rows.mask
    zero_rows(d_logits, ~active)
    workspace = thread_workspace(rows.logits.device)
    for block in row_blocks(active, rows.logits.shape[-1]):
        inverse = rows.temperature[block].reciprocal().unsqueeze(-1)
        of_rows = LOG2E * inverse, rows.softcap, workspace
        p = softmax(rows.logits[block], *of_rows, "policy", stats.row_lse[block])
        q = softmax(rows.ref_logits[block], *of_rows, "reference", stats.ref_row_lse[block])
        exp2(p.z, out=p.e)
        t, g = _log_mixture(p, q, jsd_weight)
        dx = t.clamp_(min=0.0).add_(g).mul_(-LN2).sub_(kl_policy[block].unsqueeze(-1)).mul_(p.e)
        dx.mul_((1.0 - jsd_weight) * d_jsd[block].unsqueeze(-1) * inverse / p.total)
        if rows.softcap is not None:
            tanh = p.z.copy_(p.logits).div_(rows.softcap).tanh_()
            dx.mul_(tanh.square_().neg_().add_(1.0))
        d_logits[block] = dx.to(d_logits.dtype)
