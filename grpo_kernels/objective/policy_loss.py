"""The policy objective on per-token tensors: its settings, the loss, its metrics.

Everything here works on tensors with one number per token, so it costs next to nothing beside the
logits. A variant of the objective is a value of LossConfig: an entry in a table of surrogates.py,
sampled_kl.py, token_filters.py or aggregation.py; one of a single token has its grad in
kernels/row_math.py too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from .aggregation import entropy_divisor, token_weights
from .config import LossConfig
from .kl_estimators import VOCABULARY_KL
from .metrics import token_metrics
from .sequences import Sequences, spread_to_tokens
from .token_gradients import LossInputs, token_losses, weighted_sum

__all__ = [
    "LossConfig",
    "LossOutput",
    "PreparedLoss",
    "compute_loss",
    "policy_loss",
    "prepare_loss_inputs",
]


class LossOutput(NamedTuple):
    """The differentiable 0-dim loss, and detached 0-dim metrics of its dtype, by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


class PreparedLoss(NamedTuple):
    """Checked and masked inputs of a loss: all but the policy's own statistics."""

    config: LossConfig
    sequences: Sequences
    inputs: LossInputs


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
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LossOutput:
    """The policy-gradient loss of GRPO and its relatives, from per-token tensors.

        r      = exp(logprob - old), or at sequence level exp(mean of logprob - old)
        policy = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), or what `config.surrogate`
                 says, 0 on tokens that a filter of `config` leaves out, times the weight of
                 exp(old - sampling) where sampling is given
        loss   = aggregate(policy + beta·KL) - entropy_coef · mean over tokens of the entropy

    At one inner iteration old equals logprob, every r is 1, and with group-normalised advantages
    the loss VALUE is about 0. Its gradient is not: it is the policy gradient -A·∇logprob.

    Choosing a KL estimator is choosing a gradient. With d = logprob - ref_logprob, on-policy and
    in expectation:

        k1            d                 gradient 0: useless in a loss
        k2            d²/2              of KL(policy‖ref), exactly; the value is biased
        k3            e^(-d) - 1 + d    of KL(ref‖policy), the forward KL; large where policy << ref
        k3_corrected  r·(k3)            of KL(policy‖ref), exactly, and off-policy too
        k3+           k3                of KL(policy‖ref), exactly, as k2
        abs           |d|               of neither
        forward, reverse                of KL(ref‖policy), KL(policy‖ref), over the vocabulary

    Log-ratios saturate at ±20 before exp, with gradient 0 beyond; k3 only where d < -20, because
    e^(-d) vanishes on the other side. A masked token has no effect and gets gradient 0, whatever
    it holds. With every token masked the loss is 0.

    Args:
        logprob: [B, T], or packed [N]. The other per-token tensors have its shape.
        advantages: [B] or [B, T]; packed: [N], or with `cu_seqlens` [sequences]; where both fit,
            they are of tokens.
        mask: bool or 0/1; None counts every token.
        old_logprob: under the policy that the clip is relative to; None: logprob.detach().
        ref_logprob: under the reference, for the estimators on sampled tokens.
        entropy: of each token's distribution, in nats; for the bonus and the metric.
        kl: over the vocabulary, for kl_estimator "forward" and "reverse".
        sampling_logprob: as the sampler computed them; weights the policy term, without gradient.
        config: the objective; see LossConfig.
        normalizer: > 0, replaces the denominator of the aggregation: a number of sequences
            ("sequence_mean", "sequence_sum_mean"), of tokens ("token_mean"), or of sequences ·
            max_completion_length. With the whole batch's, micro-batches and ranks add up to
            exactly one big batch, unless a filter ranks the tokens of the call. A 0-dim tensor
            holding 0 divides by 1. Where gradients are averaged over ranks, as DDP and FSDP do, it
            is the count of all ranks divided by their number.
        entropy_normalizer: likewise the number of tokens that the mean entropy divides by, all of
            them also where `config.top_entropy` averages over some. None follows `normalizer` under
            "token_mean"; elsewhere the two must be given together.
        cu_seqlens: [sequences + 1] int, the boundaries of packed sequences. Packed input needs it
            wherever sequences matter: see `LossConfig.reads_sequences`.

    Returns:
        LossOutput, fp32 (fp64 for fp64 logprob), differentiable in `logprob`, `entropy` and `kl`.
        Metrics: policy_loss, aggregated as the loss; ratio_mean and ratio_max of r;
        clip_ratio/low_mean (A < 0, and the policy ratios beyond the lower bound of the surrogate),
        /high_mean (A > 0, beyond the upper), /region_mean (either), and where sequences are known
        /low_min and /high_max over sequences; approx_kl, of old from the policy (r - 1 - ln r);
        num_tokens; kl and entropy where their inputs are given; cispo_clip_ratio,
        vespo/phi_seq_mean and filters/kept_mean where there is such a thing. Where sampling_logprob
        is given, sampling/sampling_logp_difference/mean and /max of |old - sampling|, and
        sampling/importance_sampling_ratio/min, /mean and /max of the weight. Means are over
        unmasked tokens, those of a ratio_level "sequence" over sequences that have one. The names
        are TRL's where TRL has one.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong, or an input that `config` needs is
            missing, or one that it does not read is given.

    Schulman et al., 2017 (arXiv:1707.06347); Shao et al., 2024 (arXiv:2402.03300).
    """
    checks.check_type("config", config, LossConfig)
    checks.check_logprob(logprob)
    checks.check_per_token("entropy", entropy, logprob.shape)
    checks.check_per_token("kl", kl, logprob.shape)
    checks.check_entropy_input(config, entropy)
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    checks.check_kl_input(config.kl_estimator, config.beta, over_vocabulary, ref_logprob, kl)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    prepared = prepare_loss_inputs(
        logprob.shape,
        dtype,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        sampling_logprob=sampling_logprob,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        cu_seqlens=cu_seqlens,
    )
    return compute_loss(prepared, logprob, entropy, kl)


def compute_loss(
    prepared: PreparedLoss, logprob: Tensor, entropy: Tensor | None, kl: Tensor | None
) -> LossOutput:
    """Compute the loss and its metrics from prepared inputs and the policy's statistics."""
    config, sequences, loss_inputs = prepared
    dtype = loss_inputs.weight.dtype
    logprob, entropy, kl = (zero_masked(sequences, x, dtype) for x in (logprob, entropy, kl))
    loss_inputs = loss_inputs.with_old(logprob)
    terms = token_losses(logprob, entropy, kl, loss_inputs, config, sequences)
    loss = weighted_sum(terms, loss_inputs, config)
    metrics = {"policy_loss": (loss_inputs.weight * terms.policy).sum()}
    metrics |= token_metrics(terms, entropy, loss_inputs, config)
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def prepare_loss_inputs(
    shape: torch.Size,
    dtype: torch.dtype,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    config: LossConfig,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PreparedLoss:
    """Check the arguments of `policy_loss` and set masked tokens to 0."""
    checks.check_cu_seqlens(cu_seqlens, shape, config)
    checks.check_advantages(advantages, shape, cu_seqlens)
    checks.expect_mask(mask, shape)
    logprobs = {
        "old_logprob": old_logprob,
        "ref_logprob": ref_logprob,
        "sampling_logprob": sampling_logprob,
    }
    for name, each in logprobs.items():
        checks.check_per_token(name, each, shape)
    checks.check_sampling_input(config.importance_mode, sampling_logprob)
    checks.check_normalizers(
        normalizer, entropy_normalizer, config.entropy_coef, config.aggregation
    )
    if mask is None:
        keep = torch.ones(shape, dtype=torch.bool, device=advantages.device)
    else:
        keep = mask.bool()
    sequences = Sequences(keep, cu_seqlens)
    weight = token_weights(sequences, config, normalizer, dtype)
    entropy_weight = None
    if config.entropy_coef != 0:
        divisor = entropy_divisor(keep, normalizer, entropy_normalizer)
        entropy_weight = (weight.new_full((), config.entropy_coef) / divisor).to(dtype)
    advantage = spread_to_tokens(advantages.detach(), shape, cu_seqlens)
    loss_inputs = LossInputs(
        zero_masked(sequences, advantage, dtype),
        weight,
        entropy_weight,
        **{
            name: zero_masked(sequences, logprob, dtype, detach=True)
            for name, logprob in logprobs.items()
        },
    )
    return PreparedLoss(config, sequences, loss_inputs)


def zero_masked(
    sequences: Sequences, x: Tensor | None, dtype: torch.dtype, *, detach: bool = False
) -> Tensor | None:
    """x where kept, else 0. Before any arithmetic: NaN times a mask is NaN, in the gradient too."""
    if x is None:
        return None
    return (x.detach() if detach else x).to(dtype).masked_fill(sequences.drop, 0.0)
