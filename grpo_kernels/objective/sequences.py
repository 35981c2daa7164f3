"""Sequences of tokens: sums and means over each, broadcast to its tokens."""

import torch
from torch import Tensor

from ..validation import expect_tensor, shape_of, values_are_readable


class Sequences:
    """Rows of a padded batch [B, T], or segments of packed tokens [N].

    `keep` is the loss mask as bool, with the tokens' shape, `drop` its inverse; a sum leaves out
    the masked tokens. Without `cu_seqlens` the sequences of packed tokens are unknown, and only
    `keep` and `drop` may be read.
    """

    def __init__(self, keep: Tensor, cu_seqlens: Tensor | None) -> None:
        self.keep, self.drop, self._cu_seqlens = keep, ~keep, cu_seqlens
        self._lengths: Tensor | None = None

    @property
    def known(self) -> bool:
        return self.keep.dim() == 2 or self._cu_seqlens is not None

    @property
    def count(self) -> int:
        """Number of sequences, including those without an unmasked token."""
        return self.keep.shape[0] if self._cu_seqlens is None else self._cu_seqlens.shape[0] - 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over each sequence; every token gets the sum of its sequence."""
        return self._to_tokens(self._sums(x))

    def max(self, x: Tensor) -> Tensor:
        """Take the largest x of each sequence, for every token; -inf if all are masked."""
        x = x.masked_fill(self.drop, -torch.inf)
        if self._cu_seqlens is None:  # padded, because there may be no token
            return self._to_tokens(torch.nn.functional.pad(x, (0, 1), value=-torch.inf).amax(-1))
        lengths = self._cu_seqlens.diff()
        return self._to_tokens(torch.segment_reduce(x, "max", lengths=lengths, unsafe=True))

    def _sums(self, x: Tensor) -> Tensor:
        """Sum x over each sequence: [sequences]."""
        x = x.masked_fill(self.drop, 0)
        if self._cu_seqlens is None:
            return x.sum(-1)
        # Not index_add: its atomics on a GPU would change the last bits from run to run.
        return torch.segment_reduce(x, "sum", lengths=self._cu_seqlens.diff(), unsafe=True)

    def _to_tokens(self, values: Tensor) -> Tensor:
        """Give every token the value of its sequence."""
        if self._cu_seqlens is None:
            return values.unsqueeze(-1).expand(self.keep.shape)
        return values[_sequence_ids(self.keep.shape[0], self._cu_seqlens)]

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """Count the unmasked tokens of each token's sequence, at least 1."""
        if self._lengths is None:
            self._lengths = self.sum(self.keep.to(dtype)).clamp(min=1)
        return self._lengths.to(dtype)

    def prompt_lengths(self, dtype: torch.dtype, completions: int) -> Tensor:
        """Count the unmasked tokens of all completions of each token's prompt, at least 1.

        completions: how many sequences in a row belong to one prompt.
        """
        if self.count % completions:
            raise ValueError(
                f"completions_per_prompt={completions} must divide the number of sequences, "
                f"got {self.count}"
            )
        lengths = self._sums(self.keep.to(dtype)).view(-1, completions).sum(-1)
        return self._to_tokens(lengths.clamp(min=1).repeat_interleave(completions))

    def mean(self, x: Tensor) -> Tensor:
        """Average x over each sequence; every token gets the mean of its sequence."""
        return self.sum(x) / self.lengths(x.dtype)


def spread_to_tokens(advantages: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Broadcast advantages, or weights, one per token or one per sequence, to the tokens' shape."""
    if advantages.shape == shape:
        return advantages
    if cu_seqlens is None:
        return advantages.unsqueeze(-1).expand(shape)
    return advantages[_sequence_ids(shape[0], cu_seqlens)]


def _sequence_ids(tokens: int, cu_seqlens: Tensor) -> Tensor:
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)


def check_advantages(
    advantages: Tensor, tokens: Tensor, cu_seqlens: Tensor | None, name: str = "advantages"
) -> None:
    """Check that there is one advantage per token, or one per sequence."""
    expect_tensor(name, advantages, device_of=tokens)
    shape = tokens.shape
    allowed = [shape]
    if len(shape) == 2:
        allowed.append(shape[:1])
    elif cu_seqlens is not None:
        allowed.append(torch.Size([cu_seqlens.shape[0] - 1]))
    if advantages.shape not in allowed:
        expected = " or ".join(str(tuple(size)) for size in allowed)
        raise ValueError(f"{name} must have shape {expected}, got {shape_of(advantages)}")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: Tensor) -> None:
    """Check the boundaries [sequences + 1] of packed tokens."""
    if tokens.dim() == 2:
        raise ValueError("cu_seqlens belongs to packed [N] input, got [B, T] input")
    expect_tensor("cu_seqlens", cu_seqlens, device_of=tokens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [sequences + 1], got {shape_of(cu_seqlens)}")
    if not values_are_readable(cu_seqlens):
        return
    N = len(tokens)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != N or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {N} tokens, got {cu_seqlens.tolist()}")
