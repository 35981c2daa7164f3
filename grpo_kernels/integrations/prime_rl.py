"""Adapters for prime-rl: a custom loss, and an LM head with fused log-probs.

    [trainer.loss]
    type = "custom"
    import_path = "grpo_kernels.integrations.prime_rl.loss"
    kwargs = { objective = "ipo", kl_tau = 1e-3 }

The contract is that of prime-rl 0.8 and of its main branch in September 2026: `LossInputs` and
`LossOutputs` of its `prime_rl/trainer/rl/loss.py`, where a loss object calls a custom loss as this
function, and `FusedOutputLinear` of `models/layers/lm_head.py`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..objective.policy_loss import LossConfig, check_kl_input
from ..objective.ratios import MAX_LOG_RATIO, PolicyRatios
from ..objective.surrogates import Dppo
from ..ops.linear_token_stats import linear_token_stats
from ..sampling_support import TokenSupport
from ..validation import expect_choice, expect_ids, expect_number, expect_tensor, shape_of
from .weighted_loss import weighted_policy_loss


def loss(
    inputs: Any,
    *,
    objective: str = "grpo",
    adv_tau: float = 1.0,
    kl_tau: float | None = None,
    **settings: Any,
) -> Any:
    """Compute the loss of one sample, for prime-rl's `[trainer.loss] type = "custom"`.

    The ratio is that of the trainer's policy to the inference policy. prime-rl sums samples and
    divides by the tokens of the global batch, so every objective is averaged over tokens. "ipo" is
    prime-rl's own default; that of its version 0.8 has the gradient of

        kwargs = { objective = "dppo", epsilon_low = 0.2, epsilon_high = 0.2, kl_tau = 1e-3 }

    while no ratio is above 20.

    Args:
        inputs: prime-rl's LossInputs, whose tensors are [seq]. Its loss_weights, >= 0, scale the
            loss of each token.
        objective: a named constructor of LossConfig, such as "ipo", "grpo", "dapo", "gspo".
        adv_tau: >= 0, scales the advantages.
        kl_tau: >= 0, coefficient of (trainer log-prob - inference log-prob)², on every token. None
            is 1e-3 for "ipo" and 0 for the others.
        settings: fields of LossConfig that override the constructor's. With beta > 0 the log-probs
            of the reference policy are `ref_logprobs`, which prime-rl has for some algorithms only.

    Returns:
        prime-rl's LossOutputs: the 0-dim sum over tokens, and the metrics of `policy_loss` with
        prime-rl's own. A token is masked if it is clipped or dropped: is_masked, is_masked_low and
        is_masked_high are fractions of the tokens; masked_mismatch_kl and unmasked_mismatch_kl the
        means of r - 1 - ln r over such tokens and over the others; masked_advantage_positive and
        _negative the fractions of the masked tokens whose advantage has this sign.

    Raises:
        ValueError, TypeError: an unknown objective or setting, another aggregation, or a setting
            that needs what LossInputs does not have, such as entropies.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    expect_number("adv_tau", adv_tau, at_least=0)
    if kl_tau is not None:
        expect_number("kl_tau", kl_tau, at_least=0)
        if objective == "ipo":
            if "sampler_penalty" in settings:
                raise ValueError(
                    "kl_tau is the sampler_penalty of 'ipo': give one of them, "
                    f"got {kl_tau} and {settings['sampler_penalty']}"
                )
            settings, kl_tau = settings | {"sampler_penalty": kl_tau}, None
    config = _loss_config(objective, **settings)
    old_logprob = inputs.inference_logprobs[None]
    ref_logprob = None if config.beta == 0 else inputs.ref_logprobs
    check_kl_input(config, ref_logprob, None)
    weights = None if inputs.loss_weights is None else inputs.loss_weights[None]
    (total, metrics), ratios = weighted_policy_loss(
        inputs.trainer_logprobs[None],
        adv_tau * inputs.advantages[None],
        weights,
        mask=inputs.loss_mask[None],
        old_logprob=old_logprob,
        ref_logprob=None if ref_logprob is None else ref_logprob[None],
        sampling_logprob=old_logprob if config.policy_term.relative_to_sampler else None,
        config=config,
        normalizer=1,
    )
    if kl_tau is not None:
        log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
        penalty = log_ratio.masked_fill(~inputs.loss_mask, 0).square()
        if inputs.loss_weights is not None:
            penalty = torch.where(inputs.loss_mask, inputs.loss_weights, 0) * penalty
        total = total + kl_tau * penalty.sum()
    del metrics["policy_loss"]  # a sum, and prime-rl averages its metrics
    return LossOutputs(loss=total, metrics=metrics | _prime_metrics(ratios, config))


def _prime_metrics(ratios: PolicyRatios, config: LossConfig) -> dict[str, Tensor]:
    """Compute the metrics that prime-rl plots, under its names."""
    keep, advantage, dtype = ratios.sequences.keep, ratios.advantage, ratios.ratio.dtype
    low, high = config.policy_term.clipped(ratios)
    masked = low | high
    if isinstance(config.policy_term, Dppo):
        masked = config.policy_term.weight(ratios) == 0  # where A = 0 too
    log_ratio = ratios.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    mismatch = torch.expm1(log_ratio) - log_ratio

    def mean(x: Tensor, among: Tensor) -> Tensor:
        return torch.where(among, x.to(dtype), 0).sum() / among.sum().clamp(min=1)

    dropped = keep & masked
    return {
        "is_masked": mean(masked, keep),
        "is_masked_low": mean(low, keep),
        "is_masked_high": mean(high, keep),
        "masked_mismatch_kl": mean(mismatch, dropped),
        "unmasked_mismatch_kl": mean(mismatch, keep & ~masked),
        "masked_advantage_positive": mean(advantage > 0, dropped),
        "masked_advantage_negative": mean(advantage < 0, dropped),
    }


class FusedOutputLinear(torch.nn.Linear):
    """An LM head for prime-rl that returns log-probs and entropies, both differentiable.

    Assign it to `FusedOutputLinear` of `prime_rl.trainer.models.layers.lm_head` before the model is
    set up, and for models with a softcap to `GemmaFusedOutputLinear` of `lm_head_gemma` there.
    `chunk_size` is ignored: prime-rl tiles a chunk of tokens over the vocabulary too, and this head
    does not. Its workspace is that of `linear_token_stats`. Hidden states in bf16 are computed with
    a head in fp32 as if it were bf16.

    prime-rl's LoRA layers add to the output of a layer, and this head has no logits to add to:
    leave `lm_head` out of their `target_modules`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        chunk_size: int | None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size, self.softcap = chunk_size, softcap

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
        sampling_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {"logprobs", "entropy"}, both [B, L], fp32, differentiable.

        Args:
            hidden_states: [B, L, H].
            labels: [B, L], the token that each hidden state predicts.
            temperature: [B, L], > 0.
            sampling_mask: [B, L, K], the token ids that the sampler kept, -1 after them. Log-probs
                are renormalised over them; a position without ids, or whose label is not among
                them, has the whole vocabulary. As in prime-rl, the entropy is always that of the
                whole vocabulary. With a mask it has no gradient, and takes one more product.

        Raises:
            ValueError, TypeError: labels or temperature is None; else as `linear_token_stats`.
        """
        if labels is None or temperature is None:
            name = "labels" if labels is None else "temperature"
            raise ValueError(
                f"{name} must be a tensor, got None: this head computes no logits, "
                "to which a LoRA around it could add"
            )
        settings = {"temperature": temperature, "softcap": self.softcap}
        if sampling_mask is None:
            stats = linear_token_stats(hidden_states, self.weight, labels, **settings)
        else:
            stats = linear_token_stats(
                hidden_states, self.weight, labels, **settings,
                entropy=False, support=_as_support(sampling_mask, labels),
            )  # fmt: skip
            with torch.no_grad():
                whole = linear_token_stats(hidden_states, self.weight, labels, **settings)
            stats = stats._replace(entropy=whole.entropy)
        assert stats.entropy is not None
        return {"logprobs": stats.logprob, "entropy": stats.entropy}


def _as_support(sampling_mask: Tensor, labels: Tensor) -> TokenSupport:
    """Convert prime-rl's mask [B, L, K] for labels [B, L]."""
    expect_ids("sampling_mask", sampling_mask)
    expect_tensor("sampling_mask", sampling_mask, dims=(3,), layout="[B, L, K]")
    if sampling_mask.shape[:-1] != labels.shape:
        raise ValueError(
            f"sampling_mask must have the positions of labels, {tuple(labels.shape)}, "
            f"got {shape_of(sampling_mask)}"
        )
    has_label = (sampling_mask == labels.unsqueeze(-1)).any(-1, keepdim=True)
    is_kept = (sampling_mask >= 0) & has_label
    offsets = torch.nn.functional.pad(is_kept.sum(-1).flatten().cumsum(0), (1, 0))
    return TokenSupport(sampling_mask[is_kept], offsets)


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
    config = objectives[objective](**settings)
    for name in ("entropy_coef", "top_entropy"):
        if getattr(config, name):
            raise ValueError(
                f"{name} must be off, got {getattr(config, name)}: LossInputs has no entropy"
            )
    return config
