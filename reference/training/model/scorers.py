"""Two scorers of completions with the same two methods.

`token_stats(policy, batch)` returns the log-probs of a micro-batch's tokens, and
`loss(policy, batch, ...)` its GRPO loss. FusedScorer computes both from the last hidden states with
grpo_kernels and never stores the logits. PlainScorer runs the whole model and takes the reference
implementation of the losses on its logits. They agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import LossConfig, LossOutput, TokenStats
from grpo_kernels.integrations.transformers import forward_to_hidden
from reference import losses
from reference.training.model.policy import Policy
from reference.training.rollout.packing import Packed, pack_completions
from reference.training.update.micro_batches import MicroBatch

Scores = tuple[Callable[..., TokenStats], Callable[..., LossOutput]]


class Scorer:
    """Scores the completions of a micro-batch under a policy; see the subclasses."""

    def token_stats(
        self, policy: Policy, batch: MicroBatch, temperature: float = 1.0
    ) -> TokenStats:
        """Return the log-probs [B·G, T] of the batch's tokens, 0 outside the loss mask."""
        token_stats, _ = self._forward(policy, batch)
        with policy.autocast():
            return token_stats(entropy=False, **_common_keywords(batch, temperature))

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
            denominators: normalizer and entropy_normalizer; by default those of the batch itself.
        """
        token_stats, grpo_loss = self._forward(policy, batch)
        if store_old_logprob and batch.old_logprob is None:
            # An autocast context of its own: one would cache weights cast without gradient.
            with torch.no_grad(), policy.autocast():
                stats = token_stats(entropy=False, **_common_keywords(batch, temperature))
            batch.old_logprob = stats.logprob
        with policy.autocast():
            return grpo_loss(
                batch.advantages,
                **_common_keywords(batch, temperature),
                old_logprob=batch.old_logprob,
                ref_logprob=batch.ref_logprob,
                sampling_logprob=batch.sampling_logprob,
                config=config,
                **denominators,
            )

    def _forward(self, policy: Policy, batch: MicroBatch) -> Scores:
        packed = pack_completions(policy.model, batch.prompts, batch.tokens, batch.mask)
        with policy.forward_context():
            return self.score(policy.model, packed, batch.tokens)

    def score(self, model: Any, packed: Packed, tokens: Tensor) -> Scores:
        """Run the model; return token_stats and grpo_loss of its predictions of the tokens."""
        raise NotImplementedError


def _common_keywords(batch: MicroBatch, temperature: float) -> dict[str, Any]:
    return {"mask": batch.loss_mask, "temperature": temperature, "support": batch.support}


class FusedScorer(Scorer):
    """Scores the last hidden states with the fused losses of grpo_kernels."""

    def score(self, model, packed, tokens):
        hidden, head, _ = forward_to_hidden(model, **packed.model_inputs())
        hidden = packed.select_predictions(hidden)
        return partial(head.token_stats, hidden, tokens), partial(head.grpo_loss, hidden, tokens)


class PlainScorer(Scorer):
    """Scores the logits with the reference implementation of the losses."""

    def score(self, model, packed, tokens):
        logits = packed.select_predictions(model(**packed.model_inputs()).logits)
        return partial(losses.token_stats, logits, tokens), partial(
            losses.grpo_loss, logits, tokens
        )
