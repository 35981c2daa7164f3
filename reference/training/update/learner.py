"""From answers and their advantages to optimiser steps: parts, losses, updates.

Sizes: B questions, G answers to each, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from grpo_kernels import AdaptiveEntropy, LossConfig
from reference.training.config import TrainConfig
from reference.training.distributed import whole_tensor, without_sync
from reference.training.errors import UserError
from reference.training.guards import enough_memory, where_not_finite
from reference.training.model.policy import Policy, SampledCompletions
from reference.training.update.micro_batches import MicroBatch, Minibatch, Part

T = TypeVar("T")
Metrics = dict[str, Tensor]


class Learner:
    """The optimiser of a policy, and the frozen reference where beta asks for one."""

    def __init__(self, policy: Policy, loss_config: LossConfig, config: TrainConfig) -> None:
        self.policy, self.loss_config, self.config = policy, loss_config, config
        self.reference = self._frozen_policy() if config.beta > 0 else None
        # Called with gradient; sampling calls the model itself.
        self.learning = replace(policy, model=policy.ranks.wrapped(policy.model, config.parallel))
        self.entropy_control = None
        if config.entropy_target is not None:
            self.entropy_control = AdaptiveEntropy(
                config.entropy_target,
                coef=loss_config.entropy_coef,
                step=config.entropy_coef_step,
                maximum=config.entropy_coef_max,
            )
        self.trained = [each for each in policy.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        self.steps = 0
        self.micro_batch = MicroBatch(config.micro_batch)

    def state_dict(self) -> dict[str, Any]:
        """What a learner knows beside its tensors; the learning rate follows from `steps`."""
        control = self.entropy_control
        return {
            "steps": self.steps,
            "micro_batch": self.micro_batch.state_dict(),
            "entropy_control": None if control is None else control.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.micro_batch.load_state_dict(state["micro_batch"])
        if self.entropy_control is not None:
            self.entropy_control.load_state_dict(state["entropy_control"])

    def step(self, answers: SampledCompletions, advantages: Tensor) -> dict[str, float]:
        """Learn from answers and their advantages [B·G] or [B·G, T]; returns metrics.

        Where no group has a learning signal, and nothing else reads them, there is no forward, no
        backward and no optimiser step.
        """
        self.steps += 1
        self._refresh_reference()
        config, control = self.config, self.entropy_control
        if control is not None:
            self.loss_config = replace(self.loss_config, entropy_coef=control.coef)
        rate = config.learning_rate * min(1.0, self.steps / max(1, config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        minibatches = list(self.minibatches(answers, advantages.to(self.policy.device)))
        if len(minibatches) > 1:  # the policy will have moved when the second one comes
            for minibatch in minibatches:
                self._within_memory(minibatch, self._note_old_logprob)
        updates, norms = [], []
        for _ in range(config.inner_iterations):
            for minibatch in minibatches:
                if minibatch.parts:
                    metrics, norm = self.update(minibatch)
                    updates.append(metrics)
                    norms.append(norm)
        found = {"learning_rate": rate, "grad_norm": sum(norms) / max(1, len(norms))}
        found |= combine(self._of_all_ranks(updates), self._sequence_means())
        if control is not None:
            found["entropy_coef"] = self.loss_config.entropy_coef
            if "entropy" in found:
                control.update(found["entropy"])
        return found

    def update(self, minibatch: Minibatch) -> tuple[list[Metrics], float]:
        """One optimiser step; the metrics of each part, and the norm of the gradient.

        Raises:
            UserError: a loss or the gradient is NaN or infinite, before the weights are touched; or
                memory does not suffice for half a micro-batch either.
        """
        losses, metrics = self._within_memory(minibatch, self._backward)
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        length = whole_tensor(norm)
        if not torch.stack([each.isfinite() for each in (length, *losses)]).all():
            found = where_not_finite(losses, metrics, self.policy.model.named_parameters())
            self.optimizer.zero_grad()
            raise UserError(
                f"step {self.steps}: {found}. The weights are as the optimiser step before left "
                "them; lower --learning-rate"
            )
        clip_grads_with_norm_(self.trained, self.config.max_grad_norm, norm)
        with enough_memory("the optimiser stepped", "--lora-rank trains less"):
            self.optimizer.step()
        return metrics, length.item()

    def _backward(self, minibatch: Minibatch) -> tuple[list[Tensor], list[Metrics]]:
        """The gradient of a minibatch; the loss and the metrics of each part."""
        self.optimizer.zero_grad()
        losses, metrics = [], []
        for number, part in enumerate(minibatch.parts, 1):
            is_last = number == len(minibatch.parts)
            with nullcontext() if is_last else without_sync(self.learning.model):
                output = self.loss(part, minibatch.denominators)
                # Ranks average their gradients; the denominators are those of all of them.
                (output.loss * self.policy.ranks.size).backward()
            losses.append(output.loss.detach())
            metrics.append(output.metrics | {"num_sequences": part.counted.any(dim=-1).sum()})
        return losses, metrics

    def _note_old_logprob(self, minibatch: Minibatch) -> None:
        for part in minibatch.parts:
            part.old_logprob = self.logprob(self.policy, part)

    def _within_memory(self, minibatch: Minibatch, work: Callable[[Minibatch], T]) -> T:
        # Halving would make more passes than the other ranks.
        may_halve = not self._ranks_tokens() and self.policy.ranks.size == 1
        return self.micro_batch.run(minibatch, work, f"step {self.steps}", may_halve=may_halve)

    def minibatches(self, answers: SampledCompletions, advantages: Tensor) -> Iterator[Minibatch]:
        """--minibatches shares of the groups, each with the parts that have something to learn.

        The parts are this rank's, the denominators those of all ranks.
        """
        done, B, ranks = answers.completions, len(answers.prompts.ids), self.policy.ranks
        counted = done.mask
        if self.config.mask_truncated:
            counted = counted & done.finished[:, None]
        G = len(counted) // B
        of_tokens = advantages if advantages.dim() == 2 else advantages[:, None]
        live = (counted & (of_tokens != 0)).view(B, -1).any(dim=-1)
        if not self._may_leave_out():
            live = counted.view(B, -1).any(dim=-1)
        for groups in torch.arange(B, device=live.device).tensor_split(self.config.minibatches):
            kept, size = groups[live[groups]], self.micro_batch.size or B
            own = [at for at in kept[ranks.rank :: ranks.size].split(size) if len(at)]
            parts = [self._part(answers, advantages, counted, at, G) for at in own]
            # As many as the first rank, which has most: all take part in each pass.
            missing = -(-len(kept[:: ranks.size]) // size) - len(parts)
            if missing:
                idle = self._part(answers, advantages, counted, kept[:1], G)
                parts += [replace(idle, counted=torch.zeros_like(idle.counted))] * missing
            rows = counted.view(B, G, -1)[groups]
            yield Minibatch(parts, self._denominators(len(groups) * G, int(rows.sum())))

    def _part(
        self,
        answers: SampledCompletions,
        advantages: Tensor,
        counted: Tensor,
        groups: Tensor,
        G: int,
    ) -> Part:
        """Some groups, cut to their longest answer."""
        done = answers.completions
        rows = (groups[:, None] * G + torch.arange(G, device=groups.device)).flatten()
        mask = done.mask[rows]
        cut = slice(0, int(mask.sum(-1).max()))
        advantages = advantages[rows]
        return Part(
            answers.prompts[groups],
            done.tokens[rows, cut],
            mask[:, cut],
            counted[rows, cut],
            advantages if advantages.dim() == 1 else advantages[:, cut],
            done.logprob[rows, cut],
        )

    def _may_leave_out(self) -> bool:
        """Whether a group whose advantages are all 0 has gradient 0, and matters to no other.

        A KL, an entropy bonus and KL-Cov's penalty act on it all the same. Filters that rank the
        tokens of the whole batch let through others without it.
        """
        loss = self.loss_config
        no_bonus = loss.entropy_coef == 0 and self.entropy_control is None
        return loss.beta == 0 and no_bonus and not self._ranks_tokens()

    def _ranks_tokens(self) -> bool:
        """Whether a filter compares the tokens of a micro-batch with each other."""
        loss = self.loss_config
        return not (loss.top_entropy is loss.clip_cov is loss.kl_cov is None)

    def _denominators(self, sequences: int, tokens: int) -> dict[str, int]:
        """What the loss of a whole minibatch divides by: parts add up to it."""
        loss = self.loss_config
        normalizer = {
            "sequence_mean": sequences,
            "token_mean": tokens,
            "sequence_sum_mean": sequences,
            "fixed_length": sequences * (loss.max_completion_length or 1),
        }[loss.aggregation]
        # Under top_entropy too: a part's mean over the tokens chosen weighs as many as it has.
        return {"normalizer": max(1, normalizer), "entropy_normalizer": max(1, tokens)}

    def loss(self, part: Part, denominators: dict[str, int]):
        """The loss of one part; fills in the log-probs that the part still lacks."""
        states, head = self.learning.hidden_states(part.prompts, part.tokens, part.mask)
        if self.config.inner_iterations > 1 and part.old_logprob is None:
            part.old_logprob = self._logprob_of(self.policy, states, head, part)
        if self.reference is not None and part.ref_logprob is None:
            part.ref_logprob = self.logprob(self.reference, part)
        with self.policy.autocast():
            return head.grpo_loss(
                states,
                part.tokens,
                part.advantages,
                mask=part.counted,
                old_logprob=part.old_logprob,
                ref_logprob=part.ref_logprob,
                sampling_logprob=part.sampling_logprob,
                config=self.loss_config,
                temperature=self.config.temperature,
                **denominators,
            )

    @torch.no_grad()
    def logprob(self, policy, part: Part) -> Tensor:
        """[B·G, T] of the part's tokens under the policy or the reference."""
        states, head = policy.hidden_states(part.prompts, part.tokens, part.mask)
        return self._logprob_of(policy, states, head, part)

    @torch.no_grad()
    def _logprob_of(self, policy, states: Tensor, head, part: Part) -> Tensor:
        temperature = self.config.temperature
        with policy.autocast():
            return head.token_stats(
                states, part.tokens, mask=part.counted, temperature=temperature, entropy=False
            ).logprob

    def _frozen_policy(self):
        """The reference, in shards where the policy will be."""
        reference = self.policy.frozen_copy()
        if self.config.parallel == "fsdp":
            self.policy.ranks.wrapped(reference.model, "fsdp")
        return reference

    def _of_all_ranks(self, updates: list[list[Metrics]]) -> list[list[Metrics]]:
        """The parts of each update on all ranks, without those of a rank that was idle."""
        if self.policy.ranks.size == 1:
            return updates
        found = self.policy.ranks.gathered(updates)
        return [
            [part for rank in found for part in rank[n] if part["num_sequences"] > 0]
            for n in range(len(updates))
        ]

    def _sequence_means(self) -> list[str]:
        """The metrics that are means over sequences."""
        clips = [f"clip_ratio/{side}_mean" for side in ("low", "high", "region")]
        of_ratios = ["ratio_mean", "cispo_clip_ratio", *clips]
        return ["vespo/phi_seq_mean", *of_ratios * (self.loss_config.ratio_level == "sequence")]

    def _refresh_reference(self) -> None:
        every = self.config.reference_refresh
        if every is not None and self.steps > 1 and (self.steps - 1) % every == 0:
            self.reference = None  # freed before its successor is made
            self.reference = self._frozen_policy()


def combine(updates: list[list[Metrics]], sequence_means: Collection[str] = ()) -> dict[str, float]:
    """The metrics of a step from those of the parts of its updates; nothing where there was none.

    policy_loss is already divided by the denominator of its update, and a mean over updates; others
    are means over tokens, or over sequences where `sequence_means` names them, or extremes.
    """
    parts = [part for update in updates for part in update]
    if not parts:
        return {}
    values = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    tokens, sequences = values.pop("num_tokens"), values.pop("num_sequences")
    combined = {}
    for name, each in values.items():
        if name == "policy_loss":
            combined[name] = each.sum().item() / len(updates)
        elif name.endswith(("/max", "_max")):
            combined[name] = each.max().item()
        elif name.endswith(("/min", "_min")):
            combined[name] = each.min().item()
        else:
            weights = sequences if name in sequence_means else tokens
            combined[name] = ((each * weights).sum() / weights.sum().clamp(min=1)).item()
    return combined
