"""How token terms become one number: the weight of each token in the sum that is the loss.

Every aggregation is linear, so it is a weight per token. A part of a batch, weighted with the whole
batch's denominator, then adds up to the whole batch's loss.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .sequences import Sequences

if TYPE_CHECKING:
    from .config import LossConfig


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
    sequences: Sequences,
    config: "LossConfig",
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of each token's term in the loss, which is the weighted sum of the terms.

    It has the shape of `sequences.keep`, and is 0 where that is False. `normalizer`: as in
    `policy_loss`.
    """
    over_length, denominator = AGGREGATIONS[config.aggregation]
    weight = sequences.keep.to(dtype)
    if over_length:
        weight = weight / sequences.lengths(dtype)
    if normalizer is None:
        return weight / denominator(sequences.keep.sum(), sequences.count, config)
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
