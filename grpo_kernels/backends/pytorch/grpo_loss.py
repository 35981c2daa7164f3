"""The token-level loss and its gradient, a block of rows at a time.

The formulas are those of backends/triton/grpo_loss.py.
"""

import torch
from torch import Tensor

from ...objective.config import LossConfig
from ...objective.ratios import LossInputs
from ...objective.token_gradients import token_gradients
from ...workspace import thread_workspace
from ..interface import RowInputs, RowStats
from .softmax import LOG2E, row_blocks, softmax, zero_rows
from .token_stats import gradient_weights, write_gradient


def grpo_loss(
    rows: RowInputs, loss_inputs: LossInputs, config: LossConfig, d_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of every row; the gradient of its loss goes to d_logits [B, T, V]."""
    logits, tokens, temperature, mask, _, softcap, _ = rows
    logprob = temperature.new_zeros(tokens.shape)
    entropy = torch.zeros_like(logprob)
    active = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    has_gradient = torch.zeros_like(active)
    workspace = thread_workspace(logits.device)
    for block in row_blocks(active, logits.shape[-1]):
        inverse = temperature[block].reciprocal().unsqueeze(-1)
        p = softmax(logits[block], LOG2E * inverse, softcap, workspace, "policy")
        logprob[block] = p.logprob(tokens[block].unsqueeze(-1)).squeeze(-1)
        entropy[block] = p.entropy()
        grads = token_gradients(
            logprob[block], loss_inputs.map(lambda x, block=block: x[block]), config
        )
        has_gradient[block] = grads.logprob != 0
        if grads.entropy is not None:
            has_gradient[block] |= grads.entropy != 0
        if has_gradient[block].any():
            stats = RowStats(None, entropy[block], None, p.row_lse)
            weights = gradient_weights(inverse, grads, stats, None)
            write_gradient(rows, block, p, None, weights, d_logits)
    zero_rows(d_logits, ~has_gradient)
    return logprob, entropy


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x by a number in place; a factor of 1 touches nothing."""
    if factor != 1:
        x.mul_(factor)
