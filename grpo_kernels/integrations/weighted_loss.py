"""`policy_loss` with a weight per token, as other trainers pass it to their losses."""

from typing import Any

import torch
from torch import Tensor

from ..objective.config import LossConfig
from ..objective.importance_sampling import policy_ratios
from ..objective.policy_loss import LossOutput, compute_loss, prepare_loss_inputs, zero_masked
from ..objective.ratios import PolicyRatios


def weighted_policy_loss(
    logprob: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    *,
    config: LossConfig,
    **inputs: Any,
) -> tuple[LossOutput, PolicyRatios]:
    """Compute `policy_loss`, the term of each token multiplied by its weight, penalties included.

    Which tokens are clipped or chosen does not depend on the weights.

    Args:
        weights: of the shape of logprob, >= 0; None is 1.
        config: an objective that reads no entropies.
        inputs: keywords of `prepare_loss_inputs`.

    Returns:
        The output of `policy_loss`, and the detached ratios for further metrics.
    """
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    prepared = prepare_loss_inputs(logprob, dtype, advantages, config=config, **inputs)
    sequences, loss_inputs = prepared.sequences, prepared.inputs
    if weights is not None:
        weight = loss_inputs.weight * zero_masked(sequences, weights.detach(), dtype)
        prepared = prepared._replace(inputs=loss_inputs._replace(weight=weight))
    detached = zero_masked(sequences, logprob.detach(), dtype)
    ratios = policy_ratios(detached, loss_inputs, config, sequences)
    return compute_loss(prepared, logprob, None, None), ratios
