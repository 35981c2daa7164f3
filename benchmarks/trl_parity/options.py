"""TRL's settings of the loss, all of them together: OPTIONS is what `parity` combines.

How they read in ours is in `grpo_kernels.integrations.trl_loss`.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.trl_parity.oracle import GMPO, Batch
from grpo_kernels.integrations.trl_loss import WINDOW, loss_config, loss_denominators

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
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
GMPO_READS = ("loss_type", "beta", "top_entropy_quantile", "gradient_accumulation_steps", "batch")


def settings_of(options: Options) -> dict[str, Any]:
    """The settings of a GRPOConfig."""
    settings = FIXED | EPSILONS.get(options["loss_type"], {})
    settings |= {"use_vllm": options["vllm_importance_sampling_mode"] is not None}
    settings |= {"vllm_importance_sampling_correction": True}
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


def keywords_of(settings: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """The keywords of `policy_loss` beside the config: tensors and denominators."""
    keywords = {"mask": batch.mask, "old_logprob": batch.old_logprob}
    if settings["beta"] != 0:
        keywords["ref_logprob"] = batch.ref_logprob
    if settings["use_vllm"]:
        keywords["sampling_logprob"] = batch.sampling_logprob
    steps = settings["gradient_accumulation_steps"]
    if steps == 1 and settings["loss_type"] not in WINDOW:
        return keywords  # the aggregation's own denominator
    return keywords | loss_denominators(
        loss_config(settings),
        batch.mask,
        loss_type=settings["loss_type"],
        generated_tokens=batch.generated_tokens,
        batches=settings["steps_per_generation"],
        accumulated=steps,
    )
