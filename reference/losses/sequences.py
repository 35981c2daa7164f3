"""Per-token tensors laid out as [sequences, longest], and the means that the objective takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the objective reads, [sequences, longest] each, and 0 wherever `keep` is False.

    Only `logprob`, `entropy` and `kl` carry a gradient.
    """

    keep: Tensor  # bool: the unmasked tokens
    logprob: Tensor
    old: Tensor
    advantage: Tensor
    ref: Tensor | None
    sampling: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None


def row_maker(logprob: Tensor, cu_seqlens: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that brings a per-token tensor to [sequences, longest], padded with zeros."""
    if cu_seqlens is None:  # a packed tensor without boundaries is one long row
        return lambda x: x if x.dim() == 2 else x.unsqueeze(0)
    lengths = cu_seqlens.diff().tolist()
    if not lengths:
        return lambda x: x.reshape(1, 0)
    return lambda x: pad_sequence(x.split(lengths), batch_first=True)


def token_mean(x: Tensor, keep: Tensor) -> Tensor:
    """Mean over the unmasked tokens; 0 where there is none."""
    return torch.where(keep, x, 0.0).sum() / keep.sum().clamp(min=1)


def sequence_sum(x: Tensor, keep: Tensor) -> Tensor:
    """Sum over each sequence's unmasked tokens, at every token of the sequence."""
    return torch.where(keep, x, 0.0).sum(-1, keepdim=True).expand_as(keep)


def sequence_mean(x: Tensor, keep: Tensor) -> Tensor:
    """Mean over each sequence's unmasked tokens, at every token of the sequence."""
    return sequence_sum(x, keep) / keep.sum(-1, keepdim=True).clamp(min=1)


def means_by_sequence(x: Tensor, keep: Tensor) -> Tensor:
    """The token means [n] of the n sequences that have an unmasked token."""
    totals = torch.where(keep, x, 0.0).sum(-1)
    counts = keep.sum(-1)
    return totals[counts > 0] / counts[counts > 0]
