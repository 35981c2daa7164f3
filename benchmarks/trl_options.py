"""TRL's settings of the loss, and how they read in ours.

`fields_of` and `keywords_of` are the dictionary: from the settings of a GRPOConfig to a LossConfig
and the keywords of `policy_loss`. OPTIONS is what `parity` combines.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.trl_oracle import GMPO, Batch

Options = Mapping[str, Any]

# Settings by TRL's names, and the batch. The first value of each is the plain one.
OPTIONS: dict[str, tuple] = {
    "loss_type": (
        *("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
        GMPO,
    ),
    "importance_sampling_level": ("token", "sequence"),
    "beta": (0.0, 0.04),
    "use_bias_correction_kl": (False, True),
    "delta": (None, 4.0),
    "entropy_coef": (0.0, 0.01),
    "top_entropy_quantile": (1.0, 0.2),
    "off_policy_mask_threshold": (None, 0.1),
    "vllm_importance_sampling_mode": (
        *(None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    ),
    "gradient_accumulation_steps": (1, 4),
    "batch": ("ragged", "on-policy", "one sequence masked", "an advantage per token"),
}
PLAIN = {name: values[0] for name, values in OPTIONS.items()}
FIXED = {
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "max_completion_length": 9,
    "steps_per_generation": 2,
    "vllm_importance_sampling_clip_min": 0.5,
    "vllm_importance_sampling_clip_max": 3.0,
}
EPSILONS = {"cispo": {"epsilon_high": 5.0}, GMPO: {"epsilon": 0.4, "epsilon_high": 0.3}}
OBJECTIVES = {
    "grpo": {"aggregation": "sequence_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "fixed_length"},
    "dapo": {"aggregation": "token_mean"},
    "luspo": {"aggregation": "sequence_sum_mean"},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo", "aggregation": "sequence_mean"},
    "vespo": {"surrogate": "vespo", "aggregation": "token_mean"},
    GMPO: {"surrogate": "gmpo", "aggregation": "sequence_mean"},
}
# What TRL calls the numbers that a surrogate reads, and what they are called here.
NUMBERS = {
    "clip": {"epsilon": "epsilon_low", "epsilon_high": "epsilon_high", "delta": "delta"},
    "cispo": {"epsilon_high": "ratio_cap"},
    "sapo": {"sapo_temperature_pos": "tau_positive", "sapo_temperature_neg": "tau_negative"},
    "vespo": {
        "vespo_k_pos": "k_positive",
        "vespo_lambda_pos": "lambda_positive",
        "vespo_k_neg": "k_negative",
        "vespo_lambda_neg": "lambda_negative",
    },
    "gmpo": {"epsilon": "epsilon_low", "epsilon_high": "epsilon_high"},
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
WINDOW = ("dapo", "cispo", "vespo")  # divided by the tokens of all that was generated at once
GMPO_READS = ("loss_type", "beta", "top_entropy_quantile", "gradient_accumulation_steps", "batch")


def settings_of(options: Options) -> dict[str, Any]:
    """The settings of a GRPOConfig."""
    settings = FIXED | EPSILONS.get(options["loss_type"], {})
    settings |= {"use_vllm": options["vllm_importance_sampling_mode"] is not None}
    return settings | {name: value for name, value in options.items() if name != "batch"}


def combinations() -> Iterator[dict[str, Any]]:
    """Every combination of OPTIONS that TRL has and reads."""
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        if _exists(options):
            yield options


def _exists(options: Options) -> bool:
    loss_type, mode = options["loss_type"], options["vllm_importance_sampling_mode"]
    if options["delta"] is not None and loss_type not in CLIPPED:
        return False
    if options["use_bias_correction_kl"] and options["beta"] == 0:
        return False
    if mode is not None and options["batch"] == "on-policy":
        return False  # TRL makes the old log-probs wherever a sampler has its own
    if loss_type == "vespo":
        return mode is None or mode.startswith("token")  # TRL's trainer refuses the others
    if loss_type == GMPO:
        unread = OPTIONS.keys() - set(GMPO_READS)
        one_each = options["batch"] != "an advantage per token"
        return one_each and all(options[name] == PLAIN[name] for name in unread)
    return True


def fields_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the LossConfig that means what these settings of a GRPOConfig do."""
    loss_type, quantile = settings["loss_type"], settings["top_entropy_quantile"]
    corrected = settings["use_bias_correction_kl"] and loss_type != GMPO
    fields = OBJECTIVES[loss_type] | {
        "beta": settings["beta"],
        "kl_estimator": "k3_corrected" if corrected else "k3",
        "entropy_coef": settings["entropy_coef"],
        "top_entropy": None if quantile == 1 else quantile,
        "off_policy_threshold": settings["off_policy_mask_threshold"],
    }
    if loss_type not in ("vespo", GMPO):  # whose ratios are of whole sequences anyway
        fields["ratio_level"] = settings["importance_sampling_level"]
    names = NUMBERS[fields.get("surrogate", "clip")]
    fields |= {ours: settings[name] for name, ours in names.items() if name in settings}
    if loss_type == "dr_grpo":
        fields["max_completion_length"] = settings["max_completion_length"]
    if settings["use_vllm"]:
        level, mode = settings["vllm_importance_sampling_mode"].split("_")
        fields |= {"importance_level": level, "importance_mode": mode}
        fields["importance_floor"] = settings["vllm_importance_sampling_clip_min"]
        fields["importance_cap"] = settings["vllm_importance_sampling_clip_max"]
    return fields


def keywords_of(settings: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """The keywords of `policy_loss` beside the config: tensors and denominators."""
    keywords = {"mask": batch.mask, "old_logprob": batch.old_logprob}
    if settings["beta"] != 0:
        keywords["ref_logprob"] = batch.ref_logprob
    if settings["use_vllm"]:
        keywords["sampling_logprob"] = batch.sampling_logprob
    steps = settings["gradient_accumulation_steps"]
    sequences, tokens = len(batch.mask), int(batch.mask.sum())
    denominators = {
        "sequence_mean": sequences,
        "token_mean": tokens,
        "fixed_length": sequences * settings["max_completion_length"],
        "sequence_sum_mean": sequences,
    }
    if settings["loss_type"] in WINDOW:
        denominator = batch.generated_tokens / settings["steps_per_generation"]
    elif steps > 1:
        denominator = denominators[OBJECTIVES[settings["loss_type"]]["aggregation"]]
    else:
        return keywords  # the aggregation's own denominator
    return keywords | {"normalizer": denominator * steps, "entropy_normalizer": tokens * steps}
