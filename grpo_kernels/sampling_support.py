"""Sampling supports: the token ids that a sampler kept under top-k, top-p or min-p."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .validation import (
    expect_ids,
    expect_number,
    expect_temperature,
    expect_tensor,
    shape_of,
    suggest_keywords,
)

# Rows of logits are sorted and copied in blocks of this many entries, or single rows.
BLOCK_ENTRIES = 1 << 22


class TokenSupport(NamedTuple):
    """The token ids among which each token was drawn, in CSR form.

    The ids of token i are token_ids[offsets[i] : offsets[i + 1]], in any order, each once. A token
    without ids was drawn from the whole vocabulary. Tokens are numbered as in `tokens.flatten()`.
    It is vLLM's `SamplingMask`.

    token_ids: [S], integer; on the device of the logits or on the CPU.
    offsets: [N + 1], integer, from 0 to S; on either device too.
    """

    token_ids: Tensor
    offsets: Tensor

    @classmethod
    def from_lists(cls, ids: Sequence[Sequence[int] | Tensor | None]) -> "TokenSupport":
        """Make the support of tokens from a list of ids for each; None or []: the vocabulary."""
        parts = []
        for i, own in enumerate(ids):
            part = torch.as_tensor([] if own is None else own)
            expect_tensor(f"ids[{i}]", part, dims=(1,), layout="[K], the ids of one token")
            if len(part) > 0:  # [] is made floating point
                expect_ids(f"ids[{i}]", part)
            parts.append(part.to(torch.int64))
        lengths = torch.tensor([len(x) for x in parts], dtype=torch.int64)
        token_ids = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
        return cls(token_ids, pad(lengths.cumsum(0), (1, 0)))

    @classmethod
    def cat(cls, parts: Sequence["TokenSupport"]) -> "TokenSupport":
        """Concatenate the supports of several runs of tokens."""
        if len(parts) == 0:
            return cls.from_lists([])
        starts = torch.tensor([0, *(len(x.token_ids) for x in parts)]).cumsum(0).tolist()
        ends = [x.offsets.to(torch.int64) for x in parts]
        offsets = [x[:-1] + start for x, start in zip(ends, starts, strict=False)]
        end = ends[-1][-1:] + starts[-2]
        return cls(torch.cat([x.token_ids for x in parts]), torch.cat([*offsets, end]))

    def select(self, index: Tensor) -> "TokenSupport":
        """Select the tokens `index`, flattened, in that order; a negative index: no ids."""
        N = len(self.offsets) - 1
        expect_ids("index", index)
        index = index.flatten().to(self.offsets.device, torch.int64)
        if (index >= N).any():
            raise ValueError(
                f"index must be less than {N}, the number of tokens, got {int(index.max())}"
            )
        index = torch.where(index < 0, N, index)
        lengths = pad(self.lengths, (0, 1))[index]
        offsets = pad(lengths.cumsum(0), (1, 0))
        place = torch.arange(int(offsets[-1]), device=index.device)
        shift = (self.offsets[index] - offsets[:-1]).repeat_interleave(lengths)
        return TokenSupport(self.token_ids[(place + shift).to(self.token_ids.device)], offsets)

    @property
    def lengths(self) -> Tensor:
        """Number of ids of each token, [N]; 0: the whole vocabulary."""
        return self.offsets.diff()

    def to(self, device: torch.device | str) -> "TokenSupport":
        """Move both tensors to a device."""
        return TokenSupport(self.token_ids.to(device), self.offsets.to(device))


@suggest_keywords
@torch.no_grad()
def support_from_logits(
    logits: Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float | Tensor = 1.0,
) -> TokenSupport:
    """Find the tokens that top-k, top-p and min-p keep, by the rules and in the order of vLLM.

    With p = softmax(logits / temperature), each rule sees what the one before has left:

    1. min-p drops the tokens with p < min_p · max p.
    2. top-k drops those whose logit is less than the k-th largest; ties with it stay.
    3. top-p renormalises p over the rest and drops the least likely tokens as long as their sum is
       at most 1 - top_p. Of equal ones the smaller ids go first. The most likely token stays.

    Args:
        logits: [B, T, V] or [N, V], before the temperature; a token of logit -inf is never kept.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        temperature: the sampler's, a number or one per token.

    Returns:
        The ids of each token, ascending. The range is empty, which is the whole vocabulary, if all
        V are kept, and for a row that holds NaN or +inf, or nothing but -inf.
    """
    expect_tensor("logits", logits, floating=True, dims=(2, 3), layout="[B, T, V] or packed [N, V]")
    if logits.shape[-1] < 1:
        raise ValueError(f"logits must have a vocabulary of at least 1, got {shape_of(logits)}")
    expect_number("top_k", top_k, integer=True, at_least=0)
    expect_number("top_p", top_p, above=0, at_most=1)
    expect_number("min_p", min_p, at_least=0, at_most=1)
    expect_temperature(temperature, logits[..., 0], None)
    V, device = logits.shape[-1], logits.device
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scale = torch.as_tensor(temperature, dtype=dtype, device=device).expand(logits.shape[:-1])
    # Sequence by sequence: a slice such as logits[:, :-1] is not copied as a whole.
    sequences = [(logits, scale)] if logits.dim() == 2 else zip(logits, scale, strict=True)
    lengths, ids = [], []
    for rows, scales in sequences:
        size = max(1, BLOCK_ENTRIES // V)
        for block, by in zip(rows.split(size), scales.split(size), strict=True):
            length, kept = _kept_ids(block.to(dtype) / by[:, None], top_k, top_p, min_p)
            ids.append(kept[(length < V).repeat_interleave(length)])
            lengths.append(torch.where(length < V, length, 0))
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return TokenSupport(
        torch.cat([empty, *ids]), pad(torch.cat([empty, *lengths]).cumsum(0), (1, 0))
    )


def _kept_ids(x: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Return the number of kept ids of each row of scaled logits [R, V], and all of the ids."""
    R, V = x.shape
    kept = x > -torch.inf
    kept &= (x < torch.inf).all(-1, keepdim=True)  # no NaN either
    if min_p > 0:
        p = x.softmax(-1)
        kept &= p >= min_p * p.amax(-1, keepdim=True)
    if 0 < top_k < V:
        x = x.masked_fill(~kept, -torch.inf)
        kept &= x >= x.topk(top_k).values[:, -1:]
    if top_p == 1:
        return kept.sum(-1), kept.nonzero()[:, 1]

    # Tokens of p < (1 - top_p) / 2V are all dropped: together they have less than 1 - top_p, and
    # the largest is at least 1 / V. Few are left to be sorted.
    p = x.masked_fill(~kept, -torch.inf).softmax(-1)
    limit = 1 - torch.tensor(top_p, dtype=x.dtype, device=x.device)
    kept &= p >= limit / (2 * V)
    dropped = p.masked_fill(kept, 0).sum(-1, keepdim=True)
    row, ids = kept.nonzero().unbind(-1)
    lengths = kept.sum(-1)
    place = torch.arange(len(ids), device=x.device) - (lengths.cumsum(0) - lengths)[row]
    # The probabilities of each row on the right of a table [R, K]; on the left is padding of 0.
    K = int(lengths.amax()) if R else 0
    place += (K - lengths)[row]
    table = p.new_zeros(R, K)
    table[row, place] = p[row, ids]
    ascending, order = table.sort(dim=-1, stable=True)
    # Sums of integers are exact. Those of floating-point numbers are in another order for another K
    # on a GPU, and torch.use_deterministic_algorithms refuses them there.
    ascending, dropped, limit = ((y * 2.0**62).to(torch.int64) for y in (ascending, dropped, limit))
    stays = dropped + ascending.cumsum(-1) > limit
    stays[:, -1:] = True
    stays = torch.zeros_like(stays).scatter(-1, order, stays)[row, place]
    return torch.zeros_like(lengths).index_add(0, row, stays.long()), ids[stays]
