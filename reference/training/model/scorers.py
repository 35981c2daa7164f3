"""Two scorers of completions with the same methods.

`token_stats(policy, batch)` returns the log-probs of a micro-batch's tokens, `loss(policy, batch,
...)` its GRPO loss, maybe with a KL to a teacher, and `distillation_loss(policy, batch, ...)` its
divergence from a teacher, whose predictions `teacher_predictions` computes. FusedScorer computes
them from the last hidden states with grpo_kernels and never stores the logits. PlainScorer runs the
whole model and takes the reference implementation of the losses on its logits. They agree up to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes

    def token_stats(self, tokens: Tensor, **keywords: Any) -> TokenStats:
        return self.head.token_stats(self.hidden, tokens, **keywords)

    def grpo_loss(
        self,
        tokens: Tensor,
        advantages: Tensor,
        teacher: HiddenPredictions | None,
        **keywords: Any,
    ) -> LossOutput:
        if teacher is not None:
            ref_head = _first_rows(teacher.head, len(self.head.weight))
            keywords |= {"ref_hidden": teacher.hidden, "ref_head": ref_head}
        return self.head.grpo_loss(self.hidden, tokens, advantages, **keywords)

    def distillation_loss(self, teacher: HiddenPredictions, **keywords: Any) -> LossOutput:
        head, teacher_head = self.head, _first_rows(teacher.head, len(self.head.weight))
        return linear_distillation_loss(
            self.hidden,
            head.weight,
            teacher.hidden,
            teacher_head.weight,
            bias=head.bias,
            teacher_bias=teacher_head.bias,
            adapter=head.adapter,
            temperature=keywords.pop("temperature") / head.scale,
            softcap=None if head.softcap is None else head.softcap / head.scale,
            **keywords,
        )


def _first_rows(head: LMHead, V: int) -> LMHead:
    """Leave out the rows of a teacher's head that are no tokens of the student."""
    if len(head.weight) == V:
        return head
    return replace(head, weight=head.weight[:V], bias=None if head.bias is None else head.bias[:V])


@dataclass(frozen=True)
class LogitPredictions:
    """The predictions of a batch's tokens as logits [N, T, V]."""

    logits: Tensor

    @property
    def nbytes(self) -> int:
        return self.logits.nbytes

    def token_stats(self, tokens: Tensor, **keywords: Any) -> Any:
        return losses.token_stats(self.logits, tokens, **keywords)

    def grpo_loss(
        self,
        tokens: Tensor,
        advantages: Tensor,
        teacher: LogitPredictions | None,
        **keywords: Any,
    ) -> Any:
        if teacher is not None:
            keywords["ref_logits"] = teacher.logits[..., : self.logits.shape[-1]]
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
        teacher: Any = None,
        store_old_logprob: bool = False,
        **denominators: int,
    ) -> LossOutput:
        """Return the loss of the batch, differentiable in the policy's weights.

        Args:
            teacher: `teacher_predictions` of the batch, for a KL over the vocabulary.
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
                teacher,
                **_common_keywords(batch, temperature),
                old_logprob=batch.old_logprob,
                ref_logprob=batch.ref_logprob,
                sampling_logprob=batch.sampling_logprob,
                nll_weight=batch.nll_weight,
                config=config,
                **denominators,
            )

    def distillation_loss(
        self, policy: Policy, batch: MicroBatch, teacher: Any, **keywords: Any
    ) -> LossOutput:
        """Return the divergence of the policy from the teacher, differentiable in the policy.

        It is over the whole vocabulary of the policy, whatever tokens the sampler kept. Further
        rows of the teacher's head, which are no tokens, are left out of its distribution.

        Args:
            teacher: `teacher_predictions` of the batch.
            keywords: divergence, jsd_weight, temperature and normalizer of `distillation_loss`.
        """
        predictions = self._forward(policy, batch)
        with policy.autocast():
            return predictions.distillation_loss(teacher, mask=batch.loss_mask, **keywords)

    @torch.no_grad()
    def teacher_predictions(
        self, teacher: Policy, batch: MicroBatch
    ) -> HiddenPredictions | LogitPredictions:
        """Return the predictions of a teacher for `loss` and `distillation_loss`."""
        return self._forward(teacher, batch)

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
