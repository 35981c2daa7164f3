"""Calls at the same time from two threads, and on two streams, give the bits they give alone."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.helpers.every_op import run_every_op

ROUNDS = 12


def assert_same(results, expected):
    for seed, found in results:
        assert all(torch.equal(x, y) for x, y in zip(found, expected[seed], strict=True)), seed


@pytest.fixture
def eager_switches():
    """Threads that take turns every 20 us, not every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
def test_two_threads_are_bitwise_equal_to_one(backend, eager_switches):
    """Backward too: autograd runs it on the thread that asks."""
    expected = [run_every_op(seed) for seed in range(2)]
    together = Barrier(2)

    def many(seed):
        together.wait()
        return [(seed, run_every_op(seed)) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(many, range(2)):
            assert_same(results, expected)


@pytest.mark.gpu
def test_two_streams_are_bitwise_equal_to_one():
    expected = [run_every_op(seed, "cuda") for seed in range(2)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(ROUNDS):
        for seed, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((seed, run_every_op(seed, "cuda")))
    torch.cuda.synchronize()
    assert_same(results, expected)
