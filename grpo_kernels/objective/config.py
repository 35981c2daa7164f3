"""LossConfig: what the loss is, as a value."""

import ast
import functools
import numbers
from dataclasses import dataclass
from typing import Any, Self

from .. import checks
from .aggregation import AGGREGATIONS
from .kl_estimators import SAMPLED_KL, VOCABULARY_KL
from .surrogates import RATIO_LEVELS, SURROGATES
from .token_selection import IMPORTANCE_LEVELS, IMPORTANCE_MODES


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the loss is: a point in the space that GRPO and its relatives span.

    Below, r is the ratio of the policy to the old one, A the advantage, s() a stop-gradient. Each
    named constructor is a paper's point; its keywords override.

    Attributes:
        surrogate: the policy term. "clip": -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A).
            "ratio": -r A. "cispo": -s(min(r, ratio_cap)) A logprob. "sapo": -A (4/τ) σ(τ (r - 1)).
            "dppo": that of "cispo", and 0 where the token's probability has already ratios by more
            than epsilon_high (A > 0) or epsilon_low (A < 0) the way A pushes it. "reinforce":
            -A logprob. "vespo": -s(φ(w)) A logprob, w the probability ratio of the sequence, φ(w) =
            e^λ w^k e^(-λw). "gmpo": -A times the geometric mean of the sequence's ratios, each
            bounded by e^epsilon_high (A > 0) or e^-epsilon_low (A < 0).
        ratio_level: "token"; "sequence": the geometric mean of the sequence's token ratios;
            "sequence_token": its value, with the gradient of the token's own.
        epsilon_low, epsilon_high: >= 0; bounds, as `surrogate` reads them.
        delta: > 1 + epsilon_high, or None; caps the ratio of "clip" before the minimum is taken,
            which bounds the loss where the advantage is negative (arXiv:2505.07291).
        dual_clip: > 1, or None; where A < 0 the loss of "clip" is at most dual_clip·|A|
            (arXiv:1912.09729). The same bound as delta, but it may lie below 1 + epsilon_high.
        ratio_cap: > 0; of "cispo" and "dppo", and only there.
        tau_positive, tau_negative: > 0; τ of "sapo" where A > 0, and elsewhere.
        k_positive, lambda_positive, k_negative, lambda_negative: >= 0; k and λ of "vespo" where
            A >= 0, and elsewhere.
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
        importance_mode, importance_level, importance_floor, importance_cap: the weight
            w = exp(old - sampling) of the policy term where the sampler's log-probabilities are
            given: "truncate" to [floor, cap], or "mask", 0 outside; of each "token", or of the
            "sequence", of its sum. None: no bound. In "vespo" it is part of the sequence's ratio.
        off_policy_threshold: or None; a sequence with A < 0 whose mean of sampling - logprob (old -
            logprob without a sampler's) is above it has no policy term (DeepSeek-V3.2).
        top_entropy: in (0, 1], or None; the policy term and the entropy bonus act on this fraction
            of the tokens, those of the highest entropy (arXiv:2506.01939).
        clip_cov: in (0, 1], or None; at most this fraction of the tokens, drawn from PyTorch's
            generator among those not clipped whose (A - mean A)(logprob - mean logprob) is in
            (clip_cov_low, clip_cov_high), has no policy term (Clip-Cov, arXiv:2505.22617).
        kl_cov: in (0, 1], or None; the fraction of the tokens where that covariance is largest
            gets a term kl_cov_coef·|logprob - old| (KL-Cov, same paper). Quantiles, means and
            fractions are over the unmasked tokens of the call: a micro-batch has its own.

    Raises:
        ValueError, TypeError: at construction, naming the setting, what is allowed and what came.
    """

    surrogate: str = "clip"
    ratio_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    ratio_cap: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "sequence_mean"
    max_completion_length: int | None = None
    importance_mode: str = "truncate"
    importance_level: str = "token"
    importance_floor: float | None = None
    importance_cap: float | None = 2.0
    off_policy_threshold: float | None = None
    top_entropy: float | None = None
    clip_cov: float | None = None
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov: float | None = None
    kl_cov_coef: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            checks.expect_choice(name, getattr(self, name), choices)
        checks.check_numbers(self)
        checks.check_max_completion_length(self.max_completion_length, self.aggregation)
        checks.check_combination(self)
        for name, value in vars(self).items():  # NumPy's numbers, for one, have another repr
            if isinstance(value, numbers.Integral):
                object.__setattr__(self, name, int(value))
            elif isinstance(value, numbers.Real):
                object.__setattr__(self, name, float(value))
        # The text is made here because torch.compile cannot format a symbolic float.
        settings = {name: value for name, value in vars(self).items() if name != "entropy_coef"}
        object.__setattr__(self, "_text", repr(settings))

    def encode(self) -> str:
        """Return the settings as text, for an operator's schema; all but entropy_coef.

        The entropy coefficient reaches an operator as a tensor, so that it may change in every
        step without another compilation.
        """
        return self._text  # type: ignore[attr-defined]

    @staticmethod
    @functools.lru_cache(maxsize=256)  # bounded: a schedule may change a coefficient in every step
    def decode(text: str) -> "LossConfig":
        """Return the config whose `encode` gave this text."""
        return LossConfig(**ast.literal_eval(text))

    @property
    def reads_sequences(self) -> bool:
        """Whether it matters which tokens make a sequence, with a sampler's log-probs given."""
        return (
            self.ratio_level != "token"
            or self.aggregation != "token_mean"
            or SURROGATES[self.surrogate].of_sequences
            or self.importance_level == "sequence"
            or self.off_policy_threshold is not None
        )

    @classmethod
    def grpo(cls, **overrides: Any) -> Self:
        """-min(r A, clip(r) A), the mean over sequences of their token means (arXiv:2402.03300).

        beta is 0 here, 0.04 in DeepSeekMath, 0.001 in R1 (2501.12948).
        """
        return cls(**overrides)

    @classmethod
    def one_shot(cls, **overrides: Any) -> Self:
        """GRPO - 0.001 · the mean entropy: learns from a single example (arXiv:2504.20571)."""
        return cls(**{"entropy_coef": 0.001, **overrides})

    @classmethod
    def bnpo(cls, **overrides: Any) -> Self:
        """GRPO averaged over the tokens of the local batch, as TRL's loss of that name."""
        return cls(**{"aggregation": "token_mean", **overrides})

    @classmethod
    def dr_grpo(cls, max_completion_length: int, **overrides: Any) -> Self:
        """Divided by a constant, so that length has no weight (arXiv:2503.20783).

        The paper's advantages are not divided by their standard deviation either.
        """
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
        """GRPO of exp(mean of logprob - old), clipped tightly (arXiv:2507.18071)."""
        defaults = {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
        return cls(**{**defaults, **overrides})

    @classmethod
    def gspo_token(cls, **overrides: Any) -> Self:
        """GSPO in the form that takes an advantage per token (arXiv:2507.18071, 4.3)."""
        return cls.gspo(**{"ratio_level": "sequence_token", **overrides})

    @classmethod
    def luspo(cls, **overrides: Any) -> Self:
        """GSPO with each sequence weighted by its length (arXiv:2602.05261)."""
        defaults = {"epsilon_low": 2e-3, "epsilon_high": 2.5e-3}
        return cls.gspo(**{**defaults, "aggregation": "sequence_sum_mean", **overrides})

    @classmethod
    def gmpo(cls, **overrides: Any) -> Self:
        """-A · geometric mean of the ratios, bounded to e^±0.4 (arXiv:2507.20673)."""
        return cls(**{"surrogate": "gmpo", "epsilon_low": 0.4, "epsilon_high": 0.4, **overrides})

    @classmethod
    def cispo(cls, **overrides: Any) -> Self:
        """-s(min(r, 5)) A logprob: no token loses its gradient (arXiv:2506.13585, 2510.13786)."""
        defaults = {"surrogate": "cispo", "ratio_cap": 5.0, "aggregation": "token_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def sapo(cls, **overrides: Any) -> Self:
        """-A (4/τ) σ(τ (r - 1)): a gate that closes softly (arXiv:2511.20347)."""
        return cls(**{"surrogate": "sapo", **overrides})

    @classmethod
    def vespo(cls, **overrides: Any) -> Self:
        """-s(φ(w)) A logprob, w the ratio of whole sequences (arXiv:2602.10693)."""
        return cls(**{"surrogate": "vespo", "aggregation": "token_mean", **overrides})

    @classmethod
    def reinforce(cls, **overrides: Any) -> Self:
        """-A logprob, summed over a sequence: the policy gradient itself (Williams, 1992)."""
        defaults = {"surrogate": "reinforce", "aggregation": "sequence_sum_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def gpg(cls, **overrides: Any) -> Self:
        """-A logprob, averaged over tokens (arXiv:2504.02546)."""
        return cls.reinforce(**{"aggregation": "token_mean", **overrides})

    @classmethod
    def two_sided(cls, **overrides: Any) -> Self:
        """GRPO with r capped at 4 where A < 0 too (arXiv:2505.07291)."""
        return cls(**{"delta": 4.0, **overrides})

    @classmethod
    def icepop(cls, **overrides: Any) -> Self:
        """Tokens that sampler and trainer see too differently, w outside [0.5, 5], drop out.

        Averaged over tokens; it needs `sampling_logprob` (IcePop, Ling team, 2025).
        """
        weight = {"importance_mode": "mask", "importance_floor": 0.5, "importance_cap": 5.0}
        return cls(**{**weight, "aggregation": "token_mean", **overrides})

    @classmethod
    def clip_covariance(cls, **overrides: Any) -> Self:
        """GRPO without some of the tokens that make the entropy collapse (arXiv:2505.22617)."""
        return cls(**{"clip_cov": 2e-4, "aggregation": "token_mean", **overrides})

    @classmethod
    def kl_covariance(cls, **overrides: Any) -> Self:
        """-r A, with a penalty on the tokens that make the entropy collapse (2505.22617)."""
        defaults = {"surrogate": "ratio", "kl_cov": 2e-4, "aggregation": "token_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def dppo(cls, **overrides: Any) -> Self:
        """-s(min(r, 20)) A logprob where the probability ratios by less than 0.15 (2602.04879)."""
        bounds = {"epsilon_low": 0.15, "epsilon_high": 0.15, "ratio_cap": 20.0}
        return cls(**{"surrogate": "dppo", **bounds, "aggregation": "token_mean", **overrides})


_CHOICES = {
    "surrogate": SURROGATES,
    "ratio_level": RATIO_LEVELS,
    "kl_estimator": [*SAMPLED_KL, *VOCABULARY_KL],
    "aggregation": AGGREGATIONS,
    "importance_mode": IMPORTANCE_MODES,
    "importance_level": IMPORTANCE_LEVELS,
}
