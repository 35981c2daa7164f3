"""Settings that follow what a run measures."""

from collections.abc import Mapping


class AdaptiveEntropy:
    """An entropy coefficient that rises by a step where the entropy is at most the target.

    Elsewhere it falls by the step, and is not applied in the next one (arXiv:2505.22312).
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
        self.target, self.step = target, step
        self.minimum, self.maximum = minimum, maximum
        self.state = {"coef": coef, "entropy": None}

    @property
    def coef(self) -> float:
        entropy = self.state["entropy"]
        return self.state["coef"] if entropy is None or entropy <= self.target else 0.0

    def update(self, entropy: float) -> None:
        coef = self.state["coef"]
        if entropy <= self.target:
            coef = min(coef + self.step, self.maximum)
        else:
            coef = max(coef - self.step, self.minimum)
        self.state = {"coef": coef, "entropy": entropy}

    def state_dict(self) -> dict[str, float | None]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        coef = min(max(state["coef"], self.minimum), self.maximum)
        self.state = {"coef": coef, "entropy": state["entropy"]}
