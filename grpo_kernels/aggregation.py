"""How token terms become one number: the weight of each token in the sum that is the loss.

Every aggregation is linear, so it is a weight per token. A part of a batch, weighted with the whole
batch's denominator, then adds up to the whole batch's loss.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .objective import LossConfig


class Aggregation(NamedTuple):
    """A sum over tokens, each over its sequence's length or not, divided by a denominator."""

    over_length: bool
    denominator: Callable[[Tensor, int, "LossConfig"], Tensor | int]  # tokens, sequences, config


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": Aggregation(True, lambda tokens, sequences, config: sequences),
    "token_mean": Aggregation(False, lambda tokens, sequences, config: tokens.clamp(min=1)),
    "fixed_length": Aggregation(
        False, lambda tokens, sequences, config: sequences * config.max_completion_length
    ),
    "sequence_sum_mean": Aggregation(False, lambda tokens, sequences, config: sequences),
}


def token_weights(
    keep: Tensor,
    config: "LossConfig",
    normalizer: float | Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of each token's term in the loss, which is the weighted sum of the terms.

    Args:
        keep: bool [B, T] or [N], False where a token is masked: its weight is 0.
        Others: as in `policy_loss`; `dtype` of the result, whose shape is that of `keep`.
    """
    over_length, denominator = AGGREGATIONS[config.aggregation]
    weight = keep.to(dtype)
    if over_length:
        weight = weight / sequence_sum(weight, cu_seqlens).clamp(min=1)
    sequences = keep.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if normalizer is None:
        return weight / denominator(keep.sum(), sequences, config)
    return (weight / _nonzero(normalizer)).to(dtype)


def entropy_divisor(
    keep: Tensor, normalizer: float | Tensor | None, entropy_normalizer: float | Tensor | None
) -> Tensor | float:
    """What the sum of the entropies is divided by: a number of tokens."""
    for given in (entropy_normalizer, normalizer):
        if given is not None:
            return _nonzero(given)
    return keep.sum().clamp(min=1)


def _nonzero(count: Tensor | float) -> Tensor | float:
    """Where nothing was counted, what is divided by the count is 0 already."""
    return torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count


def _sequence_ids(tokens: int, cu_seqlens: Tensor) -> Tensor:
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """At every token the sum over its sequence; [B, T] or packed [N], as given."""
    if cu_seqlens is None:
        return x.sum(-1, keepdim=True).expand_as(x)
    # Not index_add: its atomics on a GPU would change the last bits from run to run.
    sums = torch.segment_reduce(x, "sum", lengths=cu_seqlens.diff(), unsafe=True)
    return sums[_sequence_ids(x.shape[0], cu_seqlens)]


def spread_to_tokens(advantages: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Advantages per token, of the shape, from one per token or one per sequence."""
    if advantages.shape == shape:
        return advantages
    if cu_seqlens is None:
        return advantages.unsqueeze(-1).expand(shape)
    return advantages[_sequence_ids(shape[0], cu_seqlens)]
