"""Per-token tensors arranged as [sequences, longest], and the means that the objective takes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reference.losses.token_stats import compute_dtype


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Inputs of the objective, each [sequences, longest], 0 under the mask.

    Only `logprob`, `entropy` and `kl` carry a gradient.
    """

    mask: Tensor  # bool: True for the tokens that count
    logprob: Tensor
    advantage: Tensor
    old_logprob: Tensor
    ref_logprob: Tensor | None
    sampling_logprob: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None


def arrange(
    logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    old_logprob: Tensor | None,
    **optional: Tensor | None,
) -> Tokens:
    """Bring the arguments of `policy_loss` to [sequences, longest], in fp32 or fp64."""

    def rows(x: Tensor) -> Tensor:
        if cu_seqlens is None:  # packed tokens without boundaries are one row
            return x if x.dim() == 2 else x.unsqueeze(0)
        if len(cu_seqlens) == 1:
            return x.reshape(0, 0)
        return pad_sequence(list(x.split(cu_seqlens.diff().tolist())), batch_first=True)

    unmasked = rows(torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool())
    dtype = compute_dtype(logprob)

    def zero_masked(x: Tensor) -> Tensor:
        return torch.where(unmasked, x.to(dtype), 0.0)

    per_token = advantages.shape == logprob.shape
    advantage = rows(advantages) if per_token else advantages.unsqueeze(-1)
    return Tokens(
        mask=unmasked,
        logprob=zero_masked(rows(logprob)),
        advantage=zero_masked(advantage.detach()),
        old_logprob=zero_masked(rows((logprob if old_logprob is None else old_logprob).detach())),
        **{name: x if x is None else zero_masked(rows(x)) for name, x in optional.items()},
    )


def spread(weights: Tensor | None, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Broadcast weights, one per token or one per sequence, to the shape of `tokens`."""
    if weights is None:
        raise ValueError("nll_coef needs nll_weight")
    if weights.shape == tokens.shape:
        return weights
    if cu_seqlens is None:
        return weights.unsqueeze(-1).expand_as(tokens)
    return weights.repeat_interleave(cu_seqlens.diff())


def mask_with_nll(
    mask: Tensor | None,
    nll_weight: Tensor | None,
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    config: Any,
) -> Tensor | None:
    """Add to the loss mask the tokens that have an nll_weight, if config reads it."""
    if mask is None or config.nll_coef == 0:
        return mask
    return mask.bool() | (spread(nll_weight, tokens, cu_seqlens) != 0)


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked tokens; 0 if there is none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over each sequence's unmasked tokens, repeated for every token of the sequence."""
    return torch.where(mask, x, 0.0).sum(-1, keepdim=True).expand_as(mask)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sequence's unmasked tokens, repeated for every token of the sequence."""
    return sequence_sum(x, mask) / mask.sum(-1, keepdim=True).clamp(min=1)


def means_by_sequence(x: Tensor, mask: Tensor) -> Tensor:
    """Token mean of each of the n sequences that have an unmasked token: [n]."""
    totals, counts = torch.where(mask, x, 0.0).sum(-1), mask.sum(-1)
    return totals[counts > 0] / counts[counts > 0]
