"""The intended differences between TRL's losses and ours, with their reasons."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.trl_parity.options import GMPO_READS, PLAIN, Options
from benchmarks.trl_parity.oracle import GMPO
from grpo_kernels.integrations.trl_loss import WINDOW


class Difference(NamedTuple):
    """A condition under which some parts of TRL's result and of ours differ on purpose."""

    where: str
    reason: str
    parts: frozenset[str]  # "loss", "gradient", "metrics" (all of them), or a metric's name
    applies: Callable[[Options], bool]
    example: dict[str, Any]  # options that show it, beside the plain ones


VALUES = frozenset({"loss", "gradient"})
CLIP_MEANS = frozenset(
    (*(f"clip_ratio/{name}_mean" for name in ("low", "high", "region")), "cispo_clip_ratio")
)
SEQUENCE_METRICS = frozenset(
    (
        *("clip_ratio/low_min", "vespo/phi_seq_mean"),
        *(f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")),
    )
)


def weighs_sequences(options: Options) -> bool:
    return (options["vllm_importance_sampling_mode"] or "").startswith("sequence")


DIFFERENCES = (
    Difference(
        "use_bias_correction_kl at importance_sampling_level=sequence",
        "our `k3_corrected` weighs a token by its own ratio, which makes its gradient that of the "
        "reverse KL; TRL weighs it by the ratio of the sequence",
        VALUES | {"kl", "policy_loss"},
        lambda options: (
            options["importance_sampling_level"] == "sequence" and options["use_bias_correction_kl"]
        ),
        {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "beta": 0.04},
    ),
    Difference(
        "log-ratios beyond ±20",
        "ours saturate there, with gradient 0, so that no finite input overflows",
        VALUES | {"metrics"},
        lambda options: options["batch"] == "far",
        {"batch": "far"},
    ),
    Difference(
        "a sampler's log-prob that is NaN",
        "our loss becomes NaN, so that the error is seen; TRL gives the token the weight 1",
        VALUES | {"metrics"},
        lambda options: options["batch"] == "not scored",
        {"batch": "not scored", "vllm_importance_sampling_mode": "token_truncate"},
    ),
    Difference(
        "GMPO with top_entropy_quantile",
        "our filter drops a token's policy term; TRL's drops it from the geometric mean",
        VALUES,
        lambda options: options["loss_type"] == GMPO and options["top_entropy_quantile"] != 1,
        {"loss_type": GMPO, "top_entropy_quantile": 0.2},
    ),
    Difference(
        "GMPO with the options that its trainer in TRL does not read",
        "our entropy bonus, filters and importance weights work with every surrogate",
        VALUES,
        lambda options: (
            options["loss_type"] == GMPO
            and any(options[name] != PLAIN[name] for name in PLAIN.keys() - set(GMPO_READS))
        ),
        {"loss_type": GMPO, "entropy_coef": 0.01},
    ),
    Difference(
        "GMPO with a sequence that is masked throughout",
        "it counts 0 in ours; TRL adds -A, of ratio 1, to the value but not to the gradient",
        frozenset({"loss"}),
        lambda options: options["loss_type"] == GMPO and options["batch"] == "one sequence masked",
        {"loss_type": GMPO, "batch": "one sequence masked"},
    ),
    Difference(
        "metrics of one value per sequence, with a sequence that is masked throughout",
        "our metrics leave it out; TRL's metrics over sequences count it",
        CLIP_MEANS | SEQUENCE_METRICS,
        lambda options: (
            options["batch"] == "one sequence masked"
            and (
                options["importance_sampling_level"] == "sequence"
                or options["loss_type"] == "vespo"
                or weighs_sequences(options)
            )
        ),
        {
            "importance_sampling_level": "sequence",
            "vllm_importance_sampling_mode": "sequence_truncate",
            "batch": "one sequence masked",
        },
    ),
    Difference(
        "clip metrics at importance_sampling_level=sequence, with an advantage per token",
        "ours stay means over sequences; TRL's become means over tokens",
        CLIP_MEANS,
        lambda options: (
            options["importance_sampling_level"] == "sequence"
            and options["batch"] == "an advantage per token"
        ),
        {"importance_sampling_level": "sequence", "batch": "an advantage per token"},
    ),
    Difference(
        "vespo/phi_seq_mean, with an advantage per token",
        "ours stays a mean over sequences; TRL's becomes one over tokens",
        frozenset({"vespo/phi_seq_mean"}),
        lambda options: options["batch"] == "an advantage per token",
        {"loss_type": "vespo", "batch": "an advantage per token"},
    ),
    Difference(
        "policy_loss with beta",
        "ours is the policy term alone; TRL's includes the KL term",
        frozenset({"policy_loss"}),
        lambda options: options["beta"] != 0,
        {"entropy_coef": 0.01, "beta": 0.04},
    ),
    Difference(
        "policy_loss with gradient_accumulation_steps",
        "ours adds up over the accumulated batches, as the loss does; TRL's is not divided by "
        "their number, except in the losses that divide by the generated tokens",
        frozenset({"policy_loss"}),
        lambda options: (
            options["gradient_accumulation_steps"] > 1 and options["loss_type"] not in WINDOW
        ),
        {"entropy_coef": 0.01, "gradient_accumulation_steps": 4},
    ),
    Difference(
        "sampling/importance_sampling_ratio/mean of sequence_truncate and sequence_mask",
        "ours is a mean over tokens; TRL's is one over sequences",
        frozenset({"sampling/importance_sampling_ratio/mean"}),
        weighs_sequences,
        {"vllm_importance_sampling_mode": "sequence_truncate"},
    ),
)


def excluded_parts(options: Options) -> frozenset[str]:
    """Return the parts of a result that are not compared under these options."""
    return frozenset().union(
        *(difference.parts for difference in DIFFERENCES if difference.applies(options))
    )


def is_excluded(part: str, parts: frozenset[str]) -> bool:
    """Return whether a part of a result is among those of a Difference."""
    return part in parts or ("metrics" in parts and part not in VALUES)
