"""The whole training step of a language model with random weights, under each head of the loss.

pytest benchmarks/test_step.py             clocks
pytest benchmarks/test_step.py --quick     a tiny model, once
"""

import pytest

from benchmarks.core import clock
from benchmarks.core import step as steps
from benchmarks.peers import OURS, PEERS

WARM_UP = 12  # steps, before whatever is clocked first


@pytest.fixture(scope="module")
def setup(harness):
    return steps.SETUPS["tiny" if harness.quick else harness.device.type]


@pytest.fixture(scope="module")
def step(harness, setup):
    step = steps.Step(setup, harness.device)
    for _ in range(1 if harness.quick else WARM_UP):
        step(None)
    return step


@pytest.mark.parametrize("peer", [steps.NO_HEAD, *steps.PEERS_WITH_A_HEAD])
@pytest.mark.benchmark(timer=clock.now)
def test_step(peer, setup, step, harness, request):
    if peer != steps.NO_HEAD and (reason := PEERS[peer].missing()):
        pytest.skip(reason)
    harness.attempt(
        steps.record_of(setup, peer),
        lambda record: harness.run(steps.call_of(step, peer), record, request, "training step"),
        must_work=peer in (OURS, steps.NO_HEAD),
    )
