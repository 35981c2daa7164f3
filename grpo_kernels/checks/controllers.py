"""Checks of controllers: what they are made with, and what they take up again."""

from collections.abc import Mapping

from ..validation import expect_number


def check_adaptive_entropy(
    target: object, coef: object, step: object, minimum: object, maximum: object
) -> None:
    expect_number("target", target, at_least=0)
    expect_number("step", step, above=0)
    expect_number("minimum", minimum, at_least=0)
    expect_number("maximum", maximum, at_least=minimum)
    expect_number("coef", coef, at_least=minimum, at_most=maximum)


def check_entropy_state(state: object) -> None:
    if not isinstance(state, Mapping) or set(state) != {"coef", "entropy"}:
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state must be a dict of 'coef' and 'entropy', got {got}")
    expect_number("state['coef']", state["coef"], at_least=0)
    if state["entropy"] is not None:
        expect_number("state['entropy']", state["entropy"])
