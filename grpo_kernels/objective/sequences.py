"""Which tokens make a sequence: sums and means over each, handed back to its tokens."""

import torch
from torch import Tensor


class Sequences:
    """The rows of a padded batch [B, T], or the stretches of packed tokens [N].

    `keep` is bool, of the tokens' shape: what is not kept is in no sum. Without `cu_seqlens` packed
    tokens are of unknown sequences, and nothing here may be asked.
    """

    def __init__(self, keep: Tensor, cu_seqlens: Tensor | None) -> None:
        self.keep, self.drop, self._cu_seqlens = keep, ~keep, cu_seqlens
        self._lengths: Tensor | None = None

    @property
    def known(self) -> bool:
        return self.keep.dim() == 2 or self._cu_seqlens is not None

    @property
    def count(self) -> int:
        """Sequences without a kept token are counted too."""
        return self.keep.shape[0] if self._cu_seqlens is None else self._cu_seqlens.shape[0] - 1

    def sum(self, x: Tensor) -> Tensor:
        """At every token the sum of x over its sequence."""
        x = x.masked_fill(self.drop, 0)
        if self._cu_seqlens is None:
            return x.sum(-1, keepdim=True).expand_as(x)
        # Not index_add: its atomics on a GPU would change the last bits from run to run.
        sums = torch.segment_reduce(x, "sum", lengths=self._cu_seqlens.diff(), unsafe=True)
        return sums[_sequence_ids(x.shape[0], self._cu_seqlens)]

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """At every token the number of kept tokens of its sequence, at least 1."""
        if self._lengths is None:
            self._lengths = self.sum(self.keep.to(dtype)).clamp(min=1)
        return self._lengths.to(dtype)

    def mean(self, x: Tensor) -> Tensor:
        """At every token the mean of x over its sequence."""
        return self.sum(x) / self.lengths(x.dtype)


def spread_to_tokens(advantages: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Advantages per token, of the shape, from one per token or one per sequence."""
    if advantages.shape == shape:
        return advantages
    if cu_seqlens is None:
        return advantages.unsqueeze(-1).expand(shape)
    return advantages[_sequence_ids(shape[0], cu_seqlens)]


def _sequence_ids(tokens: int, cu_seqlens: Tensor) -> Tensor:
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)
