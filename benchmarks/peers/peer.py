"""The interface of a measured implementation, and helpers that several of them share.

An adapter takes a Problem and returns the outputs of its task by name, differentiable in the
problem's leaves: log-probs, entropies and KLs with the shape [N] or [B, T], losses 0-dim. The
outputs of masked tokens are 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

import grpo_kernels
from benchmarks.core.problem import Problem

Outputs = dict[str, Tensor]
Adapter = Callable[[Problem], Outputs]


@dataclass(frozen=True)
class Peer:
    """An implementation and the tasks that it supports."""

    name: str
    tasks: dict[str, Adapter] = field(hash=False)
    leaves_out: str  # for the report
    cost: str = ""  # what takes its time where it loses, for the report
    package: str | None = None  # on the package index, if it needs one beside torch
    every_shape: bool = True  # False: the base shape only, because each shape is compiled
    every_phase: bool = True  # False: "both" only, because each phase is compiled
    prepare: Callable[[Problem], Problem] = lambda problem: problem  # adapts inputs, unclocked

    def missing(self) -> str | None:
        """Return the reason why this implementation cannot run here, or None."""
        if self.package is None:
            return None
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        return None


def with_entropy_as_value(adapter: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Return the adapter with an entropy that has no gradient, which trainers log."""

    def adapted(*arguments: Any, **keywords: Any) -> Outputs:
        outputs = adapter(*arguments, **keywords)
        return outputs | {"entropy": outputs["entropy"].detach()}

    return adapted


def on_copied_rows(adapter: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Return the adapter with a row of hidden states per token, for libraries without a tree."""
    return lambda problem, **keywords: adapter(problem.with_copied_rows(), **keywords)


def policy_loss_of(problem: Problem, logprob: Tensor) -> Outputs:
    """Compute the objective in plain torch, for libraries that have log-probs only."""
    output = grpo_kernels.policy_loss(
        logprob.view(problem.tokens.shape),
        problem.advantages,
        mask=problem.mask,
        old_logprob=problem.old_logprob,
    )
    return {"loss": output.loss}


def unmasked(problem: Problem, x: Tensor) -> Tensor:
    """Select the unmasked tokens of x [B, T, ...]: [n, ...], for libraries without a mask."""
    return x.flatten(0, 1) if problem.mask is None else x[problem.mask]


def scatter_unmasked(problem: Problem, x: Tensor) -> Tensor:
    """Put x [n] back at the unmasked tokens: [B, T], 0 elsewhere."""
    if problem.mask is None:
        return x.view(problem.tokens.shape)
    return x.new_zeros(problem.tokens.shape).masked_scatter(problem.mask, x)
