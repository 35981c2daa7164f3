"""Two scorers of completions with the same three methods.

`token_stats(policy, batch)` returns the log-probs of a micro-batch's tokens, `loss(policy, batch,
...)` its GRPO loss, and `distillation_loss(policy, teacher, batch, ...)` its divergence from a
teacher. FusedScorer computes them from the last hidden states with grpo_kernels and never stores
the logits. PlainScorer runs the whole model and takes the reference implementation of the losses on
its logits. They agree up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import LossConfig, LossOutput, TokenStats, linear_distillation_loss
from grpo_kernels.integrations.transformers import LMHead, forward_to_hidden
from reference import losses
from reference.training.model.policy import Policy
from reference.training.rollout.packing import Packed, pack_completions
from reference.training.update.micro_batches import MicroBatch


@dataclass(frozen=True)
class HiddenPredictions:
    """The predictions of a batch's tokens as last hidden states [N, T, H] and a head."""

    hidden: Tensor
    head: LMHead

    def token_stats(self, tokens: Tensor, **keywords: Any) -> TokenStats:
        return self.head.token_stats(self.hidden, tokens, **keywords)

    def grpo_loss(self, tokens: Tensor, advantages: Tensor, **keywords: Any) -> LossOutput:
        return self.head.grpo_loss(self.hidden, tokens, advantages, **keywords)

    def distillation_loss(self, teacher: HiddenPredictions, **keywords: Any) -> LossOutput:
        head, V = self.head, len(self.head.weight)
        weight, bias = teacher.head.weight, teacher.head.bias
        if len(weight) > V:
            weight, bias = weight[:V], None if bias is None else bias[:V]
        return linear_distillation_loss(
            self.hidden,
            head.weight,
            teacher.hidden,
            weight,
            bias=head.bias,
            teacher_bias=bias,
            adapter=head.adapter,
            temperature=keywords.pop("temperature") / head.scale,
            softcap=None if head.softcap is None else head.softcap / head.scale,
            **keywords,
        )


@dataclass(frozen=True)
class LogitPredictions:
    """The predictions of a batch's tokens as logits [N, T, V]."""

    logits: Tensor

    def token_stats(self, tokens: Tensor, **keywords: Any) -> Any:
        return losses.token_stats(self.logits, tokens, **keywords)

    def grpo_loss(self, tokens: Tensor, advantages: Tensor, **keywords: Any) -> Any:
        return losses.grpo_loss(self.logits, tokens, advantages, **keywords)

    def distillation_loss(self, teacher: LogitPredictions, **keywords: Any) -> Any:
        V = self.logits.shape[-1]
        return losses.distillation_loss(self.logits, teacher.logits[..., :V], **keywords)


class Scorer:
    """Scores the completions of a micro-batch under a policy; see the subclasses."""

    def token_stats(
        self, policy: Policy, batch: MicroBatch, temperature: float = 1.0
    ) -> TokenStats:
        """Return the log-probs [B·G, T] of the batch's tokens, 0 outside the loss mask."""
        predictions = self._forward(policy, batch)
        with policy.autocast():
            return predictions.token_stats(
                batch.tokens, entropy=False, **_common_keywords(batch, temperature)
            )

    def loss(
        self,
        policy: Policy,
        batch: MicroBatch,
        config: LossConfig,
        temperature: float = 1.0,
        *,
        store_old_logprob: bool = False,
        **denominators: int,
    ) -> LossOutput:
        """Return the loss of the batch, differentiable in the policy's weights.

        Args:
            store_old_logprob: set batch.old_logprob, if it is None, to the log-probs of this pass.
            denominators: the normalizers of the loss; by default those of the batch itself.
        """
        predictions = self._forward(policy, batch)
        if store_old_logprob and batch.old_logprob is None:
            # An autocast context of its own: one would cache weights cast without gradient.
            with torch.no_grad(), policy.autocast():
                stats = predictions.token_stats(
                    batch.tokens, entropy=False, **_common_keywords(batch, temperature)
                )
            batch.old_logprob = stats.logprob
        with policy.autocast():
            return predictions.grpo_loss(
                batch.tokens,
                batch.advantages,
                **_common_keywords(batch, temperature),
                old_logprob=batch.old_logprob,
                ref_logprob=batch.ref_logprob,
                sampling_logprob=batch.sampling_logprob,
                nll_weight=batch.nll_weight,
                config=config,
                **denominators,
            )

    def distillation_loss(
        self, policy: Policy, teacher: Policy, batch: MicroBatch, **keywords: Any
    ) -> LossOutput:
        """Return the divergence of the policy from the teacher, differentiable in the policy.

        It is over the whole vocabulary of the policy, whatever tokens the sampler kept. Further
        rows of the teacher's head, which are no tokens, are left out of its distribution.

        Args:
            keywords: divergence, jsd_weight, temperature and normalizer of `distillation_loss`.
        """
        with torch.no_grad():
            target = self._forward(teacher, batch)
        predictions = self._forward(policy, batch)
        with policy.autocast():
            return predictions.distillation_loss(target, mask=batch.loss_mask, **keywords)

    def _forward(self, policy: Policy, batch: MicroBatch) -> Any:
        packed = pack_completions(policy.model, batch.prompts, batch.tokens, batch.mask)
        with policy.forward_context():
            return self.predict(policy.model, packed)

    def predict(self, model: Any, packed: Packed) -> HiddenPredictions | LogitPredictions:
        """Run the model; return its predictions of the tokens."""
        raise NotImplementedError


def _common_keywords(batch: MicroBatch, temperature: float) -> dict[str, Any]:
    return {"mask": batch.loss_mask, "temperature": temperature, "support": batch.support}


class FusedScorer(Scorer):
    """Scores the last hidden states with the fused losses of grpo_kernels."""

    def predict(self, model, packed):
        hidden, head, _ = forward_to_hidden(model, **packed.model_inputs())
        return HiddenPredictions(packed.select_predictions(hidden), head)


class PlainScorer(Scorer):
    """Scores the logits with the reference implementation of the losses."""

    def predict(self, model, packed):
        return LogitPredictions(packed.select_predictions(model(**packed.model_inputs()).logits))
