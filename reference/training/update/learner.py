"""From completions and their advantages to optimiser steps.

Sizes: B questions, G completions per question, T tokens per completion.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from grpo_kernels import AdaptiveEntropy, EMABaseline, LossConfig, LossOutput
from grpo_kernels.objective.token_gradients import zero_advantage_has_zero_grad
from reference.training.config import TrainConfig
from reference.training.distributed import full_tensor
from reference.training.errors import UserError
from reference.training.guards import describe_non_finite, out_of_memory_error
from reference.training.model.policy import Policy, SampledCompletions
from reference.training.model.scorers import Scorer
from reference.training.rollout.sampler import Sampler
from reference.training.update.micro_batches import (
    MicroBatch,
    MicroBatchSplitter,
    Minibatch,
    compares_tokens,
)
from reference.training.update.sampler_check import SamplerCheck

Metrics = dict[str, Tensor]
# Means over sequences if the ratio is that of whole sequences.
RATIO_MEANS = ("ratio_mean", "cispo_clip_ratio")
RATIO_MEANS += tuple(f"clip_ratio/{side}_mean" for side in ("low", "high", "region"))
# With --inner-iterations the predictions of the teacher are kept, up to this size on each rank;
# those of further micro-batches are computed in each iteration.
MAX_KEPT_BYTES = 2**30


class Learner:
    """Trains a policy on rollouts; holds the reference policy of the KL if beta is above 0.

    With a teacher, the loss is the divergence from it, or the KL in the loss is the one to it.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: Scorer,
        loss_config: LossConfig,
        config: TrainConfig,
        teacher: Policy | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.policy, self.scorer, self.teacher = policy, scorer, teacher
        self.loss_config, self.config = loss_config, config
        has_reference = loss_config.beta > 0 and teacher is None
        self.reference_policy = policy.frozen_copy() if has_reference else None
        # DDP and FSDP2 average gradients over ranks. Sampling calls policy.model; passes with
        # gradient call it through DDP.
        self.wrapped_policy, ranks = policy, policy.ranks
        if config.parallel == "fsdp":
            for each in filter(None, (policy, self.reference_policy, teacher)):
                ranks.wrap_fsdp(each.model)
        elif ranks.size > 1:
            self.wrapped_policy = replace(policy, model=DistributedDataParallel(policy.model))
        self.entropy_control = None
        if config.entropy_target is not None:
            self.entropy_control = AdaptiveEntropy(
                config.entropy_target,
                coef=loss_config.entropy_coef,
                step=config.entropy_coef_step,
                maximum=config.entropy_coef_max,
            )
        self.reward_baseline = EMABaseline(config.ema_decay)  # of --advantage ema
        self.trained = [param for param in policy.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        self.sampler_check = None
        if sampler is not None and sampler.has_own_weights:
            self.sampler_check = SamplerCheck(
                sampler, policy, self._logprob, self.optimizer, config
            )
        self.steps = 0
        self.kept_bytes = 0  # of the teacher's predictions
        self.measures_kept_mass = config.truncation is not None and not config.support
        self.kept_mass_is_reported = not ranks.is_first
        # Halved micro-batches would make more passes than those of the other ranks.
        may_halve = not compares_tokens(loss_config) and ranks.size == 1
        self.splitter = MicroBatchSplitter(config.micro_batch, may_halve=may_halve)

    def state_dict(self) -> dict[str, Any]:
        """Return the state besides tensors; the learning rate follows from `steps`."""
        control = self.entropy_control
        return {
            "steps": self.steps,
            "micro_batch": self.splitter.state_dict(),
            "entropy_control": None if control is None else control.state_dict(),
            "reward_baseline": self.reward_baseline.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.splitter.load_state_dict(state["micro_batch"])
        if "reward_baseline" in state:  # older checkpoints have none
            self.reward_baseline.load_state_dict(state["reward_baseline"])
        if self.entropy_control is not None:
            self.entropy_control.load_state_dict(state["entropy_control"])

    def step(
        self, samples: SampledCompletions, advantages: Tensor, correct: Tensor | None = None
    ) -> dict[str, float]:
        """Update the policy by completions and their advantages [B·G] or [B·G, T]; return metrics.

        correct: [B·G], 1 for a correct completion, for --nll-coef.
        Without a learning signal in any group there is no forward pass and no optimiser step,
        unless the loss has a term that does not depend on the advantages.
        """
        config, control = self.config, self.entropy_control
        self.steps += 1
        self.kept_bytes = 0
        refresh = config.reference_refresh
        if refresh is not None and self.steps > 1 and (self.steps - 1) % refresh == 0:
            self.reference_policy = None  # freed before the next copy is made
            self.reference_policy = self.policy.frozen_copy()
        if control is not None:
            self.loss_config = replace(self.loss_config, entropy_coef=control.coef)
        learning_rate = config.learning_rate * min(1.0, self.steps / max(1, config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        # The log-probs of the sampling policy are computed before the first optimiser step.
        minibatches = list(self.minibatches(samples, advantages.to(self.policy.device), correct))
        difference = {}
        if self.sampler_check is not None and not config.async_rollout:
            difference = self.compare_with_sampler(minibatches, f"step {self.steps}")

        def store_old_logprob(minibatch: Minibatch) -> None:
            for batch in minibatch.micro_batches:
                if batch.old_logprob is None:
                    batch.old_logprob = self._logprob(self.policy, batch)

        if len(minibatches) > 1 and not config.distils_only:
            for minibatch in minibatches:
                self.splitter.run(minibatch, store_old_logprob, f"step {self.steps}")

        # One optimiser step per minibatch and inner iteration.
        updates, grad_norms = [], []
        for _ in range(config.inner_iterations):
            for minibatch in minibatches:
                if minibatch.micro_batches:
                    metrics, grad_norm = self.update(minibatch)
                    updates.append(metrics)
                    grad_norms.append(grad_norm)

        # Combine the metrics of all ranks' micro-batches, except those without a sequence.
        by_rank = self.policy.ranks.all_gather(updates)
        updates = [
            [batch for rank in by_rank for batch in rank[update] if batch["num_sequences"] > 0]
            for update in range(len(updates))
        ]
        sequence_means = ["vespo/phi_seq_mean"]
        if self.loss_config.ratio_level == "sequence":
            sequence_means += RATIO_MEANS
        mean_norm = sum(grad_norms) / max(1, len(grad_norms))
        metrics = {"learning_rate": learning_rate, "grad_norm": mean_norm}
        # Over all sampled tokens, and not over those of the loss alone.
        metrics |= combine_metrics(updates, sequence_means) | difference
        if "sampling/kept_mass" in metrics and not self.kept_mass_is_reported:
            self.kept_mass_is_reported = True
            print(
                "warning: with --no-support the sampler is another policy than the trained one: "
                f"the tokens that it kept have {metrics['sampling/kept_mass']:.1%} of the "
                "probability, the mean of exp(log-prob of the policy - log-prob of the sampler)",
                file=sys.stderr,
            )
        if control is not None:
            metrics["entropy_coef"] = self.loss_config.entropy_coef
            if "entropy" in metrics:
                control.update(metrics["entropy"])
        return metrics

    def compare_with_sampler(self, minibatches: Sequence[Minibatch], when: str) -> dict[str, float]:
        """Compare the log-probs of all sampled tokens with the sampler's; return the metrics.

        Where the update reads the log-probs from before it, they are stored.
        """
        if self.sampler_check is None:
            return {}

        def score(minibatch: Minibatch) -> list[Tensor]:
            return [
                self._logprob(self.policy, replace(batch, loss_mask=batch.mask))
                for batch in minibatch.micro_batches
            ]

        several = len(minibatches) * self.config.inner_iterations > 1
        batches, logprobs = [], []
        for minibatch in minibatches:
            for part in (minibatch, replace(minibatch, micro_batches=minibatch.unused)):
                found = self.splitter.run(part, score, when)
                batches += part.micro_batches
                logprobs += found
                if not self.config.distils_only and (several or self.measures_kept_mass):
                    for batch, logprob in zip(part.micro_batches, found, strict=True):
                        batch.old_logprob = logprob
        return self.sampler_check.compare(batches, logprobs, when)

    def update(self, minibatch: Minibatch) -> tuple[list[Metrics], float]:
        """Take one optimiser step; return the metrics per micro-batch and the gradient norm."""
        losses, metrics = self.splitter.run(minibatch, self._backward, f"step {self.steps}")
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        full_norm = full_tensor(norm)
        if not torch.stack([value.isfinite() for value in (full_norm, *losses)]).all():
            problem = describe_non_finite(losses, metrics, self.policy.model.named_parameters())
            self.optimizer.zero_grad()
            raise UserError(
                f"step {self.steps}: {problem}. The weights are as the optimiser step before left "
                "them; lower --learning-rate"
            )
        clip_grads_with_norm_(self.trained, self.config.max_grad_norm, norm)
        with out_of_memory_error("the optimiser stepped", "--lora-rank trains less"):
            self.optimizer.step()
        return metrics, full_norm.item()

    def _backward(self, minibatch: Minibatch) -> tuple[list[Tensor], list[Metrics]]:
        """Compute the gradient of a minibatch; return loss and metrics of each micro-batch."""
        self.optimizer.zero_grad()
        losses, metrics = [], []
        for number, batch in enumerate(minibatch.micro_batches, 1):
            model, is_last = self.wrapped_policy.model, number == len(minibatch.micro_batches)
            accumulates = isinstance(model, DistributedDataParallel) and not is_last
            with model.no_sync() if accumulates else nullcontext():
                output = self.loss(batch, minibatch.denominators)
                # The denominators are global sums, while DDP and FSDP average over ranks.
                (output.loss * self.policy.ranks.size).backward()
            losses.append(output.loss.detach())
            metrics.append(output.metrics | {"num_sequences": batch.loss_mask.any(dim=-1).sum()})
            if self.measures_kept_mass:
                assert batch.old_logprob is not None and batch.sampling_logprob is not None
                mass = (batch.old_logprob - batch.sampling_logprob).exp()
                total = torch.where(batch.loss_mask, mass, 0.0).sum()
                metrics[-1]["sampling/kept_mass"] = total / batch.loss_mask.sum().clamp(min=1)
        return losses, metrics

    def loss(self, batch: MicroBatch, denominators: dict[str, int]) -> LossOutput:
        """Return the loss of a micro-batch; add the log-probs that it still lacks."""
        teacher = None if self.teacher is None else self._teacher_predictions(batch)
        if self.config.distils_only:
            return self.scorer.distillation_loss(
                self.wrapped_policy,
                batch,
                teacher,
                divergence=self.config.distill,
                jsd_weight=self.config.jsd_weight,
                temperature=self.config.temperature,
                normalizer=denominators["normalizer"],
            )
        if self.reference_policy is not None and batch.ref_logprob is None:
            batch.ref_logprob = self._logprob(self.reference_policy, batch)
        output = self.scorer.loss(
            self.wrapped_policy,
            batch,
            self.loss_config,
            self.config.temperature,
            teacher=teacher,
            store_old_logprob=self.config.inner_iterations > 1 or self.measures_kept_mass,
            **denominators,
        )
        if teacher is not None:
            output.metrics["divergence"] = output.metrics.pop("kl")
        return output

    def _teacher_predictions(self, batch: MicroBatch) -> Any:
        """Return the predictions of the teacher; keep them for a later iteration if they fit.

        Those of a sharded teacher are not kept, because its head is gathered in each pass.
        """
        if batch.teacher is not None:
            return batch.teacher
        assert self.teacher is not None
        predictions = self.scorer.teacher_predictions(self.teacher, batch)
        size = self.kept_bytes + predictions.nbytes
        is_reused = self.config.inner_iterations > 1 and self.config.parallel == "ddp"
        if is_reused and size <= MAX_KEPT_BYTES:
            batch.teacher, self.kept_bytes = predictions, size
        return predictions

    @torch.no_grad()
    def _logprob(self, policy: Policy, batch: MicroBatch) -> Tensor:
        return self.scorer.token_stats(policy, batch, self.config.temperature).logprob

    def minibatches(
        self, samples: SampledCompletions, advantages: Tensor, correct: Tensor | None = None
    ) -> Iterator[Minibatch]:
        """Split the groups into --minibatches, and each minibatch into micro-batches.

        The micro-batches are this rank's, the denominators those of all ranks.
        """
        config, loss = self.config, self.loss_config
        completions, B = samples.completions, len(samples.prompts.ids)
        loss_mask = completions.mask
        if config.mask_truncated:
            loss_mask = loss_mask & completions.finished[:, None]
        batch = MicroBatch(
            samples.prompts,
            completions.tokens,
            completions.mask,
            loss_mask,
            advantages,
            completions.logprob,
            completions.support,
            # The policy has moved on since these completions were sampled.
            old_logprob=completions.logprob if config.async_rollout else None,
        )
        if loss.nll_coef > 0:
            if correct is None:
                raise UserError(
                    "--nll-coef learns from correct completions: it needs ground truths"
                )
            is_correct = (correct == 1).to(loss_mask.device)  # NaN: unknown
            batch.nll_weight = (loss_mask & is_correct[:, None]).float()
        # Advantages of 0 have no gradient, unless the loss has a KL, an entropy bonus or a penalty,
        # or selects among all tokens of a micro-batch. A divergence does not read them.
        needs_advantages = zero_advantage_has_zero_grad(loss, per_sequence=True)
        needs_advantages &= self.entropy_control is None and not compares_tokens(loss)
        contributes = loss_mask
        if needs_advantages and not config.distils_only:
            token_advantages = advantages if advantages.dim() == 2 else advantages[:, None]
            contributes = loss_mask & (token_advantages != 0)
            if batch.nll_weight is not None:
                contributes = contributes | (batch.nll_weight != 0)
        contributes = contributes.unflatten(0, (B, -1)).any(dim=-1).any(dim=-1)
        size = self.splitter.size or B
        for groups in torch.arange(B, device=loss_mask.device).tensor_split(config.minibatches):
            is_used = contributes[groups]
            micro_batches = self._own_micro_batches(batch, groups[is_used], size)
            unused = []
            if self.sampler_check is not None:
                unused = self._own_micro_batches(batch, groups[~is_used], size)
            num_sequences = len(loss_mask) // B * len(groups)
            num_tokens = int(loss_mask.unflatten(0, (B, -1))[groups].sum())
            # The denominators of the minibatch make the losses of micro-batches add up.
            aggregation = "token_mean" if config.distils_only else loss.aggregation
            normalizer = {
                "token_mean": num_tokens,
                "fixed_length": num_sequences * (loss.max_completion_length or 1),
                "prompt_mean": len(groups),
            }.get(aggregation, num_sequences)
            # Also under top_entropy: a mean over its tokens is weighted by all of the micro-batch.
            denominators = {
                "normalizer": max(1, normalizer),
                "entropy_normalizer": max(1, num_tokens),
            }
            if batch.nll_weight is not None:
                weights = batch.nll_weight.unflatten(0, (B, -1))[groups]
                denominators["nll_normalizer"] = max(1, int(weights.sum()))
            yield Minibatch(micro_batches, denominators, unused)

    def _own_micro_batches(self, batch: MicroBatch, groups: Tensor, size: int) -> list[MicroBatch]:
        """Return this rank's share of the groups, in micro-batches of at most `size`."""
        ranks = self.policy.ranks
        own = [some for some in groups[ranks.rank :: ranks.size].split(size) if len(some)]
        micro_batches = [batch.select_groups(some) for some in own]
        # Each rank takes part in as many passes as the first, which has the most groups.
        missing = -(-len(groups[:: ranks.size]) // size) - len(micro_batches)
        if missing:
            idle = batch.select_groups(groups[:1])
            nothing = torch.zeros_like(idle.loss_mask)
            idle = replace(idle, loss_mask=nothing, is_idle=True)
            if idle.nll_weight is not None:
                idle.nll_weight = nothing.float()
            micro_batches += [idle] * missing
        return micro_batches


def combine_metrics(
    updates: list[list[Metrics]], sequence_means: Collection[str] = ()
) -> dict[str, float]:
    """Combine the metrics of a step's micro-batches, listed by update; {} without any.

    Terms of the loss are already divided by the denominator of their update: they are summed, then
    averaged over updates. Others are extremes by their name, means over sequences if
    `sequence_means` has them, else means over tokens.
    """
    batches = [batch for update in updates for batch in update]
    if not batches:
        return {}
    columns = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
    num_tokens, num_sequences = columns.pop("num_tokens"), columns.pop("num_sequences")
    combined = {}
    for name, values in columns.items():
        if name in ("policy_loss", "nll_loss"):
            combined[name] = values.sum().item() / len(updates)
        elif name.endswith(("/max", "_max")):
            combined[name] = values.max().item()
        elif name.endswith(("/min", "_min")):
            combined[name] = values.min().item()
        else:
            weights = num_sequences if name in sequence_means else num_tokens
            combined[name] = ((values * weights).sum() / weights.sum().clamp(min=1)).item()
    return combined
