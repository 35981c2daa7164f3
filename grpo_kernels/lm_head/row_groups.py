"""Tokens grouped by the row of hidden states that predicts them.

Mostly each token has a row of its own. Where sequences share a prefix and are packed as a tree, the
row at a branch predicts the first token of every branch. Its logits, its softmax and the products
of its gradient are then made once, and the gradients of its tokens are summed before the products.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .vocab_parallel import LN2, LOG2E, ON_OTHER_RANK

NO_TOKEN = ON_OTHER_RANK  # for the row functions: a row without a one-hot term
SERIAL = 1 << 14  # entries; from twice as many on, a CPU may add duplicates in any order


class RowGroups(NamedTuple):
    """Rows of hidden states, each once, and the tokens that each predicts."""

    row_idx: Tensor  # [n], int64
    token_idx: Tensor  # [t], int64; the tokens of a row are neighbours
    position: Tensor | None  # [t], the place of a token's row in row_idx; None: row i has token i
    first: Tensor | None  # [n], the place of a row's first token in token_idx

    @classmethod
    def of(cls, token_idx: Tensor, token_rows: Tensor | None) -> "RowGroups":
        """Group these tokens; token_rows [M] is the row of every token, None: its own."""
        if token_rows is None:
            return cls(token_idx, token_idx, None, None)
        rows, order = token_rows[token_idx].sort(stable=True)
        row_idx, position, counts = torch.unique_consecutive(
            rows, return_inverse=True, return_counts=True
        )
        return cls(row_idx, token_idx[order], position, counts.cumsum(0) - counts)

    @property
    def first_tokens(self) -> Tensor:
        """Indices of each row's first token, [n]."""
        return self.token_idx if self.first is None else self.token_idx[self.first]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row_idx)

    def split(self, size: int) -> Iterator["RowGroups"]:
        """Split into groups of `size` rows; the last may be smaller."""
        if self.position is None or self.first is None:
            for row_idx in self.row_idx.split(size):
                yield RowGroups(row_idx, row_idx, None, None)
            return
        bounds = [*self.first[::size].tolist(), len(self.token_idx)]
        for i, row_idx in enumerate(self.row_idx.split(size)):
            tokens = slice(bounds[i], bounds[i + 1])
            yield RowGroups(
                row_idx,
                self.token_idx[tokens],
                self.position[tokens] - i * size,
                self.first[i * size : (i + 1) * size] - bounds[i],
            )

    def sum_by_row(self, values: Tensor) -> Tensor:
        """Sum values [t] of the tokens of each row [n], in the order of the tokens."""
        if self.position is None or self.first is None:
            return values
        return add_in_order(values.new_zeros(len(self)), self.position, values)


def split_by_gradient(
    token_idx: Tensor, num_with_grad: int, token_rows: Tensor | None, num_rows: int
) -> tuple[RowGroups, RowGroups]:
    """Group the tokens whose row has one of the first num_with_grad tokens, and the others.

    num_rows: of the hidden states.
    """
    if token_rows is None or num_with_grad == len(token_idx):
        split = token_idx[:num_with_grad], token_idx[num_with_grad:]
    else:
        has_grad = torch.zeros(num_rows, dtype=torch.bool, device=token_idx.device)
        has_grad[token_rows[token_idx[:num_with_grad]]] = True
        is_with_grad = has_grad[token_rows[token_idx]]
        split = token_idx[is_with_grad], token_idx[~is_with_grad]
    with_grad, without = (RowGroups.of(part, token_rows) for part in split)
    return with_grad, without


class TokenLogits(NamedTuple):
    """The logits of tokens whose rows have the statistics of no token, [t] each."""

    position: Tensor  # of the token's row
    entry: Tensor  # of the row; 0 where it has none for the token
    logit: Tensor  # after the softcap; -inf on another rank, NaN for an id in no shard
    slope: Tensor  # d x / d logit, with x the capped logit over the temperature; 0 for -inf
    scale: Tensor  # log2(e) / temperature

    @classmethod
    def read(
        cls,
        logits: Tensor,
        position: Tensor,
        tokens: Tensor,
        temperature: Tensor,
        softcap: float | None,
    ) -> "TokenLogits":
        """Read them from logits [n, V]."""
        inside = (tokens >= 0) & (tokens < logits.shape[1])
        entry = torch.where(inside, tokens, 0)
        logit = logits[position, entry]
        logit = torch.where(tokens == ON_OTHER_RANK, -torch.inf, logit)
        logit = torch.where(inside | (tokens == ON_OTHER_RANK), logit, torch.nan)
        is_excluded, slope = logit == -torch.inf, temperature.reciprocal()
        if softcap is not None:
            tanh = (logit / softcap).tanh()
            logit = torch.where(is_excluded, logit, softcap * tanh)
            slope = slope * (1.0 - tanh * tanh)
        slope = torch.where(is_excluded | ~inside, 0.0, slope)
        return cls(position, entry, logit, slope, LOG2E / temperature)

    def logprob(self, row_lse: Tensor) -> Tensor:
        """Log-probabilities [t] under rows of this row_lse [t, 2]."""
        pivot, log_sum = row_lse.unbind(-1)
        return ((self.logit - pivot) * self.scale - log_sum) * LN2

    def sum_one_hots(self, d_logprob: Tensor, V: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Sum the one-hot terms of d_logprob [t] by logit: (its indices, the sum), [u] each."""
        keys, place = torch.unique(self.position * V + self.entry, return_inverse=True)
        sums = add_in_order(d_logprob.new_zeros(len(keys)), place, d_logprob * self.slope)
        return (keys // V, keys % V), sums


def add_in_order(total: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Add values [t] to total[place] in place, those of one place in their order.

    A GPU sorts the places, so that the order is the same in every run.
    """
    size = SERIAL if total.device.type == "cpu" else max(1, len(values))
    for part_place, part in zip(place.split(size), values.split(size), strict=True):
        total.index_put_((part_place,), part, accumulate=True)
    return total
