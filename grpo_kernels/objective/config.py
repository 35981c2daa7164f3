"""LossConfig: the settings of the loss, validated at construction, and the named objectives."""

import ast
import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast, get_args, get_origin

import torch
from torch import Tensor

from ..validation import expect_choice, expect_number, nearest, suggest_keywords
from .rejection import RejectionRule
from .surrogates import SURROGATES, Surrogate


def _setting(default: Any, *, read_with: str | None = None, **bounds: float) -> Any:
    """Declare a number with bounds for `expect_number`.

    read_with: the setting that must be given for this one to be read.
    """
    return field(default=default, metadata={"bounds": bounds, "read_with": read_with})


class _Rule(NamedTuple):
    """Values that a setting may have."""

    choices: tuple[str, ...]  # () for a number
    optional: bool
    integer: bool
    bounds: dict[str, float]


class _Objectives(type):
    """Class of LossConfig, to suggest the named constructor that was probably meant."""

    if not TYPE_CHECKING:  # a type checker would allow every name

        def __getattr__(cls, name):
            names = [] if name.startswith("_") else [*LossConfig.objectives(), "distillation"]
            near = nearest(name, names)
            hint = f"; did you mean LossConfig.{near[0]}()?" if near else ""
            raise AttributeError(f"LossConfig has no attribute {name!r}{hint}")


class _Derived(metaclass=_Objectives):
    """Attributes that LossConfig computes at construction. They are not settings."""

    policy_term: Surrogate
    rejection_rules: tuple[RejectionRule, ...]
    has_kl: bool  # beta is not 0
    has_entropy_bonus: bool  # entropy_coef is not 0
    has_nll: bool  # nll_coef is not 0
    text: str  # the other settings, and the names of the coefficients
    coefficient_names: tuple[str, ...]  # the settings that are real numbers, without those of None
    coefficients: Tensor  # their values, fp64, on the CPU


@dataclass(frozen=True, kw_only=True)
class LossConfig(_Derived):
    """Settings of the loss: a point in the space that GRPO and its relatives span.

        loss = aggregate(policy term + beta·KL) - entropy_coef·mean entropy

    Each named constructor, such as `LossConfig.dapo()`, sets what its paper sets; its keywords
    override. Below, r is the probability ratio of the policy to the old policy, A the advantage.
    A policy term is minimised.

    Raises:
        ValueError, TypeError: at construction: a setting out of range, one that nothing reads, or
            a contradiction. The message names the setting, what is allowed and what was passed.
    """

    surrogate: Literal[
        "clip", "ratio", "gmpo", "cispo", "sapo", "dppo", "reinforce", "vespo", "ipo", "dppo_kl",
        "dro", "topr", "rollout_is",
    ] = "clip"  # fmt: skip
    """Policy term of a token. clip: -min(r·A, clip(r)·A). ratio: -r·A. gmpo: -A times the geometric
    mean of the sequence's bounded ratios. cispo: -A·logprob weighted by the clipped r, a constant.
    sapo: -A times a sigmoid of r. dppo: as cispo, and 0 where the token's probability has moved too
    far. reinforce: -A·logprob. vespo: -A·logprob weighted by a function of the sequence's r, a
    constant. ipo: -r·A with the ratio to the sampler, 0 where the token's probability is far from
    the sampler's, plus a penalty on the squared log-ratio. dppo_kl: as dppo, with a bound on a
    binary KL. dro: -A·logprob plus a penalty on the squared log-ratio. topr: -A·logprob, weighted
    by the capped r where A <= 0. rollout_is: -A·logprob weighted by the ratio to the sampler, and 0
    where that is out of bounds."""
    ratio_level: Literal["token", "sequence", "sequence_token"] = "token"
    """Level of the ratio r. token: each token has its own. sequence: the geometric mean of the
    sequence's token ratios. sequence_token: its value, with the gradient of the token's own."""
    epsilon_low: float = _setting(0.2, at_least=0)
    """Lower bound. clip, rollout_is: of r, at 1 - this. gmpo: of the log-ratio, at -this, where
    A < 0. dppo: of the change of the token's probability, at -this, where A <= 0. ipo: of that
    change, whatever A is. dppo_kl: of the binary KL, where A <= 0 and the probability fell."""
    epsilon_high: float = _setting(0.2, at_least=0)
    """Upper bound. clip, rollout_is: of r, at 1 + this. gmpo: of the log-ratio, where A > 0. dppo:
    of the change of the token's probability, where A > 0. ipo: of that change, whatever A is.
    dppo_kl: of the binary KL, where A > 0 and the probability rose."""
    delta: float | None = _setting(None, above=0)
    """clip: cap of r before the minimum is taken, above 1 + epsilon_high. It bounds the loss where
    A < 0 (arXiv:2505.07291)."""
    dual_clip: float | None = _setting(None, above=1)
    """clip: the loss is at most this times |A| where A < 0 (arXiv:1912.09729). It is the same bound
    as delta, but it may lie below 1 + epsilon_high."""
    ratio_cap: float | None = _setting(None, above=0)
    """cispo, dppo, dppo_kl, topr: cap of r."""
    ratio_floor: float = _setting(0.0, at_least=0)
    """cispo: lower bound of r, at most ratio_cap."""
    tau_positive: float = _setting(1.0, above=0)
    """sapo: steepness of the sigmoid where A > 0."""
    tau_negative: float = _setting(1.05, above=0)
    """sapo: steepness of the sigmoid where A <= 0."""
    k_positive: float = _setting(2.0, at_least=0)
    """vespo: k in the weight e^λ w^k e^(-λw) of the sequence's ratio w, where A >= 0."""
    lambda_positive: float = _setting(3.0, at_least=0)
    """vespo: λ in that weight where A >= 0."""
    k_negative: float = _setting(3.0, at_least=0)
    """vespo: k in that weight where A < 0."""
    lambda_negative: float = _setting(2.0, at_least=0)
    """vespo: λ in that weight where A < 0."""
    sampler_penalty: float = _setting(1e-3, at_least=0)
    """ipo: coefficient of (logprob - sampling_logprob)², on every token."""
    proximal_coef: float = _setting(0.1, at_least=0)
    """dro: coefficient of (logprob - old_logprob)²/2, on every token."""
    beta: float = _setting(0.0, at_least=0)
    """Coefficient of the KL to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+", "k3_corrected", "abs", "forward", "reverse"] = (
        "k3"
    )
    """Estimate of that KL on the sampled tokens, or the exact sum over the vocabulary: "forward" is
    KL(reference‖policy), "reverse" is KL(policy‖reference). Choosing an estimator is choosing a
    gradient; the docstring of policy_loss has the table."""
    entropy_coef: float = _setting(0.0)
    """Coefficient of the entropy bonus. mini-GRPO writes the same bonus with a negative coefficient
    in front of the entropy."""
    nll_coef: float = _setting(0.0, at_least=0)
    """Coefficient of the mean of -logprob, weighted by nll_weight, which names the tokens: correct
    completions (VAPO, arXiv:2504.05118), or observations of an environment (ECHO)."""
    aggregation: Literal[
        "sequence_mean", "token_mean", "fixed_length", "sequence_sum_mean", "prompt_mean"
    ] = "sequence_mean"
    """From token terms to one number. sequence_mean: mean over sequences of their token means.
    token_mean: mean over tokens. fixed_length: sum over (sequences · max_completion_length).
    sequence_sum_mean: mean over sequences of their token sums. prompt_mean: mean over prompts of
    the mean over all tokens of their completions (ScaleRL, 2510.13786). A sequence or a prompt
    without an unmasked token counts as 0."""
    max_completion_length: int | None = _setting(None, at_least=1)
    """fixed_length: number of tokens in the denominator for each sequence."""
    completions_per_prompt: int | None = _setting(None, at_least=1)
    """prompt_mean: number of sequences, one after the other, that belong to one prompt."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """Treatment of the importance weight exp(old - sampling log-prob) of a policy term, where the
    sampler's log-probs are given. truncate: bound it to [importance_floor, importance_cap]. mask:
    set it to 0 outside."""
    importance_level: Literal["token", "sequence"] = "token"
    """Importance weight of each token, or the product over its sequence."""
    importance_floor: float | None = _setting(None, at_least=0)
    """Lower bound of the importance weight; None is no bound."""
    importance_cap: float | None = _setting(2.0, above=0)
    """Upper bound of the importance weight; None is no bound."""
    off_policy_threshold: float | None = _setting(None)
    """Drop the policy term of sequences with A < 0 whose mean of sampling - policy log-prob is
    above this; without the sampler's log-probs, the old ones count (DeepSeek-V3.2)."""
    top_entropy: float | None = _setting(None, above=0, at_most=1)
    """Fraction of the tokens, those of highest entropy, that the policy term and the entropy bonus
    act on (arXiv:2506.01939). The quantile is over the unmasked tokens of the call: a micro-batch
    has its own."""
    clip_cov: float | None = _setting(None, above=0, at_most=1)
    """Clip-Cov: drop the policy term of at most this fraction of the tokens, drawn at random from
    those that are not clipped and whose (A - mean A)·(logprob - mean logprob) is between
    clip_cov_low and clip_cov_high (arXiv:2505.22617). Means are over the call."""
    clip_cov_low: float = _setting(1.0, read_with="clip_cov")
    """Clip-Cov: lower end of that interval."""
    clip_cov_high: float = _setting(5.0, read_with="clip_cov")
    """Clip-Cov: upper end of that interval."""
    kl_cov: float | None = _setting(None, above=0, at_most=1)
    """KL-Cov: fraction of the tokens, where that covariance is largest, that get a penalty
    kl_cov_coef·|logprob - old| (arXiv:2505.22617)."""
    kl_cov_coef: float = _setting(1.0, at_least=0, read_with="kl_cov")
    """KL-Cov: coefficient of the penalty."""
    second_moment: float | None = _setting(None, above=0)
    """M2PO: drop the policy term of the tokens with the largest (logprob - old_logprob)², until the
    mean of that over the other unmasked tokens of the call is at most this (arXiv:2510.01161)."""
    rejection: tuple[str, ...] = ()
    """Drop the policy term of tokens whose estimate of KL(sampler‖old policy) is out of bounds, as
    verl's rollout_rs. Each entry is LEVEL_ESTIMATOR=BOUND and all must hold. Levels are token and,
    for whole sequences, seq_sum, seq_mean and seq_max. Estimators are k1, k2 and k3. A bound is an
    upper one, such as seq_mean_k3=0.01. The bounds of k1 are those of the ratio sampler / policy:
    token_k1=0.5:2; one alone, U, stands for 1/U:U."""

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if rule.choices:
                expect_choice(name, value, rule.choices)
            elif value is not None or not rule.optional:
                expect_number(name, value, integer=rule.integer, **rule.bounds)
                plain = int if isinstance(value, numbers.Integral) else float
                # A NumPy number has another repr, which `_decode` would not read.
                object.__setattr__(self, name, plain(cast(Any, value)))
        is_list = isinstance(self.rejection, tuple | list)
        if not is_list or not all(isinstance(text, str) for text in self.rejection):
            got = f"got {type(self.rejection).__name__} {self.rejection!r}"
            raise TypeError(f"rejection must be a tuple of texts, {got}")
        object.__setattr__(self, "rejection", tuple(self.rejection))
        object.__setattr__(self, "rejection_rules", tuple(map(RejectionRule.parse, self.rejection)))
        self._check_unread_settings()
        self._check_combination()
        reads = _READS[self.surrogate]
        term = SURROGATES[self.surrogate](*(getattr(self, name) for name in reads))
        given = tuple(name for name in _COEFFICIENTS if getattr(self, name) is not None)
        others = {name: getattr(self, name) for name in _OTHERS}
        with torch.inference_mode(False):  # made inside, autograd could not use it outside
            values = [getattr(self, name) for name in given]
            coefficients = torch.tensor(values, dtype=torch.float64, device="cpu")
        derived = {
            "policy_term": term,
            "has_kl": self.beta != 0,
            "has_entropy_bonus": self.entropy_coef != 0,
            "has_nll": self.nll_coef != 0,
            "text": repr((others, given)),
            "coefficient_names": given,
            "coefficients": coefficients,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check_unread_settings(self) -> None:
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if value == setting.default:
                continue
            readers = [key for key, reads in _READS.items() if name in reads]
            if readers and self.surrogate not in readers:
                raise ValueError(
                    f"{name} is read by surrogate={' or '.join(map(repr, readers))} only, "
                    f"got {value!r} with surrogate={self.surrogate!r}"
                )
            compares_old = name == "rejection" or name.startswith("importance_")
            if compares_old and SURROGATES[self.surrogate].relative_to_sampler:
                raise ValueError(
                    f"{name} is not read by surrogate={self.surrogate!r}, whose ratio is the one "
                    f"to the sampler, got {value!r}"
                )
            needed = setting.metadata.get("read_with")
            if needed is not None and getattr(self, needed) is None:
                raise ValueError(f"{name} is read with {needed} only, got {value!r} without")
        for name, reader in _OF_AGGREGATION.items():
            if getattr(self, name) is not None and self.aggregation != reader:
                raise ValueError(
                    f"{name} is read by aggregation={reader!r} only, "
                    f"got {getattr(self, name)!r} with aggregation={self.aggregation!r}"
                )

    def _check_combination(self) -> None:
        surrogate, term = self.surrogate, SURROGATES[self.surrogate]
        for name, kind in _READS[surrogate].items():
            if kind is float and getattr(self, name) is None:
                raise ValueError(f"surrogate={surrogate!r} needs {name}, got None")
        for name, reader in _OF_AGGREGATION.items():
            if self.aggregation == reader and getattr(self, name) is None:
                raise ValueError(f"aggregation={reader!r} needs {name}, got None")
        if self.delta is not None:
            expect_number("delta", self.delta, above=1 + self.epsilon_high)
        if self.ratio_cap is not None and self.ratio_floor > self.ratio_cap:
            raise ValueError(
                f"ratio_floor must be at most ratio_cap={self.ratio_cap}, got {self.ratio_floor}"
            )
        if self.ratio_level != "token" and term.only_token_ratio:
            raise ValueError(
                f"surrogate={surrogate!r} {term.only_token_ratio}: ratio_level must be 'token', "
                f"got {self.ratio_level!r}"
            )
        if term.applies_importance and self.importance_level != "token":
            raise ValueError(
                f"surrogate={surrogate!r} sums the sampler's log-ratios itself: importance_level "
                f"must be 'token', got {self.importance_level!r}"
            )
        floor, cap = self.importance_floor, self.importance_cap
        if floor is not None and cap is not None and floor >= cap:
            raise ValueError(
                f"importance_floor must be less than importance_cap={cap}, got {floor}"
            )
        if self.importance_mode == "mask" and floor is None and cap is None:
            raise ValueError("importance_mode='mask' needs importance_floor or importance_cap")
        if self.clip_cov is not None and self.kl_cov is not None:
            raise ValueError("clip_cov and kl_cov both prevent entropy collapse: set only one")
        if self.clip_cov_low >= self.clip_cov_high:
            raise ValueError(
                f"clip_cov_low must be less than clip_cov_high={self.clip_cov_high}, "
                f"got {self.clip_cov_low}"
            )

    @staticmethod
    def decode(text: str, coefficients: Tensor) -> "LossConfig":
        """Return the config that has this text and these coefficients.

        An operator of torch.library takes a config in these two parts. The coefficients are a
        tensor, so that they may change in every step without another compilation.
        """
        return _decode(text, tuple(coefficients.tolist()))

    @staticmethod
    def objectives() -> "dict[str, Callable[..., LossConfig]]":
        """Return the named constructors by name: all but `distillation`, which needs a teacher.

        The first line of a constructor's docstring describes it in one sentence.
        """
        names = [name for name, x in vars(LossConfig).items() if isinstance(x, classmethod)]
        return {name: getattr(LossConfig, name) for name in names if name != "distillation"}

    @property
    def needs_sampling(self) -> bool:
        """Tell if the sampler's log-probs must be given."""
        return (
            self.importance_mode == "mask"
            or self.policy_term.relative_to_sampler
            or len(self.rejection) > 0
        )

    @property
    def reads_sequences(self) -> bool:
        """Tell if sequences matter, with a sampler's log-probs: packed input needs cu_seqlens."""
        return (
            self.ratio_level != "token"
            or self.aggregation != "token_mean"
            or not self.policy_term.token_level
            or self.importance_level == "sequence"
            or self.off_policy_threshold is not None
            or any(rule.level != "token" for rule in self.rejection_rules)
        )

    @classmethod
    def grpo(cls, **overrides: Any) -> Self:
        """Clipped ratio, averaged over each sequence, then over sequences (arXiv:2402.03300).

        beta is 0 here, 0.04 in DeepSeekMath, 0.001 in R1 (2501.12948).
        """
        return cls(**overrides)

    @classmethod
    def one_shot(cls, **overrides: Any) -> Self:
        """GRPO with an entropy bonus of 0.001, to learn from one example (arXiv:2504.20571)."""
        return cls(**{"entropy_coef": 0.001, **overrides})

    @classmethod
    def bnpo(cls, **overrides: Any) -> Self:
        """GRPO averaged over the tokens of the local batch, as TRL's loss of that name."""
        return cls(**{"aggregation": "token_mean", **overrides})

    @classmethod
    def dr_grpo(cls, max_completion_length: int, **overrides: Any) -> Self:
        """GRPO divided by a constant length, so that length has no weight (arXiv:2503.20783).

        The paper's advantages are not divided by their standard deviation either.
        """
        fixed = {"aggregation": "fixed_length", "max_completion_length": max_completion_length}
        return cls(**{**fixed, **overrides})

    @classmethod
    def dapo(cls, **overrides: Any) -> Self:
        """GRPO with a higher upper clip, averaged over tokens (arXiv:2503.14476).

        The paper's mean is over the global batch: pass its token count as `normalizer`.
        """
        return cls(**{"epsilon_high": 0.28, "aggregation": "token_mean", **overrides})

    @classmethod
    def gspo(cls, **overrides: Any) -> Self:
        """GRPO with the ratio of the sequence, clipped tightly (arXiv:2507.18071)."""
        defaults = {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
        return cls(**{**defaults, **overrides})

    @classmethod
    def gspo_token(cls, **overrides: Any) -> Self:
        """GSPO in the form that takes an advantage per token (arXiv:2507.18071, section 4.3)."""
        return cls.gspo(**{"ratio_level": "sequence_token", **overrides})

    @classmethod
    def luspo(cls, **overrides: Any) -> Self:
        """GSPO with each sequence weighted by its length (arXiv:2602.05261)."""
        defaults = {"epsilon_low": 2e-3, "epsilon_high": 2.5e-3}
        return cls.gspo(**{**defaults, "aggregation": "sequence_sum_mean", **overrides})

    @classmethod
    def gmpo(cls, **overrides: Any) -> Self:
        """Geometric mean of the sequence's ratios, each bounded to e^±0.4 (arXiv:2507.20673)."""
        return cls(**{"surrogate": "gmpo", "epsilon_low": 0.4, "epsilon_high": 0.4, **overrides})

    @classmethod
    def cispo(cls, **overrides: Any) -> Self:
        """Policy gradient weighted by the ratio, capped at 5 (arXiv:2506.13585, 2510.13786)."""
        defaults = {"surrogate": "cispo", "ratio_cap": 5.0, "aggregation": "token_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def sapo(cls, **overrides: Any) -> Self:
        """Sigmoid of the ratio, a clip that closes softly (arXiv:2511.20347)."""
        return cls(**{"surrogate": "sapo", **overrides})

    @classmethod
    def vespo(cls, **overrides: Any) -> Self:
        """Policy gradient weighted by a function of the sequence's ratio (arXiv:2602.10693)."""
        return cls(**{"surrogate": "vespo", "aggregation": "token_mean", **overrides})

    @classmethod
    def reinforce(cls, **overrides: Any) -> Self:
        """Policy gradient without a ratio, summed over each sequence (Williams, 1992)."""
        defaults = {"surrogate": "reinforce", "aggregation": "sequence_sum_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def gpg(cls, **overrides: Any) -> Self:
        """Policy gradient without a ratio, averaged over tokens (arXiv:2504.02546)."""
        return cls.reinforce(**{"aggregation": "token_mean", **overrides})

    @classmethod
    def two_sided(cls, **overrides: Any) -> Self:
        """GRPO with the ratio capped at 4 where the advantage is negative (arXiv:2505.07291)."""
        return cls(**{"delta": 4.0, **overrides})

    @classmethod
    def icepop(cls, **overrides: Any) -> Self:
        """BNPO without the tokens whose importance weight is outside [0.5, 5] (IcePop, 2025).

        It needs `sampling_logprob` (Ling team).
        """
        weight = {"importance_mode": "mask", "importance_floor": 0.5, "importance_cap": 5.0}
        return cls(**{**weight, "aggregation": "token_mean", **overrides})

    @classmethod
    def clip_covariance(cls, **overrides: Any) -> Self:
        """BNPO without some of the tokens that collapse the entropy (arXiv:2505.22617)."""
        return cls(**{"clip_cov": 2e-4, "aggregation": "token_mean", **overrides})

    @classmethod
    def kl_covariance(cls, **overrides: Any) -> Self:
        """Plain ratio with a penalty on the tokens that collapse the entropy (arXiv:2505.22617)."""
        defaults = {"surrogate": "ratio", "kl_cov": 2e-4, "aggregation": "token_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def m2po(cls, **overrides: Any) -> Self:
        """Plain ratio without the largest log-ratios, for old samples (arXiv:2510.01161)."""
        defaults = {"surrogate": "ratio", "second_moment": 0.04, "aggregation": "token_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def dppo(cls, **overrides: Any) -> Self:
        """CISPO without tokens whose probability moved by more than 0.15 (arXiv:2602.04879)."""
        bounds = {"epsilon_low": 0.15, "epsilon_high": 0.15, "ratio_cap": 20.0}
        return cls(**{"surrogate": "dppo", **bounds, "aggregation": "token_mean", **overrides})

    @classmethod
    def ipo(cls, **overrides: Any) -> Self:
        """Ratio to the sampler, off where a probability differs by over 0.1 (prime-rl's IPO).

        It adds 1e-3·(logprob - sampling_logprob)² on every token, and averages over tokens. It
        needs `sampling_logprob` and does not read `old_logprob`.
        """
        bounds = {"epsilon_low": 0.1, "epsilon_high": 0.1}
        return cls(**{"surrogate": "ipo", **bounds, "aggregation": "token_mean", **overrides})

    @classmethod
    def dppo_kl(cls, **overrides: Any) -> Self:
        """CISPO without tokens whose binary KL is above 0.05 (arXiv:2602.04879)."""
        bounds = {"epsilon_low": 0.05, "epsilon_high": 0.05, "ratio_cap": 20.0}
        return cls(**{"surrogate": "dppo_kl", **bounds, "aggregation": "token_mean", **overrides})

    @classmethod
    def topr(cls, **overrides: Any) -> Self:
        """Policy gradient, weighted by the ratio up to 1 where A <= 0 (arXiv:2503.14286).

        r is the token's; the paper's is the sequence's: ratio_level="sequence".
        """
        defaults = {"surrogate": "topr", "ratio_cap": 1.0, "aggregation": "token_mean"}
        return cls(**{**defaults, **overrides})

    @classmethod
    def rollout_is(cls, **overrides: Any) -> Self:
        """Policy gradient weighted by the ratio to the sampler within bounds (arXiv:2602.15763).

        It needs `sampling_logprob` and does not read `old_logprob`.
        """
        return cls(**{"surrogate": "rollout_is", "aggregation": "token_mean", **overrides})

    @classmethod
    def dro(cls, **overrides: Any) -> Self:
        """Policy gradient with a squared log-ratio of 0.05 (arXiv:2405.19107, 2501.12599)."""
        return cls(**{"surrogate": "dro", "aggregation": "token_mean", **overrides})

    @classmethod
    def distillation(cls, **overrides: Any) -> Self:
        """Clipped ratio plus the KL to a teacher over the whole vocabulary, averaged over tokens.

            loss = mean over tokens of (-min(r·A, clip(r)·A) + beta·KL(policy‖teacher)), beta = 1

        The teacher is the reference policy of `grpo_loss` (`ref_logits`) and of `linear_grpo_loss`
        (`ref_hidden` and `ref_weight`, of any width); the KL and the policy term take one pass. On
        completions of the policy itself r is 1 and nothing is clipped. With advantages of 0 loss
        and gradient are those of `linear_distillation_loss` with divergence "reverse".

        beta weighs the teacher against the rewards; kl_estimator="forward" is KL(teacher‖policy).
        On-policy distillation with rewards: Agarwal et al., 2023 (arXiv:2306.13649, section 3.2);
        the reverse KL: Gu et al., 2023 (arXiv:2306.08543).
        """
        teacher = {"beta": 1.0, "kl_estimator": "reverse"}
        return cls(**{**teacher, "aggregation": "token_mean", **overrides})


LossConfig.__init__ = suggest_keywords(LossConfig.__init__)


@functools.lru_cache(maxsize=256)  # bounded: a schedule may change a coefficient in every step
def _decode(text: str, coefficients: tuple[float, ...]) -> LossConfig:
    others, given = ast.literal_eval(text)
    values: dict[str, Any] = dict.fromkeys(_COEFFICIENTS)
    values |= dict(zip(given, coefficients, strict=True))
    return LossConfig(**others, **values)


class CompiledConfig:
    """A LossConfig inside a compiled function: its coefficients are tensors, inputs of the graph.

    torch.compile makes a number that it reads from an object a constant, and compiles again for
    another value. The other settings, and which coefficients are None or 0, are constants.
    """

    def __init__(self, config: LossConfig) -> None:
        values = dict(zip(config.coefficient_names, config.coefficients.unbind(), strict=True))
        for name in _COEFFICIENTS:
            setattr(self, name, values.get(name))
        for name in (*_OTHERS, *_PASSED_ON):
            setattr(self, name, getattr(config, name))
        reads = _READS[config.surrogate]
        self.policy_term = SURROGATES[config.surrogate](*(values.get(name) for name in reads))


def in_compiled_code(config: LossConfig) -> LossConfig:
    """Return the config; where torch.compile traces, with its coefficients as tensors."""
    return cast(LossConfig, CompiledConfig(config)) if torch.compiler.is_compiling() else config


# Made here because torch.compile cannot read annotations or the fields of a class.
_RULES = {
    setting.name: _Rule(
        get_args(setting.type) if get_origin(setting.type) is Literal else (),
        NoneType in get_args(setting.type),
        int in get_args(setting.type),
        setting.metadata.get("bounds", {}),
    )
    for setting in fields(LossConfig)
    if get_origin(setting.type) is not tuple
}
_COEFFICIENTS = tuple(
    name for name, rule in _RULES.items() if not rule.choices and not rule.integer
)
_OTHERS = tuple(setting.name for setting in fields(LossConfig) if setting.name not in _COEFFICIENTS)
_PASSED_ON = (
    "rejection_rules", "has_kl", "has_entropy_bonus", "has_nll", "text", "coefficients",
    "needs_sampling", "reads_sequences",
)  # fmt: skip
_OF_AGGREGATION = {"max_completion_length": "fixed_length", "completions_per_prompt": "prompt_mean"}
_READS = {
    name: {setting.name: setting.type for setting in fields(surrogate)}
    for name, surrogate in SURROGATES.items()
}


def expect_config(config: object) -> None:
    if not isinstance(config, LossConfig):
        near = nearest(config, LossConfig.objectives()) if isinstance(config, str) else []
        hint = f" {config!r}; did you mean LossConfig.{near[0]}()?" if near else ""
        raise TypeError(f"config must be a LossConfig, got {type(config).__name__}{hint}")
