"""Probability ratios to the old policy, and importance weights to the sampler's log-probs."""

import torch
from torch import Tensor

from .config import LossConfig
from .ratios import RATIO_LEVELS, LossInputs, PolicyRatios, saturated_exp
from .sequences import Sequences


def policy_ratios(
    logprob: Tensor, inputs: LossInputs, config: LossConfig, sequences: Sequences | None = None
) -> PolicyRatios:
    """Compute the ratios to the old policy and the weights of the policy terms.

    sequences: None for a part of a batch, where `is_token_level` holds.
    """
    old_logprob = logprob.detach() if inputs.old_logprob is None else inputs.old_logprob
    log_ratio = logprob - old_logprob
    importance = None
    if inputs.sampling_logprob is not None:
        importance = importance_weight(old_logprob - inputs.sampling_logprob, config, sequences)
    return PolicyRatios(
        logprob,
        old_logprob,
        inputs.sampling_logprob,
        inputs.advantage,
        log_ratio,
        saturated_exp(RATIO_LEVELS[config.ratio_level](log_ratio, sequences)),
        importance,
        sequences,
    )


def importance_weight(
    log_weight: Tensor, config: LossConfig, sequences: Sequences | None = None
) -> Tensor:
    """Weigh a token by exp(log_weight), or exp of its sum over the sequence; truncate or mask it.

    log_weight is old_logprob - sampling_logprob. LossConfig documents the importance_ settings; the
    mask is IcePop's (Ling team, 2025). Nothing is differentiated.
    """
    if config.importance_level == "sequence":
        assert sequences is not None
        log_weight = sequences.sum(log_weight)
    weight = saturated_exp(log_weight)
    floor, cap = config.importance_floor, config.importance_cap
    if floor is None and cap is None:
        return weight
    inside = weight.clamp(floor, cap)
    if config.importance_mode == "truncate":
        return inside
    return torch.where(weight < inside, 0.0, torch.where(weight > inside, 0.0, weight))
