"""Sampling supports: the token ids that a sampler kept under top-k, top-p or min-p."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
        parts = [torch.as_tensor([] if x is None else x, dtype=torch.int64) for x in ids]
        lengths = torch.tensor([len(x) for x in parts], dtype=torch.int64)
        token_ids = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
        return cls(token_ids, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))

    @classmethod
    def cat(cls, parts: Sequence["TokenSupport"]) -> "TokenSupport":
        """Concatenate the supports of several runs of tokens."""
        starts = torch.tensor([0, *(len(x.token_ids) for x in parts)]).cumsum(0).tolist()
        offsets = [x.offsets[:-1] + start for x, start in zip(parts, starts, strict=False)]
        end = parts[-1].offsets[-1:] + starts[len(parts) - 1]
        return cls(torch.cat([x.token_ids for x in parts]), torch.cat([*offsets, end]))

    def select(self, index: Tensor) -> "TokenSupport":
        """Select the tokens `index`, flattened, in that order; a negative index: no ids."""
        index = index.flatten().to(self.offsets.device)
        lengths = torch.where(index < 0, 0, self.lengths[index])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
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
