"""The policy objective on per-token tensors: its settings, the loss, its metrics.

Everything here works on tensors with one number per token, so it costs next to nothing beside the
logits. A variant of the objective is a value of LossConfig: an entry in a table of terms.py or
aggregation.py.
"""

import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from . import checks
from .aggregation import (
    AGGREGATIONS,
    entropy_divisor,
    sequence_sum,
    spread_to_tokens,
    token_weights,
)
from .metrics import token_metrics
from .terms import (
    RATIO_LEVELS,
    SAMPLED_KL,
    SURROGATES,
    VOCABULARY_KL,
    Constants,
    saturated_exp,
    token_terms,
    weighted_sum,
)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the loss is: a point in the space that GRPO and its relatives span.

    Attributes:
        surrogate: "clip", the clipped surrogate of PPO.
        ratio_level: "token", or "sequence": the geometric mean of the sequence's token ratios.
        epsilon_low, epsilon_high: >= 0; the ratio is clipped to [1 - low, 1 + high].
        delta: > 1 + epsilon_high, or None; caps the ratio before the minimum is taken, which
            bounds the loss where the advantage is negative (arXiv:2505.07291).
        dual_clip: > 1, or None; where A < 0 the loss is at most dual_clip·|A| (arXiv:1912.09729).
            It is the same bound as delta, but may lie below 1 + epsilon_high.
        beta: >= 0; coefficient of the KL to the reference.
        kl_estimator: "k1", "k2", "k3", "k3+", "k3_corrected" or "abs" on the sampled tokens, or
            "forward" or "reverse" over the vocabulary; `policy_loss` says which to choose.
        entropy_coef: coefficient of the entropy bonus; mini-GRPO writes the same bonus with a
            negative coefficient in front of the entropy.
        aggregation: how token terms become one number. "sequence_mean": the mean over sequences
            of their token means; "token_mean": the mean over tokens; "fixed_length": the sum over
            (sequences · max_completion_length); "sequence_sum_mean": the mean over sequences of
            their token sums. A sequence without an unmasked token counts, as 0.
        max_completion_length: tokens; for "fixed_length", and only there.
        importance_cap: > 0; bound of the weight exp(old - sampling), where the sampler's
            log-probabilities are given.

    Raises:
        ValueError, TypeError: at construction, naming the setting, what is allowed and what came.
    """

    surrogate: str = "clip"
    ratio_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "sequence_mean"
    max_completion_length: int | None = None
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        checks.check_choice("surrogate", self.surrogate, SURROGATES)
        checks.check_choice("ratio_level", self.ratio_level, RATIO_LEVELS)
        checks.check_choice("kl_estimator", self.kl_estimator, [*SAMPLED_KL, *VOCABULARY_KL])
        checks.check_choice("aggregation", self.aggregation, AGGREGATIONS)
        checks.check_number("epsilon_low", self.epsilon_low, at_least=0)
        checks.check_number("epsilon_high", self.epsilon_high, at_least=0)
        if self.delta is not None:
            checks.check_number("delta", self.delta, above=1 + self.epsilon_high)
        if self.dual_clip is not None:
            checks.check_number("dual_clip", self.dual_clip, above=1)
        checks.check_number("beta", self.beta, at_least=0)
        checks.check_number("entropy_coef", self.entropy_coef)
        checks.check_number("importance_cap", self.importance_cap, above=0)
        checks.check_max_completion_length(self.max_completion_length, self.aggregation)
        for name, value in vars(self).items():  # NumPy's numbers, for one, have another repr
            if isinstance(value, numbers.Integral):
                object.__setattr__(self, name, int(value))
            elif isinstance(value, numbers.Real):
                object.__setattr__(self, name, float(value))

    @classmethod
    def grpo(cls, **overrides: Any) -> Self:
        """beta is 0 here, 0.04 in DeepSeekMath (arXiv:2402.03300), 0.001 in R1 (2501.12948)."""
        return cls(**overrides)

    @classmethod
    def bnpo(cls, **overrides: Any) -> Self:
        """GRPO averaged over the tokens of the local batch, as TRL's loss of that name."""
        return cls(**{"aggregation": "token_mean", **overrides})

    @classmethod
    def dr_grpo(cls, max_completion_length: int, **overrides: Any) -> Self:
        """Divided by a constant, so that length has no weight (arXiv:2503.20783)."""
        fixed = {"aggregation": "fixed_length", "max_completion_length": max_completion_length}
        return cls(**{**fixed, **overrides})

    @classmethod
    def dapo(cls, **overrides: Any) -> Self:
        """More room to rise than to fall, averaged over tokens (arXiv:2503.14476).

        The paper's mean is over the global batch: pass its token count as `normalizer`.
        """
        return cls(**{"epsilon_high": 0.28, "aggregation": "token_mean", **overrides})

    @classmethod
    def gspo(cls, **overrides: Any) -> Self:
        """Ratios of whole sequences, clipped tightly (arXiv:2507.18071)."""
        defaults = {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
        return cls(**{**defaults, **overrides})


class LossOutput(NamedTuple):
    """The differentiable 0-dim loss, and detached 0-dim metrics of its dtype, by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


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
    """The clipped policy-gradient loss of GRPO and its relatives, from per-token tensors.

        r      = exp(logprob - old), or at sequence level exp(mean of logprob - old)
        policy = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)
                 times min(exp(old - sampling), importance_cap) where sampling is given
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
        advantages: [B] or [B, T]; packed: [N], or with `cu_seqlens` [sequences].
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
            exactly one big batch. A 0-dim tensor holding 0 divides by 1.
        entropy_normalizer: likewise the number of tokens that the mean entropy divides by. None
            follows `normalizer` under "token_mean"; elsewhere the two must be given together.
        cu_seqlens: [sequences + 1] int, the boundaries of packed sequences. Packed input needs it
            wherever sequences matter: all but token-level ratios with "token_mean".

    Returns:
        LossOutput, fp32 (fp64 for fp64 logprob), differentiable in `logprob`, `entropy` and `kl`.
        Metrics: policy_loss, aggregated as the loss; ratio_mean and ratio_max of r;
        clip_ratio/low_mean (r < 1 - epsilon_low and A < 0), /high_mean (r > 1 + epsilon_high and
        A > 0), /region_mean (either); approx_kl, of old from the policy (r - 1 - ln r);
        num_tokens; kl and entropy where their inputs are given. Where sampling_logprob is,
        sampling/sampling_logp_difference/mean and /max of |old - sampling|, and
        sampling/importance_sampling_ratio/min, /mean and /max of the weight. Means are over
        unmasked tokens. The names are TRL's where TRL has one.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong, or an input that `config` needs is
            missing, or one that it does not read is given.

    Schulman et al., 2017 (arXiv:1707.06347); Shao et al., 2024 (arXiv:2402.03300).
    """
    checks.check_logprob(logprob)
    checks.check_per_token("entropy", entropy, logprob.shape)
    checks.check_per_token("kl", kl, logprob.shape)
    checks.check_entropy_input(config.entropy_coef, entropy)
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    checks.check_kl_input(config.kl_estimator, config.beta, over_vocabulary, ref_logprob, kl)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    keep, constants = loss_constants(
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
    return loss_of(logprob, entropy, kl, keep, constants, config, cu_seqlens)


def loss_of(
    logprob: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    keep: Tensor,
    constants: Constants,
    config: LossConfig,
    cu_seqlens: Tensor | None,
) -> LossOutput:
    """`policy_loss` after `loss_constants` has checked and prepared all but the statistics."""
    dtype = constants.weight.dtype
    logprob, entropy, kl = (_select(keep, each, dtype) for each in (logprob, entropy, kl))
    constants = constants.with_old(logprob)
    log_ratio = logprob - constants.old_logprob
    if config.ratio_level == "sequence":
        lengths = sequence_sum(keep.to(dtype), cu_seqlens).clamp(min=1)
        ratio = saturated_exp(sequence_sum(log_ratio, cu_seqlens) / lengths)
    else:
        ratio = saturated_exp(log_ratio)

    policy, kl = token_terms(logprob, kl, ratio, constants, config)
    loss = weighted_sum(policy, kl, entropy, constants, config)
    metrics = {"policy_loss": (constants.weight * policy).sum()}
    metrics |= token_metrics(ratio, log_ratio, kl, entropy, keep, constants, config)
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def loss_constants(
    shape: torch.Size,
    dtype: torch.dtype,
    advantages: Tensor,
    *,
    mask: Tensor | None,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    sampling_logprob: Tensor | None,
    config: LossConfig,
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Constants]:
    """The tokens that count, bool, and the arguments of `policy_loss`, checked, 0 elsewhere."""
    checks.check_cu_seqlens(cu_seqlens, shape, config.ratio_level, config.aggregation)
    checks.check_advantages(advantages, shape, cu_seqlens)
    checks.check_mask(mask, shape)
    logprobs = {
        "old_logprob": old_logprob,
        "ref_logprob": ref_logprob,
        "sampling_logprob": sampling_logprob,
    }
    for name, each in logprobs.items():
        checks.check_per_token(name, each, shape)
    checks.check_normalizers(
        normalizer, entropy_normalizer, config.entropy_coef, config.aggregation
    )
    if mask is None:
        keep = torch.ones(shape, dtype=torch.bool, device=advantages.device)
    else:
        keep = mask.bool()
    weight = token_weights(keep, config, normalizer, cu_seqlens, dtype)
    entropy_weight = None
    if config.entropy_coef != 0:
        divisor = entropy_divisor(keep, normalizer, entropy_normalizer)
        entropy_weight = (weight.new_full((), config.entropy_coef) / divisor).to(dtype)
    advantage = spread_to_tokens(advantages.detach(), shape, cu_seqlens)
    return keep, Constants(
        _select(keep, advantage, dtype),
        weight,
        entropy_weight,
        **{name: _select(keep, each, dtype, detach=True) for name, each in logprobs.items()},
    )


def _select(
    keep: Tensor, x: Tensor | None, dtype: torch.dtype, *, detach: bool = False
) -> Tensor | None:
    """x where kept, else 0. Before any arithmetic: NaN times a mask is NaN, in the gradient too."""
    if x is None:
        return None
    return torch.where(keep, (x.detach() if detach else x).to(dtype), 0.0)
