"""From rewarded completions to an optimiser step: advantages, the loss, the update.

The losses come in as a module, grpo_kernels or reference: both have the same functions.
Sizes: B prompts, G completions per prompt, T completion length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.config import TrainConfig
from reference.errors import UserError
from reference.policy import Answers, Policy
from reference.rollout import Completions, Prompts


@dataclass
class Part:
    """What one forward and backward pass works on: B prompts and B·G completions."""

    prompts: Prompts
    tokens: Tensor  # [B·G, T]
    mask: Tensor  # [B·G, T]
    advantages: Tensor  # [B·G]
    old_logprob: Tensor | None = None  # [B·G, T], known after the first of several inner iterations
    ref_logprob: Tensor | None = None  # [B·G, T], where beta asks for a KL


class Learner:
    """The optimiser of a policy, and the frozen reference where beta asks for one."""

    def __init__(self, policy: Policy, losses, loss_config, config: TrainConfig) -> None:
        self.policy, self.losses, self.loss_config, self.config = (
            policy,
            losses,
            loss_config,
            config,
        )
        self.reference = policy.frozen_copy() if config.beta > 0 else None
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        self.steps = 0

    def step(self, answers: Answers, rewards: Tensor) -> dict[str, float]:
        """Learn from answers and their rewards [B, G]; returns metrics, of the last inner
        iteration.

        Where no group has a learning signal there is no forward, no backward and no optimiser step.
        """
        self.steps += 1
        rate = self.config.learning_rate * min(1.0, self.steps / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics = {"learning_rate": rate, "grad_norm": 0.0}
        parts = self.parts(answers, rewards)
        denominators = self.denominators(answers.completions)
        for _ in range(self.config.inner_iterations if parts else 0):
            self.optimizer.zero_grad()
            of_parts = []
            for part in parts:
                output = self.loss(part, denominators)
                output.loss.backward()
                of_parts.append(output.metrics)
            norm = torch.nn.utils.clip_grad_norm_(
                self.policy.model.parameters(), self.config.max_grad_norm
            )
            if not norm.isfinite():
                raise UserError(
                    f"the gradient of step {self.steps} is not finite: lower --learning-rate"
                )
            self.optimizer.step()
            metrics |= {"grad_norm": norm.item(), **combine(of_parts)}
        return metrics

    def parts(self, answers: Answers, rewards: Tensor) -> list[Part]:
        """The groups to learn from, --micro-batch to a part, cut to their longest completion.

        A group of equal rewards has advantages 0 and gradient 0, and is left out, unless a KL or an
        entropy bonus acts on it all the same.
        """
        G, device = rewards.shape[1], self.policy.device
        live = rewards.ne(rewards[:, :1]).any(dim=-1)
        if self.config.beta > 0 or self.config.entropy_coef > 0:
            live = torch.ones_like(live)
        groups_of_live = live.nonzero().flatten()
        advantages = self.advantages(rewards).to(device)
        parts = []
        for start in range(0, len(groups_of_live), self.config.micro_batch or len(live)):
            groups = groups_of_live[start:][: self.config.micro_batch].to(device)
            rows = (groups[:, None] * G + torch.arange(G, device=device)).flatten()
            mask = answers.completions.mask[rows]
            longest = int(mask.sum(-1).max())
            tokens = answers.completions.tokens[rows, :longest]
            parts.append(
                Part(
                    answers.prompts[groups], tokens, mask[:, :longest], advantages[groups].flatten()
                )
            )
        return parts

    def advantages(self, rewards: Tensor) -> Tensor:
        """[B, G], rewards against their group; Dr. GRPO leaves the standard deviation out."""
        if self.config.loss == "dr_grpo":
            return rewards - rewards.mean(dim=-1, keepdim=True)
        return self.losses.group_normalised_advantage(rewards)

    def denominators(self, completions: Completions) -> dict[str, int]:
        """What the loss of the whole batch divides by, left-out groups included: parts add up to
        it."""
        sequences, tokens = len(completions.mask), int(completions.mask.sum())
        normalizer = {
            "sequence_mean": sequences,
            "token_mean": tokens,
            "fixed_length": sequences * self.config.max_new_tokens,
        }[self.loss_config.aggregation]
        return {"normalizer": normalizer, "entropy_normalizer": tokens}

    def loss(self, part: Part, denominators: dict[str, int]):
        """The loss of one part; fills in the log-probs that the part still lacks."""
        batch = (part.prompts, part.tokens, part.mask)
        states, head = self.policy.states(*batch)
        if self.config.inner_iterations > 1 and part.old_logprob is None:
            part.old_logprob = self.logprob(states, head, part)
        if self.reference is not None and part.ref_logprob is None:
            with torch.no_grad():
                part.ref_logprob = self.logprob(*self.reference.states(*batch), part)
        with self.policy.autocast():
            return head.grpo_loss(
                states,
                part.tokens,
                part.advantages,
                mask=part.mask,
                old_logprob=part.old_logprob,
                ref_logprob=part.ref_logprob,
                config=self.loss_config,
                temperature=self.config.temperature,
                **denominators,
            )

    @torch.no_grad()
    def logprob(self, states: Tensor, head, part: Part) -> Tensor:
        with self.policy.autocast():
            return head.token_stats(
                states,
                part.tokens,
                mask=part.mask,
                temperature=self.config.temperature,
                entropy=False,
            ).logprob


def combine(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """The loss's metrics of a batch from those of its parts."""
    weights = torch.stack([of_part["num_tokens"] for of_part in metrics])
    combined = {}
    for name in metrics[0]:
        values = torch.stack([of_part[name] for of_part in metrics])
        if name == "policy_loss":  # already divided by the denominator of the whole batch
            combined[name] = values.sum().item()
        elif name == "ratio_max":
            combined[name] = values.max().item()
        elif name != "num_tokens":
            combined[name] = ((values * weights).sum() / weights.sum()).item()
    return combined
