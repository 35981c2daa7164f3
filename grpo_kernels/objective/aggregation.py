"""Aggregation of token terms to one number: the weight of each token in the sum that is the loss.

Every aggregation is linear, so it is a weight per token. The losses of micro-batches, weighted with
the whole batch's denominator, then add up to the whole batch's loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..validation import expect_number, shape_of
from .config import LossConfig
from .sequences import Sequences


class Aggregation(NamedTuple):
    """A sum over tokens, each divided by a length of its own or not, over a denominator."""

    length: Callable[[Sequences, torch.dtype, Any], Tensor] | None
    denominator: Callable[[Tensor, int, Any], Tensor | int]  # (tokens, sequences, config)


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": Aggregation(
        lambda sequences, dtype, config: sequences.lengths(dtype),
        lambda tokens, sequences, config: sequences,
    ),
    "token_mean": Aggregation(None, lambda tokens, sequences, config: tokens.clamp(min=1)),
    "fixed_length": Aggregation(
        None, lambda tokens, sequences, config: sequences * config.max_completion_length
    ),
    "sequence_sum_mean": Aggregation(None, lambda tokens, sequences, config: sequences),
    "prompt_mean": Aggregation(
        lambda sequences, dtype, config: sequences.prompt_lengths(
            dtype, config.completions_per_prompt
        ),
        lambda tokens, sequences, config: sequences // config.completions_per_prompt,
    ),
}


def token_weights(
    sequences: Sequences,
    config: LossConfig,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the weight of each token's term in the loss, 0 where masked.

    The loss is the weighted sum of the terms. `normalizer` replaces the denominator.
    """
    length, denominator = AGGREGATIONS[config.aggregation]
    weight = sequences.keep.to(dtype)
    if length is not None:
        weight = weight / length(sequences, dtype, config)
    if normalizer is None:
        return weight / denominator(sequences.keep.sum(), sequences.count, config)
    return (weight / _nonzero(normalizer)).to(dtype)


def entropy_weight(
    keep: Tensor,
    config: LossConfig,
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Compute entropy_coef / number of tokens: the weight, 0-dim, of the sum of the entropies."""
    if not config.has_entropy_bonus:
        return None
    given = normalizer if entropy_normalizer is None else entropy_normalizer
    count = keep.sum().clamp(min=1) if given is None else _nonzero(given)
    coef = torch.zeros((), dtype=dtype, device=keep.device) + config.entropy_coef
    return (coef / count).to(dtype)


def scaled_nll_weight(
    nll_weight: Tensor, config: LossConfig, normalizer: float | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute nll_coef · nll_weight / the number of weights that are not 0, or `normalizer`."""
    count = (nll_weight != 0).sum().clamp(min=1) if normalizer is None else _nonzero(normalizer)
    return (config.nll_coef * nll_weight.to(dtype) / count).to(dtype)


def _nonzero(count: Tensor | float) -> Tensor | float:
    """Replace a count of 0 by 1: what is divided by it is 0 already."""
    return torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count


def check_normalizers(
    config: LossConfig,
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    nll_normalizer: float | Tensor | None,
    device: torch.device,
) -> None:
    """Check that all are positive, and that they come together where they count differently.

    device: of the tokens; a tensor may be on the CPU too.
    """
    named = {
        "normalizer": normalizer,
        "entropy_normalizer": entropy_normalizer,
        "nll_normalizer": nll_normalizer,
    }
    for name, value in named.items():
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(
                    f"{name} must be a number or a 0-dim tensor, got {shape_of(value)}"
                )
            if value.device != device and value.device.type != "cpu":
                raise ValueError(f"{name} must be on {device}, got {value.device}")
        elif value is not None and not torch.compiler.is_compiling():
            # Under torch.compile the number is a symbol, and a comparison would recompile for it.
            expect_number(name, value, above=0)
    if config.has_nll and normalizer is not None and nll_normalizer is None:
        raise ValueError(
            f"normalizer with nll_coef={config.nll_coef} needs nll_normalizer, the number of "
            "tokens that the mean of -logprob divides by, got None"
        )
    if not config.has_entropy_bonus or normalizer is None or config.aggregation == "token_mean":
        return
    if entropy_normalizer is None:
        raise ValueError(
            f"normalizer with entropy_coef={config.entropy_coef} and "
            f"aggregation={config.aggregation!r} needs entropy_normalizer, the number of tokens "
            "that the mean entropy divides by, got None"
        )
