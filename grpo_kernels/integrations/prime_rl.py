"""Adapters for prime-rl: a custom loss, and an LM head with fused log-probs.

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
from ..validation import expect_choice


def loss(inputs: Any, *, objective: str = "grpo", **settings: Any) -> Any:
    """Compute the loss of one sample, for prime-rl's `[trainer.loss] type = "custom"`.

    The ratio is that of the trainer's policy to the inference policy. prime-rl sums samples and
    divides by the tokens of the global batch, so every objective is averaged over tokens.

    Args:
        inputs: prime-rl's LossInputs, whose tensors are [seq]. Its loss_weights, >= 0, scale the
            policy term per token.
        objective: a named constructor of LossConfig, such as "ipo", "grpo", "dapo", "gspo".
        settings: fields of LossConfig that override the constructor's. With beta > 0 the log-probs
            of the reference policy are `ref_logprobs`, which prime-rl has for some algorithms only.

    Returns:
        prime-rl's LossOutputs: the 0-dim sum over tokens, and the metrics of `policy_loss` with
        prime-rl's is_masked, is_masked_low and is_masked_high: the fraction of tokens that are
        clipped or dropped.

    Raises:
        ValueError, TypeError: an unknown objective or setting, another aggregation, or a setting
            that needs what LossInputs does not have, such as entropies; loss_weights together with
            terms that they would not scale.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    config = _loss_config(objective, **settings)
    advantages = inputs.advantages
    if inputs.loss_weights is not None:
        if config.beta != 0 or config.clip_cov is not None or config.kl_cov is not None:
            raise ValueError(
                "beta, clip_cov and kl_cov must be off with loss_weights, which would not scale "
                "what they add, and change which tokens they choose"
            )
        if config.policy_term.has_penalty:
            raise ValueError(
                f"loss_weights must be None with surrogate={config.surrogate!r}: they would not "
                "scale its penalty"
            )
        # A policy term is proportional to its advantage, and clips depend on its sign: keep that.
        advantages = advantages * inputs.loss_weights.clamp(min=1e-30)
    old_logprob = inputs.inference_logprobs[None]
    ref_logprob = None if config.beta == 0 else inputs.ref_logprobs
    total, metrics = policy_loss(
        inputs.trainer_logprobs[None],
        advantages[None],
        mask=inputs.loss_mask[None],
        old_logprob=old_logprob,
        ref_logprob=None if ref_logprob is None else ref_logprob[None],
        sampling_logprob=old_logprob if config.policy_term.relative_to_sampler else None,
        config=config,
        normalizer=1,
    )
    del metrics["policy_loss"]  # a sum, and prime-rl averages its metrics
    metrics["is_masked"] = metrics["clip_ratio/region_mean"]
    metrics["is_masked_low"] = metrics["clip_ratio/low_mean"]
    metrics["is_masked_high"] = metrics["clip_ratio/high_mean"]
    return LossOutputs(loss=total, metrics=metrics)


class FusedOutputLinear(torch.nn.Linear):
    """An LM head for prime-rl that returns log-probs and entropies, both differentiable.

    Assign it to `prime_rl.trainer.models.layers.lm_head.FusedOutputLinear` before the model is set
    up. `chunk_size` is ignored: prime-rl tiles a chunk of tokens over the vocabulary too, and this
    head does not. Its workspace is about 1 GiB.

    prime-rl's LoRA layers add to the output of a layer, and this head has no logits to add to:
    leave `lm_head` out of their `target_modules`.
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
        """Return {"logprobs", "entropy"}, both [B, L], fp32, differentiable.

        Args:
            hidden_states: [B, L, H].
            labels: [B, L], the token that each hidden state predicts.
            temperature: [B, L], > 0.

        Raises:
            ValueError, TypeError: labels or temperature is None; else as `linear_token_stats`.
        """
        if labels is None or temperature is None:
            name = "labels" if labels is None else "temperature"
            raise ValueError(
                f"{name} must be a tensor, got None: this head computes no logits, "
                "to which a LoRA around it could add"
            )
        stats = linear_token_stats(hidden_states, self.weight, labels, temperature=temperature)
        assert stats.entropy is not None
        return {"logprobs": stats.logprob, "entropy": stats.entropy}


@functools.cache
def _loss_config(objective: str, **settings: Any) -> LossConfig:
    objectives = LossConfig.objectives()
    expect_choice("objective", objective, objectives)
    aggregation = settings.setdefault("aggregation", "token_mean")
    if aggregation != "token_mean":
        raise ValueError(
            f"aggregation must be 'token_mean', got {aggregation!r}: prime-rl divides by the "
            "tokens of the global batch"
        )
    return objectives[objective](**settings)
