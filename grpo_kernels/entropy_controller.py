"""Settings that follow what a run measures."""

from collections.abc import Mapping

from .checks import check_adaptive_entropy, check_entropy_state, expect_number


class AdaptiveEntropy:
    """An entropy coefficient that grows while the policy's entropy is at or below a target.

        c <- min(c + step, maximum)    where entropy <= target, after each step
        c <- max(c - step, minimum)    where entropy > target
        coef = c where the last entropy <= target, else 0

    The bonus is off as soon as the entropy is high enough, while c falls back slowly. Before the
    first update `coef` is the c that it starts with.

        control = AdaptiveEntropy(target=0.2)
        config = dataclasses.replace(config, entropy_coef=control.coef)     # of the next step
        control.update(output.metrics["entropy"].item())                    # after it

    The entropy must be measured in steps whose coefficient is 0 too.

    Args:
        target: entropy in nats, mean over tokens, at least 0.
        coef: what c starts with, minimum to maximum.
        step: what c changes by, greater than 0.
        minimum: of c, at least 0.
        maximum: of c, at least `minimum`.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of its range.

    He et al., 2025 (arXiv:2505.22312).
    """

    def __init__(
        self,
        target: float,
        *,
        coef: float = 0.0,
        step: float = 0.005,
        minimum: float = 0.0,
        maximum: float = 1.0,
    ) -> None:
        check_adaptive_entropy(target, coef, step, minimum, maximum)
        self.target, self.step = target, step
        self.minimum, self.maximum = minimum, maximum
        self._coef, self._entropy = coef, None

    @property
    def coef(self) -> float:
        """The entropy_coef of the next step."""
        return 0.0 if self._entropy is not None and self._entropy > self.target else self._coef

    def update(self, entropy: float) -> None:
        """Take in the mean entropy of the step that was just made."""
        expect_number("entropy", entropy)
        change = self.step if entropy <= self.target else -self.step
        self._coef, self._entropy = self._bounded(self._coef + change), float(entropy)

    def state_dict(self) -> dict[str, float | None]:
        """What a run must keep to go on from here; it is JSON."""
        return {"coef": self._coef, "entropy": self._entropy}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Take up a `state_dict`; its coefficient is brought within this object's bounds."""
        check_entropy_state(state)
        self._coef, self._entropy = self._bounded(state["coef"]), state["entropy"]

    def _bounded(self, coef: float) -> float:
        return min(max(coef, self.minimum), self.maximum)
