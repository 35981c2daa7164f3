"""Row statistics and their gradient in PyTorch, a block of rows at a time.

The formulas are those of backends/triton/token_stats.py. Masked rows are not read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...objective.token_gradients import TokenGrads
from ...workspace import thread_workspace
from ..interface import RowInputs, RowStats, StatsRequest
from .softmax import (
    FLOOR,
    LN2,
    LOG2E,
    Block,
    Softmax,
    exp2,
    largest_id,
    largest_ids,
    mean_logit,
    row_blocks,
    softmax,
    zero_rows,
)


def token_stats_forward(rows: RowInputs, request: StatsRequest) -> RowStats:
    """The statistics of every row."""
    logits, tokens, temperature, mask, ref_logits, softcap, kl = rows
    stats = RowStats.allocate(temperature, request, kl=kl is not None).map(Tensor.zero_)
    assert stats.logprob is not None
    active = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    workspace = thread_workspace(logits.device)
    for block in row_blocks(active, logits.shape[-1]):
        scale = LOG2E / temperature[block].unsqueeze(-1)
        p = softmax(logits[block], scale, softcap, workspace, "policy")
        logprob = p.logprob(tokens[block].unsqueeze(-1)).squeeze(-1)
        stats.logprob[block] = logprob
        stats.row_lse[block] = p.row_lse
        if stats.entropy is not None:
            stats.entropy[block] = p.entropy()
        if stats.sum_sq_probs is not None:
            stats.sum_sq_probs[block] = p.log_sum_sq_probs()
        if stats.mean_logit is not None and stats.num_entries is not None:
            mean, number = mean_logit(logits[block], softcap, p.product)
            stats.mean_logit[block] = mean / temperature[block]
            stats.num_entries[block] = number
        if stats.is_top1 is not None:
            is_largest = largest_id(logits[block]).squeeze(-1) == tokens[block]
            stats.is_top1[block] = is_largest & (logprob > -torch.inf)
        if stats.top_logprobs is not None and stats.top_ids is not None:
            ids = largest_ids(logits[block], request.top_logprobs)
            stats.top_logprobs[block], stats.top_ids[block] = p.logprob(ids), ids
        if stats.kl is not None:
            assert ref_logits is not None and stats.ref_row_lse is not None
            q = softmax(ref_logits[block], scale, softcap, workspace, "reference")
            stats.kl[block] = p.divergence(q) if kl == "reverse" else q.divergence(p)
            stats.ref_row_lse[block] = q.row_lse
    return stats


class GradientWeights(NamedTuple):
    """The upstream gradients of a block as weights of its entries, [n, 1] each; None is zero.

    dx = one_hot · 1_token + p · (weight + log_p · log2 p + log_q · log2 q + square · p)
         + q_weight · q + uniform, the last where the logit is not -inf
    """

    one_hot: Tensor | None
    weight: Tensor
    log_p: Tensor | None
    log_q: Tensor | None
    square: Tensor | None
    q_weight: Tensor | None
    uniform: Tensor | None


def gradient_weights(
    inverse: Tensor, grads: TokenGrads, stats: RowStats, kind: str | None
) -> GradientWeights:
    """Weights of a block of n rows.

    Args:
        inverse: 1 / temperature, [n, 1].
        grads: the upstream gradients, [n] each.
        stats: of the block, [n] each; those that `RowStats.keep_for_backward` keeps.
        kind: of the KL, "forward" or "reverse".
    """
    d_logprob, d_entropy, d_kl, d_sum_sq_probs, d_mean_logit = (
        None if grad is None else grad.unsqueeze(-1) * inverse for grad in grads
    )
    weight = torch.zeros_like(inverse) if d_logprob is None else -d_logprob
    log_p = log_q = square = q_weight = uniform = None
    if d_sum_sq_probs is not None:
        assert stats.sum_sq_probs is not None
        weight = weight - 2 * d_sum_sq_probs
        square = 2 * d_sum_sq_probs / stats.sum_sq_probs.unsqueeze(-1).exp()
    if d_mean_logit is not None:
        assert stats.num_entries is not None
        uniform = d_mean_logit / stats.num_entries.unsqueeze(-1)
    if d_entropy is not None:
        assert stats.entropy is not None
        weight = weight - d_entropy * stats.entropy.unsqueeze(-1)
        log_p = -LN2 * d_entropy
    if d_kl is not None and kind == "reverse":
        assert stats.kl is not None
        weight = weight - d_kl * stats.kl.unsqueeze(-1)
        log_q = -LN2 * d_kl
        log_p = -log_q if log_p is None else log_p - log_q
    elif d_kl is not None:
        weight = weight + d_kl
        q_weight = -d_kl
    return GradientWeights(d_logprob, weight, log_p, log_q, square, q_weight, uniform)


def write_gradient(
    rows: RowInputs,
    block: Block,
    p: Softmax,
    q: Softmax | None,
    weights: GradientWeights,
    d_logits: Tensor,
) -> None:
    """Write dx to d_logits[block]; the softmaxes are overwritten.

    They are normalised through the weights: p · (weight + log_p · log2 p) is
    e · ((weight - log_p · log_sum) / total + log_p / total · z), which saves two passes.
    """
    one_hot, weight, log_p, log_q, square, q_weight, uniform = weights
    V, token = p.z.shape[-1], rows.tokens[block].unsqueeze(-1)
    position = token.clamp(0, V - 1)
    included = (token >= 0) & (token < V) & (p.z.gather(-1, position) > FLOOR)
    # A block of d_logits that is a view in the accumulation dtype is written directly.
    is_view = isinstance(block[1], slice)
    is_direct = is_view and d_logits.dtype == p.e.dtype and rows.softcap is None
    # Before dx may overwrite the logits.
    is_entry = None if uniform is None else p.logits != -torch.inf
    # The factor of e, an entry's or its row's.
    if log_p is not None:
        weight = weight - log_p * p.log_sum
    if q is not None and log_q is not None:
        weight = weight - log_q * q.log_sum
    if q is not None and q_weight is not None:
        exp2(q.z, out=q.e).mul_(q_weight / q.total).masked_fill_(p.z <= FLOOR, 0.0)
    factor = weight / p.total
    if log_p is not None:
        factor = p.z.mul_(log_p / p.total).add_(factor)
    if q is not None and log_q is not None:
        factor.add_(q.z.mul_(log_q / p.total))
    if square is not None:
        squares = torch.mul(p.e, square / p.total.square(), out=p.product)
        factor = squares.add_(factor)
    # The gradient of the capped logits.
    dx = torch.mul(p.e, factor, out=d_logits[block] if is_direct else p.e)
    if q is not None and q_weight is not None:
        dx.add_(q.e)
    if uniform is not None and is_entry is not None:
        dx.add_(torch.mul(is_entry, uniform, out=p.product))
    if one_hot is not None:
        dx.scatter_add_(-1, position, torch.where(included, one_hot, 0.0))
    # Through the softcap.
    if rows.softcap is not None:
        tanh = p.z.copy_(p.logits).div_(rows.softcap).tanh_()
        dx.mul_(tanh.square_().neg_().add_(1.0))
    if is_view and not is_direct:
        d_logits[block].copy_(dx)
    elif not is_view:
        d_logits[block] = dx.to(d_logits.dtype)


def token_stats_backward(
    rows: RowInputs, stats: RowStats, grads: TokenGrads, d_logits: Tensor
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be rows.logits itself."""
    active = torch.zeros_like(rows.tokens, dtype=torch.bool)
    for grad in grads:
        if grad is not None:
            active |= grad != 0
    if rows.mask is not None:
        active &= rows.mask
    zero_rows(d_logits, ~active)
    workspace = thread_workspace(rows.logits.device)
    for block in row_blocks(active, rows.logits.shape[-1]):
        inverse = rows.temperature[block].reciprocal().unsqueeze(-1)
        of_rows = LOG2E * inverse, rows.softcap, workspace
        p = softmax(rows.logits[block], *of_rows, "policy", stats.row_lse[block])
        exp2(p.z, out=p.e)
        q = None
        if grads.kl is not None:
            assert rows.ref_logits is not None and stats.ref_row_lse is not None
            q = softmax(rows.ref_logits[block], *of_rows, "reference", stats.ref_row_lse[block])
        block_grads = TokenGrads(*(None if grad is None else grad[block] for grad in grads))
        block_stats = stats.map(lambda x, block=block: x[block])
        weights = gradient_weights(inverse, block_grads, block_stats, rows.kl)
        write_gradient(rows, block, p, q, weights, d_logits)
