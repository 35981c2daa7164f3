"""The combinations of TRL's settings that are compared.

`grpo_kernels.integrations.trl_loss` translates them into a LossConfig.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.trl_parity.oracle import GMPO
from grpo_kernels.integrations.trl_loss import OBJECTIVES

Options = Mapping[str, Any]

# Settings by TRL's names, and the batch; the first value of each is the plain one.
OPTIONS: dict[str, tuple] = {
    "loss_type": tuple(OBJECTIVES),
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
GMPO_READS = ("loss_type", "beta", "top_entropy_quantile", "gradient_accumulation_steps", "batch")


def settings_of(options: Options) -> dict[str, Any]:
    """Return the settings of a GRPOConfig."""
    settings = FIXED | EPSILONS.get(options["loss_type"], {})
    settings |= {"use_vllm": options["vllm_importance_sampling_mode"] is not None}
    settings |= {"vllm_importance_sampling_correction": True}
    return settings | {name: value for name, value in options.items() if name != "batch"}


def combinations() -> Iterator[dict[str, Any]]:
    """Yield every combination of OPTIONS that TRL accepts and reads."""
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        loss_type, mode = options["loss_type"], options["vllm_importance_sampling_mode"]
        is_read = [
            options["delta"] is None or "delta" in OBJECTIVES[loss_type],
            options["beta"] != 0 or not options["use_bias_correction_kl"],
            # TRL computes the old log-probs wherever a sampler has its own.
            mode is None or options["batch"] != "on-policy",
        ]
        if loss_type == "vespo":  # TRL's trainer refuses weights of sequences
            is_read.append(mode is None or mode.startswith("token"))
        if loss_type == GMPO:
            is_read.append(options["batch"] != "an advantage per token")
            is_read += [options[name] == PLAIN[name] for name in OPTIONS.keys() - set(GMPO_READS)]
        if all(is_read):
            yield options
