"""Rollouts one step ahead (--async-rollout): the next batch is sampled while this one trains.

    step k:   wait for batch k; give the sampler the weights; start sampling batch k + 1; train on k

Batch k + 1 comes from the weights before the update of step k, so that it is one step old when it
trains. The log-probs of the sampler are the old log-probs of the loss: its ratio is that of the
policy to the sampler.

Only the sampler runs in the thread. Questions are drawn, encoded and rewarded in the main thread,
and the seeds of a batch follow from --seed and the step. The numbers of a run therefore do not
depend on the speed of either thread. The state of a run between two steps is that before the
questions of the batch in flight were drawn: a resumed run draws them again, and samples them from
the weights of the checkpoint, which are one step newer.
"""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from reference.training.collect import (
    Rollouts,
    replace_groups_without_signal,
    sample_completions,
    sample_questions,
)
from reference.training.model.policy import Policy
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.sampler import Sampler
from reference.training.tasks.questions import Question
from reference.training.tasks.tasks import Task
from reference.training.update.learner import Learner

# After each update some short completions are sampled and compared with the policy, which has to
# wait for them.
PROBE_QUESTIONS, PROBE_TOKENS = 8, 8


@dataclass(frozen=True)
class BatchInFlight:
    """A batch that the sampler draws in its thread.

    Attributes:
        policy: draws further seeds of the batch.
        order: after the questions of the batch were drawn.
        synced_at: the number of optimiser steps when the sampler got its weights.
        difference: metrics of the comparison of the sampler and the policy at that time.
    """

    policy: Policy
    questions: list[Question]
    order: random.Random
    completions: Future[Completions]
    synced_at: int
    difference: dict[str, float]


class AsyncRollouts:
    """Samples batches in a thread, one step ahead of the learner."""

    def __init__(
        self, learner: Learner, task: Task, sampler: Sampler, order: random.Random
    ) -> None:
        self.learner, self.task, self.sampler, self.order = learner, task, sampler, order
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._batch: BatchInFlight | None = None
        self._optimizer_steps, self._synced_at = 0, -1
        self._difference: dict[str, float] = {}

        def count(*_) -> None:
            self._optimizer_steps += 1

        learner.optimizer.register_step_post_hook(count)

    def begin(self, step: int) -> None:
        """Give the sampler the weights of the policy, and start to sample the batch of a step."""
        config = self.learner.config
        generator = torch.Generator().manual_seed((config.seed + (step << 32)) % 2**63)
        policy = self.learner.policy
        policy = replace(policy, ranks=replace(policy.ranks, generator=generator))
        order = random.Random()
        order.setstate(self.order.getstate())
        questions = sample_questions(self.task.train, config.prompts, order)
        if self._synced_at != self._optimizer_steps:
            self.sampler.sync(policy)
            self._difference = self._compare(policy, questions[:PROBE_QUESTIONS])
            self._synced_at = self._optimizer_steps
        prompts = policy.encode([question.prompt for question in questions])
        completions = self._thread.submit(
            self.sampler.sample, policy, prompts, config.group_size, config.temperature
        )
        self._batch = BatchInFlight(
            policy, questions, order, completions, self._synced_at, self._difference
        )

    def _compare(self, policy: Policy, questions: list[Question]) -> dict[str, float]:
        """Compare the sampler with the policy before the next update changes the policy."""
        learner = self.learner
        config = learner.config
        short = replace(policy, max_new_tokens=min(PROBE_TOKENS, policy.max_new_tokens))
        samples = short.sample(questions, config.group_size, config.temperature, self.sampler)
        none = torch.zeros(len(samples.texts))
        minibatches = list(learner.minibatches(samples, none.to(policy.device), none))
        return learner.compare_with_sampler(minibatches, f"before step {learner.steps + 1}")

    def collect(self, step: int) -> tuple[Rollouts, dict[str, float]]:
        """Wait for the batch of a step and reward it; return it with metrics of its sampling.

        With --dynamic-sampling, further rounds are sampled now, from the same weights.
        """
        if self._batch is None:
            self.begin(step)
        batch = self._batch
        assert batch is not None
        started = time.perf_counter()
        completions = batch.completions.result()  # an error in the thread is raised here
        waited = time.perf_counter() - started
        self._batch = None
        self.order.setstate(batch.order.getstate())
        config, sampled = self.learner.config, _Sampled(completions)
        first = sample_completions(batch.policy, self.task, sampled, batch.questions, config)
        rollouts = replace_groups_without_signal(
            first, batch.policy, self.task, self.sampler, self.order, config
        )
        return rollouts, {
            "sampling/staleness": self._optimizer_steps - batch.synced_at,
            "sampling/wait_time": waited,
            **batch.difference,
        }

    def wait(self) -> None:
        """Wait for the batch in flight: an engine may change the global random generators."""
        if self._batch is not None:
            wait([self._batch.completions])

    def close(self) -> None:
        """Wait for the thread: a sampler cannot be stopped while it samples."""
        if self._batch is not None and not self._batch.completions.done():
            print("waiting for the sampler to complete its batch", file=sys.stderr)
        self._thread.shutdown()


@dataclass(frozen=True)
class _Sampled(Sampler):
    """Returns completions that were sampled before."""

    completions: Completions

    def sample(self, policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
        return self.completions
