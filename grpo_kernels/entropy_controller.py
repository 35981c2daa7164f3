"""AdaptiveEntropy: a controller of the entropy coefficient."""

from collections.abc import Mapping

from .validation import expect_number


class AdaptiveEntropy:
    """Adapt the entropy coefficient so that the policy's entropy stays above a target.

        c <- min(c + step, maximum)    after a step with entropy <= target
        c <- max(c - step, minimum)    after a step with entropy > target
        coef = c if the last entropy <= target, else 0

    The bonus is off as soon as the entropy is high enough, while c decreases slowly. Before the
    first update `coef` is the initial c.

        control = AdaptiveEntropy(target=0.2)
        config = dataclasses.replace(config, entropy_coef=control.coef)     # for the next step
        control.update(output.metrics["entropy"].item())                    # after it

    The entropy must also be measured in steps whose coefficient is 0.

    Args:
        target: entropy in nats, mean over tokens, at least 0.
        coef: initial value of c, minimum to maximum.
        step: change of c per update, greater than 0.
        minimum: lower bound of c, at least 0.
        maximum: upper bound of c, at least `minimum`.

    Raises:
        TypeError, ValueError: an argument is not a number, or out of its range.

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
        expect_number("target", target, at_least=0)
        expect_number("step", step, above=0)
        expect_number("minimum", minimum, at_least=0)
        expect_number("maximum", maximum, at_least=minimum)
        expect_number("coef", coef, at_least=minimum, at_most=maximum)
        self.target, self.step = target, step
        self.minimum, self.maximum = minimum, maximum
        self._coef = coef
        self._entropy: float | None = None

    @property
    def coef(self) -> float:
        """The entropy_coef of the next step."""
        return 0.0 if self._entropy is not None and self._entropy > self.target else self._coef

    def update(self, entropy: float) -> None:
        """Update the coefficient from the mean entropy of the step just made."""
        expect_number("entropy", entropy)
        change = self.step if entropy <= self.target else -self.step
        self._coef, self._entropy = self._clamp(self._coef + change), float(entropy)

    def state_dict(self) -> dict[str, float | None]:
        """Return the state to save in a checkpoint; it is JSON."""
        return {"coef": self._coef, "entropy": self._entropy}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Load a `state_dict`; its coefficient is clamped to this object's bounds."""
        if not isinstance(state, Mapping) or set(state) != {"coef", "entropy"}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must be a dict of 'coef' and 'entropy', got {got}")
        coef, entropy = state["coef"], state["entropy"]
        expect_number("state['coef']", coef, at_least=0)
        assert coef is not None
        if entropy is not None:
            expect_number("state['entropy']", entropy)
        self._coef, self._entropy = self._clamp(coef), entropy

    def _clamp(self, coef: float) -> float:
        return min(max(coef, self.minimum), self.maximum)
