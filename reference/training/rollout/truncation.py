"""Truncation of the sampled distribution: top-k, top-p and min-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels import TokenSupport, support_from_logits

# No limit for vLLM, which takes the vocabulary instead. It refuses 0 if it returns sampling masks.
NO_TOP_K = 1 << 30


@dataclass(frozen=True)
class Truncation:
    """The settings of --top-k, --top-p and --min-p, with the rules of `support_from_logits`.

    Attributes:
        return_support: samplers return the tokens that they kept, so that the loss normalises over
            them.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    return_support: bool = True

    def __call__(self, logits: Tensor, temperature: float) -> tuple[Tensor, TokenSupport]:
        """Set the logits [R, V] of dropped tokens to -inf; also return the tokens that are kept."""
        rules = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        support = support_from_logits(logits, **rules, temperature=temperature)
        rows = torch.arange(len(logits), device=logits.device).repeat_interleave(support.lengths)
        # An empty range is the whole vocabulary.
        kept = (support.lengths == 0)[:, None].expand(logits.shape).clone()
        kept[rows, support.token_ids] = True
        return logits.masked_fill(~kept, -torch.inf), support
