"""prime-rl's loss and head, by ours.

    [trainer.loss]
    type = "custom"
    import_path = "grpo_kernels.integrations.prime_rl.loss"
    kwargs = { objective = "cispo", ratio_cap = 4.0 }

The contract is that of prime-rl 0.8, August 2026: `LossInputs`, `LossOutputs` and `compute_loss` in
its `prime_rl/trainer/rl/loss.py`, and `FusedOutputLinear` in `models/layers/lm_head.py`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..objective.policy_loss import LossConfig, policy_loss
from ..ops.linear_token_stats import linear_token_stats


def loss(inputs: Any, *, objective: str = "grpo", **settings: Any) -> Any:
    """The loss of one sample for prime-rl's `[trainer.loss] type = "custom"`.

    The ratio is that of the trainer to the inference policy. prime-rl adds up samples and divides
    by the tokens of the global batch, so that every objective is averaged over tokens.

    Args:
        inputs: prime-rl's LossInputs, whose tensors are [seq]. Its loss_weights, >= 0, scale the
            policy term of their tokens.
        objective: a named constructor of LossConfig, such as "grpo", "dapo", "gspo", "cispo".
        settings: fields of LossConfig that replace what the constructor sets. With beta > 0 the
            reference is `ref_logprobs`, which prime-rl has where an algorithm asks for it.

    Returns:
        prime-rl's LossOutputs: the 0-dim sum over tokens, and the metrics of `policy_loss` with
        prime-rl's is_masked, is_masked_low and is_masked_high: the share of tokens that are clipped
        or dropped.

    Raises:
        ValueError, TypeError: no such objective or setting, one that averages otherwise, or one
            that needs what LossInputs does not have, such as entropies; weights where more than
            the policy term would need them.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    config = _config(objective, **settings)
    advantages = inputs.advantages
    if inputs.loss_weights is not None:
        if config.beta != 0 or config.clip_cov is not None or config.kl_cov is not None:
            raise ValueError(
                "beta, clip_cov and kl_cov must be off with loss_weights, which would not scale "
                "what they add, and change which tokens they choose"
            )
        # A term is as large as its advantage, of which only the sign decides on clips.
        advantages = advantages * inputs.loss_weights.clamp(min=1e-30)
    ref_logprob = None if config.beta == 0 else inputs.ref_logprobs
    total, metrics = policy_loss(
        inputs.trainer_logprobs[None],
        advantages[None],
        mask=inputs.loss_mask[None],
        old_logprob=inputs.inference_logprobs[None],
        ref_logprob=None if ref_logprob is None else ref_logprob[None],
        config=config,
        normalizer=1,
    )
    del metrics["policy_loss"]  # a sum, where prime-rl averages what it is told
    names = {"is_masked": "region_mean", "is_masked_low": "low_mean", "is_masked_high": "high_mean"}
    metrics |= {name: metrics[f"clip_ratio/{ours}"] for name, ours in names.items()}
    return LossOutputs(loss=total, metrics=metrics)


class FusedOutputLinear(torch.nn.Linear):
    """prime-rl's head that returns log-probs and entropies, with the entropy's gradient.

    Put in the place of `prime_rl.trainer.models.layers.lm_head.FusedOutputLinear` before the model
    is set up. `chunk_size`, in tokens, is not read: there a chunk is tiled over the vocabulary
    too, and here it would be so many tokens wide; about 1 GiB of workspace is planned for instead.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int | None) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"logprobs", "entropy"}, both [B, L], fp32, differentiable.

        Args:
            hidden_states: [B, L, H]; labels: [B, L], what each of them predicts.
            temperature: [B, L], > 0.

        Raises:
            ValueError: labels or temperature is None; TypeError, ValueError: as
                `linear_token_stats`.
        """
        for name, given in {"labels": labels, "temperature": temperature}.items():
            if given is None:
                raise ValueError(f"{name} must be a tensor, got None: this head makes no logits")
        stats = linear_token_stats(
            hidden_states,
            self.weight,
            labels,
            temperature=temperature,
        )
        return {"logprobs": stats.logprob, "entropy": stats.entropy}


@functools.cache
def _config(objective: str, **settings: Any) -> LossConfig:
    constructor = getattr(LossConfig, objective, None)
    if objective.startswith("_") or not callable(constructor):
        raise ValueError(f"objective must be a named constructor of LossConfig, got {objective!r}")
    aggregation = settings.setdefault("aggregation", "token_mean")
    if aggregation != "token_mean":
        raise ValueError(
            f"aggregation must be 'token_mean', got {aggregation!r}: prime-rl divides by the "
            "tokens of the global batch"
        )
    return constructor(**settings)
