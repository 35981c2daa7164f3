"""The policy objective on per-token tensors: the loss and its metrics.

`prepare_loss_inputs` checks and masks what the caller passes; `compute_loss` adds the policy's own
statistics. The fused ops call the two; `policy_loss` is one after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..validation import expect_mask, expect_tensor, suggest_keywords
from .aggregation import check_normalizers, entropy_weight, scaled_nll_weight, token_weights
from .config import LossConfig, expect_config, in_compiled_code
from .importance_sampling import policy_ratios
from .kl_estimators import SAMPLED_KL, VOCABULARY_KL
from .metrics import token_metrics
from .ratios import LossInputs
from .sequences import Sequences, check_advantages, check_cu_seqlens, spread_to_tokens
from .token_selection import covariance_penalty, kept_by_filters


class LossOutput(NamedTuple):
    """The differentiable 0-dim loss, and detached 0-dim metrics of its dtype, by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


class PreparedLoss(NamedTuple):
    """Checked and masked inputs of a loss: all but the policy's own statistics."""

    config: LossConfig
    sequences: Sequences
    inputs: LossInputs


@suggest_keywords
def policy_loss(
    logprob: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    nll_weight: Tensor | None = None,
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LossOutput:
    """Compute the policy loss of GRPO and its relatives from per-token tensors.

        r      = exp(logprob - old_logprob), or exp of its mean over the sequence at sequence level
        policy = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), or another surrogate;
                 0 for tokens that a filter of `config` drops; times the importance weight
                 exp(old_logprob - sampling_logprob) if sampling_logprob is given
        loss   = aggregate(policy + beta·KL) - entropy_coef · mean entropy
                 + nll_coef · Σ nll_weight · (-logprob) / number of weights that are not 0

    In the first update of a batch old_logprob equals logprob, and every r is 1. With advantages
    normalised per group, the VALUE of the loss is then about 0. Its gradient is not: it is the
    policy gradient -A·∇logprob.

    Choosing a KL estimator is choosing a gradient. With d = logprob - ref_logprob, on-policy and
    in expectation:

        estimator         value             gradient
        k1                d                 0: useless in a loss
        k2                d²/2              KL(policy‖ref), exactly; the value is biased
        k3                e^(-d) - 1 + d    KL(ref‖policy), forward; large where policy << ref
        k3_corrected      r·k3              KL(policy‖ref), exactly, and off-policy too
        k3+               k3                KL(policy‖ref), exactly, as k2
        abs               |d|               neither
        forward, reverse  over vocabulary   KL(ref‖policy), KL(policy‖ref)

    Log-ratios saturate at ±20 before exp, with gradient 0 beyond. k3 saturates only at d < -20,
    because e^(-d) vanishes for large d. A masked token has no effect and gets gradient 0, whatever
    it holds. With every token masked the loss is 0.

    Args:
        logprob: [B, T], or packed [N], fp. The other per-token tensors have its shape.
        advantages: [B] or [B, T]; packed: [N], or [sequences] with `cu_seqlens`. If both shapes
            fit, there is one per token.
        mask: loss mask, bool or 0/1; None counts every token.
        old_logprob: log-probs under the policy that r is relative to; None: logprob.detach().
        ref_logprob: log-probs under the reference policy, for the estimators on sampled tokens.
        entropy: of each token's distribution, in nats, for the bonus and the metric.
        kl: of each token's distribution, for kl_estimator "forward" and "reverse".
        sampling_logprob: log-probs as the sampler computed them, without gradient.
        nll_weight: weights of the cross-entropy term: per token, or one per sequence in the shapes
            of `advantages`. They count outside of the mask too, where a token has this term alone:
            1 on the observations of an environment, or on the completions that are correct. Not
            read where config.nll_coef is 0.
        config: settings of the loss.
        normalizer: > 0, replaces the denominator of the aggregation. It is a number of sequences
            ("sequence_mean", "sequence_sum_mean"), of prompts ("prompt_mean"), of tokens
            ("token_mean"), or of sequences · max_completion_length ("fixed_length"). With the
            normalizer of the whole batch, the losses of micro-batches and ranks add up to exactly
            the loss of one big batch, unless a filter ranks the tokens of the call. A 0-dim tensor
            that holds 0 divides by 1. DDP and FSDP average gradients over ranks: divide the count
            of all ranks by their number.
        entropy_normalizer: likewise the number of tokens that the mean entropy divides by: all
            tokens, even if `config.top_entropy` averages over some. None follows `normalizer` for
            "token_mean"; otherwise the two must be given together.
        nll_normalizer: likewise the number of tokens that the sum of nll_weight · (-logprob)
            divides by. With `normalizer` and nll_coef it must be given.
        cu_seqlens: [sequences + 1] int, boundaries of packed sequences. Packed input needs it if
            `config.reads_sequences`.

    Returns:
        LossOutput, fp32 (fp64 for fp64 logprob), differentiable in `logprob`, `entropy` and `kl`.
        The metrics, under TRL's names where TRL has one:

        policy_loss: policy term, aggregated as the loss.
        ratio_mean, ratio_max: of r.
        clip_ratio/low_mean, high_mean: fraction of tokens with A < 0 below the lower bound, and
            with A > 0 above the upper bound; region_mean: their sum; low_min, high_max: over the
            sequences, if they are known.
        approx_kl: mean of r - 1 - ln r, KL(old‖policy).
        num_tokens: unmasked tokens.
        kl, entropy: means, if their inputs are given.
        nll_loss: the cross-entropy term, as it is in the loss, if nll_coef is not 0.
        cispo_clip_ratio, vespo/phi_seq_mean: of these surrogates.
        filters/kept_mean: fraction of tokens that the filters keep, if one is on.
        sampling/sampling_logp_difference/mean, max: of |old - sampling|; and
        sampling/importance_sampling_ratio/min, mean, max: of the weight, if there is one.

        Means are over unmasked tokens; those of a ratio at level "sequence" are over sequences with
        an unmasked token.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong, an input that `config` needs is missing,
            or one that it does not read is given.

    Schulman et al., 2017 (arXiv:1707.06347); Shao et al., 2024 (arXiv:2402.03300).
    """
    expect_config(config)
    config = in_compiled_code(config)
    expect_tensor("logprob", logprob, floating=True, dims=(1, 2), layout="[B, T] or packed [N]")
    for name, tensor in {"entropy": entropy, "kl": kl}.items():
        if tensor is not None:
            expect_tensor(name, tensor, floating=True, shape=logprob.shape, device_of=logprob)
    readers = {
        "entropy_coef": config.has_entropy_bonus,
        "top_entropy": config.top_entropy is not None,
    }
    for name, reads in readers.items():
        if reads and entropy is None:
            raise ValueError(f"{name}={getattr(config, name)} needs entropy, got None")
    check_kl_input(config, ref_logprob, kl)
    prepared = prepare_loss_inputs(
        logprob,
        torch.float64 if logprob.dtype == torch.float64 else torch.float32,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        sampling_logprob=sampling_logprob,
        nll_weight=nll_weight,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        nll_normalizer=nll_normalizer,
        cu_seqlens=cu_seqlens,
    )
    return compute_loss(prepared, logprob, entropy, kl)


def prepare_loss_inputs(
    tokens: Tensor,
    dtype: torch.dtype,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    nll_weight: Tensor | None = None,
    config: LossConfig,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PreparedLoss:
    """Check the arguments of `policy_loss` and set masked tokens to 0.

    tokens: [B, T] or [N]; only the shape and the device are read. dtype: of the loss, fp32 or fp64.
    """
    shape = tokens.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, tokens)
    elif len(shape) == 1 and config.reads_sequences:
        settings = (
            "surrogate", "ratio_level", "aggregation", "importance_level", "rejection",
            "off_policy_threshold",
        )  # fmt: skip
        given = ", ".join(f"{name}={getattr(config, name)!r}" for name in settings)
        raise ValueError(f"packed [N] input needs cu_seqlens with {given}, got None")
    check_advantages(advantages, tokens, cu_seqlens)
    expect_mask(mask, tokens)
    logprobs = {
        "old_logprob": old_logprob,
        "ref_logprob": ref_logprob,
        "sampling_logprob": sampling_logprob,
    }
    for name, logprob in logprobs.items():
        if logprob is not None:
            expect_tensor(name, logprob, floating=True, shape=shape, device_of=tokens)
    if config.needs_sampling and sampling_logprob is None:
        reader = "importance_mode" if config.importance_mode == "mask" else "surrogate"
        reader = "rejection" if config.rejection else reader
        raise ValueError(f"{reader}={getattr(config, reader)!r} needs sampling_logprob, got None")
    if config.policy_term.relative_to_sampler:
        logprobs |= {"old_logprob": sampling_logprob, "sampling_logprob": None}
    check_normalizers(config, normalizer, entropy_normalizer, nll_normalizer, tokens.device)
    spread_weight = spread_nll_weight(nll_weight, config, tokens, cu_seqlens)

    keep = (advantages.new_ones(shape) if mask is None else mask).bool()
    sequences = Sequences(keep, cu_seqlens)
    advantage = spread_to_tokens(advantages.detach(), shape, cu_seqlens)
    inputs = LossInputs(
        zero_masked(sequences, advantage, dtype),
        token_weights(sequences, config, normalizer, dtype),
        entropy_weight(keep, config, normalizer, entropy_normalizer, dtype),
        **{
            name: None if logprob is None else zero_masked(sequences, logprob.detach(), dtype)
            for name, logprob in logprobs.items()
        },
        nll_weight=None
        if spread_weight is None
        else scaled_nll_weight(spread_weight, config, nll_normalizer, dtype),
    )
    return PreparedLoss(config, sequences, inputs)


def spread_nll_weight(
    nll_weight: Tensor | None, config: LossConfig, tokens: Tensor, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Check nll_weight and broadcast it to the tokens' shape; None where it is not read."""
    if nll_weight is not None:
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tokens)
        check_advantages(nll_weight, tokens, cu_seqlens, "nll_weight")
    if not config.has_nll:
        return None
    if nll_weight is None:
        raise ValueError(f"nll_coef={config.nll_coef} needs nll_weight, got None")
    return spread_to_tokens(nll_weight.detach(), tokens.shape, cu_seqlens)


def tokens_to_read(
    mask: Tensor | None,
    nll_weight: Tensor | None,
    config: LossConfig,
    tokens: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """Return the mask of the tokens that the loss reads: of the loss mask or with an nll_weight."""
    weight = spread_nll_weight(nll_weight, config, tokens, cu_seqlens)
    if weight is None or mask is None:
        return mask
    expect_mask(mask, tokens)
    return mask.bool() | (weight != 0)


def check_kl_input(config: LossConfig, ref_logprob: Tensor | None, kl: Tensor | None) -> None:
    """Check that the KL estimator gets the input that it reads, and not the other one."""
    wanted, unread = ("ref_logprob", ref_logprob), ("kl", kl)
    if config.kl_estimator in VOCABULARY_KL:
        wanted, unread = unread, wanted
    estimator = f"kl_estimator={config.kl_estimator!r}"
    if config.has_kl and wanted[1] is None:
        raise ValueError(f"beta={config.beta} with {estimator} needs {wanted[0]}, got None")
    if unread[1] is not None:
        raise ValueError(f"{estimator} reads {wanted[0]}, got {unread[0]}")


def compute_loss(
    prepared: PreparedLoss, logprob: Tensor, entropy: Tensor | None, kl: Tensor | None
) -> LossOutput:
    """Compute the loss and its metrics from prepared inputs and the policy's statistics.

        loss = Σ weight·(policy + beta·KL) - entropy_weight·Σ entropy - Σ nll_weight·logprob

    kl: over the vocabulary; None where it is estimated from ref_logprob.
    """
    config, sequences, inputs = prepared
    dtype, unmasked_logprob = inputs.weight.dtype, logprob
    logprob = zero_masked(sequences, logprob, dtype)
    entropy, kl = (None if x is None else zero_masked(sequences, x, dtype) for x in (entropy, kl))
    ratios = policy_ratios(logprob, inputs, config, sequences)
    policy = config.policy_term.value(ratios)
    kept = kept_by_filters(ratios, entropy, config)
    for keep in kept.values():
        policy = torch.where(keep | policy.isnan(), policy, 0.0)  # a NaN stays visible
    if ratios.importance is not None and not config.policy_term.applies_importance:
        policy = policy * ratios.importance
    if config.kl_cov is not None:
        policy = policy + covariance_penalty(ratios, config)
    if inputs.ref_logprob is not None:
        estimator = SAMPLED_KL[config.kl_estimator]
        kl = estimator.value(logprob - inputs.ref_logprob, ratios.log_ratio)

    term = policy
    if config.has_kl:
        assert kl is not None
        term = policy + config.beta * kl
    loss = (inputs.weight * term).sum()
    if inputs.entropy_weight is not None:
        assert entropy is not None
        bonus = entropy
        if "top_entropy" in kept:
            # Scaled so that the mean over all tokens is the mean over the chosen ones.
            chosen = kept["top_entropy"]
            scale = sequences.keep.sum().to(dtype) / chosen.sum().clamp(min=1)
            bonus = torch.where(chosen, entropy, 0.0) * scale
        loss = loss - inputs.entropy_weight * bonus.sum()
    metrics = {"policy_loss": (inputs.weight * policy).sum()}
    if inputs.nll_weight is not None:
        has_term = inputs.nll_weight != 0
        nll = torch.where(has_term, -unmasked_logprob.to(dtype), 0.0)
        metrics["nll_loss"] = (inputs.nll_weight * nll).sum()
        loss = loss + metrics["nll_loss"]
    metrics |= token_metrics(ratios, entropy, kl, kept, config)
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def zero_masked(sequences: Sequences, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Set masked tokens to 0 before any arithmetic: NaN times 0 is NaN, in the gradient too."""
    return x.to(dtype).masked_fill(sequences.drop, 0.0)
