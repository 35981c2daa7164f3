"""Inputs and results of the row functions that both backends implement.

A row is the logits of one token. Rows are laid out as [B, T, V]: packed input is one long sequence,
B = 1. Rows may be strided; their entries are contiguous.

    token_stats_forward(rows, request) -> RowStats
    token_stats_backward(rows, stats, grads, d_logits)
        writes every row's gradient to d_logits [B, T, V], which may be rows.logits itself
    grpo_loss(rows, loss_inputs, config, d_logits) -> (logprob, entropy)
        a token-level loss: its gradient goes to d_logits, which may be rows.logits itself
    approximate_kl_forward(logits, ref_logits, mask, log2_eps) -> ApproximateKL
    approximate_kl_backward(logits, ref_logits, mask, kl, d_total, log2_eps, d_logits)
    jsd_forward(rows, stats, jsd_weight) -> (jsd, KL(p‖m))
    jsd_backward(rows, stats, kl_policy, d_jsd, jsd_weight, d_logits)
        d_logits may be rows.logits itself
    scale_(x, factor)
        multiplies x [B, T, V] in place; a factor of 1 touches nothing

Masked rows are not read. Their statistics and gradients are exactly 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..objective.token_gradients import TokenGrads
from ..validation import expect_flag, expect_number


class RowInputs(NamedTuple):
    """Rows of logits and what is asked of each."""

    logits: Tensor  # [B, T, V]
    tokens: Tensor  # [B, T], int64
    temperature: Tensor  # [B, T], in the accumulation dtype; its last stride may be 0
    mask: Tensor | None  # [B, T], bool; None counts every row
    ref_logits: Tensor | None  # [B, T, V]; None without kl
    softcap: float | None
    kl: str | None  # "forward", "reverse" or None


class StatsRequest(NamedTuple):
    """The statistics that are computed beside the log-prob and the KL of `RowInputs.kl`."""

    entropy: bool = True
    sum_sq_probs: bool = False
    mean_logit: bool = False
    is_top1: bool = False
    top_logprobs: int = 0  # K, at most V

    def check(self, V: int | None) -> None:
        """Raise if a flag is not a bool, or K is not in [0, V]; V None: not known."""
        *flags, K = self
        for name, flag in zip(self._fields, flags, strict=False):
            expect_flag(name, flag)
        expect_number("top_logprobs", K, integer=True, at_least=0, at_most=V)


class RowStats(NamedTuple):
    """Statistics of rows; None where they were not asked for.

    A row's log-sum-exp is kept in two parts, so that it costs no precision: row_lse[..., 0] is the
    maximum m of the capped logits before the temperature, row_lse[..., 1] the base-2 logarithm of
    the sum of exp((logits - m) / temperature).
    """

    logprob: Tensor | None  # [B, T], in the accumulation dtype, like all; None in backward
    entropy: Tensor | None  # [B, T]
    kl: Tensor | None  # [B, T]
    row_lse: Tensor  # [B, T, 2]
    ref_row_lse: Tensor | None = None  # [B, T, 2], of the reference policy's row
    sum_sq_probs: Tensor | None = None  # [B, T], ln Σ p²
    mean_logit: Tensor | None = None  # [B, T], the mean of x over the entries that are not -inf
    num_entries: Tensor | None = None  # [B, T], how many they are; with mean_logit
    is_top1: Tensor | None = None  # [B, T], bool
    top_logprobs: Tensor | None = None  # [B, T, K], descending
    top_ids: Tensor | None = None  # [B, T, K], int64; with top_logprobs

    @classmethod
    def allocate(cls, like: Tensor, request: StatsRequest, *, kl: bool) -> "RowStats":
        """Make uninitialised statistics in the shape and dtype of `like`."""

        def new(is_wanted: bool | int, *size: int, dtype: torch.dtype = like.dtype) -> Any:
            return like.new_empty((*like.shape, *size), dtype=dtype) if is_wanted else None

        K = request.top_logprobs
        return cls(
            new(True),
            new(request.entropy),
            new(kl),
            new(True, 2),
            new(kl, 2),
            new(request.sum_sq_probs),
            new(request.mean_logit),
            new(request.mean_logit),
            new(request.is_top1, dtype=torch.bool),
            new(K, K),
            new(K, K, dtype=torch.int64),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "RowStats":
        """Apply a function to every tensor that is there."""
        return RowStats._make(x if x is None else function(x) for x in self)

    def as_outputs(self) -> "StatsOutputs":
        """Put an empty tensor where there is none: an operator cannot return None."""
        outputs = tuple(self.row_lse.new_empty(0) if x is None else x for x in self)
        return cast(StatsOutputs, outputs)

    def keep_for_backward(self, grads: TokenGrads) -> "RowStats":
        """Select the statistics that backward reads for these gradients."""

        def only(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
            return None if grad is None else x

        return RowStats(
            None,
            only(grads.entropy, self.entropy),
            only(grads.kl, self.kl),
            self.row_lse,
            only(grads.kl, self.ref_row_lse),
            only(grads.sum_sq_probs, self.sum_sq_probs),
            num_entries=only(grads.mean_logit, self.num_entries),
        )


# The fields of RowStats as results of an operator.
StatsOutputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]


class ApproximateKL(NamedTuple):
    """mini-GRPO's approximate KL of rows, and what its gradient needs."""

    total: Tensor | None  # [B, T], in the accumulation dtype, like all; None in backward
    weight_sum: Tensor  # [B, T], the sum of w in backends/triton/approximate_kl.py
    row_lse: Tensor  # [B, T, 2]
    ref_row_lse: Tensor  # [B, T, 2]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 tensors, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar_tensor(number: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a 0-dim tensor of a number, or of a tensor of one element.

    A number enters by a product: torch.compile keeps it symbolic, so that a new value compiles
    nothing, and nothing is copied to the device.
    """
    if isinstance(number, Tensor):
        return number.detach().to(dtype).reshape(())
    return torch.ones((), dtype=dtype, device=device) * number
