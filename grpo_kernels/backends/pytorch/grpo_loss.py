"""The token-level loss of a block of rows and its gradient, while their softmax is at hand.

The counterpart of kernels/grpo.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...objective.token_gradients import LossInputs, token_gradients
from ...workspace import thread_buffers
from .softmax import LOG2E, Softmax, clear, row_blocks
from .token_stats import RowWeights, write_gradient

if TYPE_CHECKING:
    from ...objective.config import LossConfig


def grpo_loss(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    loss_inputs: LossInputs,
    config: "LossConfig",
    d_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of every row of logits [B, T, V], and its loss's gradient to d_logits.

    d_logits [B, T, V] may be logits itself; the loss_inputs of a token are [B, T].
    """
    V = logits.shape[-1]
    logprob = temperature.new_zeros(tokens.shape)
    entropy = torch.zeros_like(logprob)
    active = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    wanted = torch.zeros_like(active)
    buffers = thread_buffers(logits.device)
    for at in row_blocks(active, V):
        inverse = temperature[at].reciprocal().unsqueeze(-1)
        rows = logits[at]
        p = Softmax.of(rows, LOG2E * inverse, softcap, buffers, "policy")
        logprob[at], entropy[at] = p.logprob(tokens[at]), p.entropy()
        slopes = token_gradients(logprob[at], loss_inputs.at(at), config)
        wanted[at] = slopes.logprob != 0
        if slopes.entropy is not None:
            wanted[at] |= slopes.entropy != 0
        if wanted[at].any():
            weights = RowWeights(inverse, slopes.logprob, slopes.entropy, entropy[at])
            write_gradient(d_logits, at, p, None, weights, tokens, rows, softcap)
    clear(d_logits, ~wanted)
    return logprob, entropy


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x by a number; a 1 touches nothing."""
    if factor != 1:
        x.mul_(factor)
