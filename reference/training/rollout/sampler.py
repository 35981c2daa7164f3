"""The interface of samplers.

To add one, subclass `Sampler`, write `sample`, and name the class in `samplers.SAMPLERS`. A sampler
that holds weights of its own, such as an inference engine, also writes `start`, `sync` and `close`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from reference.training.rollout.generate import Completions, Prompts


class Sampler:
    """Draws groups of completions from a policy.

    A run calls `start` once, `sync` and then `sample` in each step, and `close` at the end, also
    after an error. A failure that the user can mend is a UserError.

    Attributes:
        has_own_weights: completions do not come from `policy.model`, but from weights that `sync`
            has copied. The trainer then compares the log-probs of both in each step.
        dtype: the dtype of its computations, on which the bound of the comparison depends; None if
            it is not known.
    """

    has_own_weights: ClassVar[bool] = False
    dtype: torch.dtype | None = None

    def start(self, policy, directory: Path) -> None:
        """Prepare to sample from a loaded policy, and check that this is possible.

        All ranks call this. Files that are passed on may be written into the run's `directory`.
        """

    def sync(self, policy) -> None:
        """Take over the weights of `policy.model`: the next completions are drawn from them.

        All ranks call this, and the weights are whole then, also under FSDP.
        """

    def sample(self, policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
        """Draw `group_size` completions of each prompt; temperature 0 is greedy.

        They are drawn from softmax(logits / temperature), truncated by `policy.truncation` alone.
        The log-probs are those of this distribution.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free what `start` has taken; may be called twice, and without `start`."""
