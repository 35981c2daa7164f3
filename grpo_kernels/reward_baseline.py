"""EMABaseline: an exponential moving average of the rewards, one for each agent."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .validation import expect_finite, expect_number, expect_tensor


class EMABaseline:
    """Subtract from the rewards an exponential moving average of the earlier ones.

        A = r - b
        b <- decay·b + (1 - decay)·mean(r)    after the advantages are computed

    b is the mean of the first rewards in the first call. Later it does not depend on the rewards
    that it is subtracted from, so the gradient has no bias; and no group is needed: one completion
    per prompt is enough, and a group of equal rewards has a learning signal.

        baseline = EMABaseline()
        advantages = baseline.advantage(rewards)                        # in every step
        advantages = baseline.advantage(rewards, agent="proposer")      # each agent has its own b

    Args:
        decay: at least 0, below 1.

    Raises:
        TypeError, ValueError: an argument is of another type, or out of its range.
    """

    def __init__(self, decay: float = 0.9) -> None:
        expect_number("decay", decay, at_least=0)
        if decay >= 1:
            raise ValueError(f"decay must be below 1, got {decay}")
        self.decay = decay
        self._means: dict[str, Tensor] = {}

    def advantage(self, rewards: Tensor, agent: str = "policy") -> Tensor:
        """Return rewards minus the agent's baseline, and update it.

        An empty tensor changes nothing.

        Args:
            rewards: any shape, any real dtype.

        Returns:
            As `rewards`, fp32 (fp64 for fp64 rewards), not differentiable.
        """
        expect_tensor("rewards", rewards)
        if rewards.dtype == torch.bool or rewards.is_complex():
            raise TypeError(f"rewards must hold real numbers, got {rewards.dtype}")
        expect_finite("rewards", rewards)
        rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
        if rewards.numel() == 0:
            return rewards
        mean = rewards.double().mean()
        before = self._means.get(agent, mean).to(mean.device)
        self._means[agent] = self.decay * before + (1 - self.decay) * mean
        return (rewards - before).to(rewards.dtype)

    def state_dict(self) -> dict[str, float]:
        """Return the baseline of each agent, to save in a checkpoint; it is JSON."""
        return {agent: mean.item() for agent, mean in self._means.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load a `state_dict`."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict of numbers by agent, got {type(state).__name__}")
        for agent, mean in state.items():
            expect_number(f"state[{agent!r}]", mean)
        self._means = {
            agent: torch.tensor(mean, dtype=torch.float64) for agent, mean in state.items()
        }
