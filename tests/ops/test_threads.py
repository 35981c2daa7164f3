"""Concurrent calls from two threads or on two streams are bitwise equal to single calls."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.helpers.every_op import run_every_op

ROUNDS = 12


def assert_same(results, expected):
    for seed, tensors in results:
        assert all(torch.equal(x, y) for x, y in zip(tensors, expected[seed], strict=True)), seed


@pytest.fixture
def frequent_thread_switches():
    """Switch threads every 20 us instead of every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
def test_two_threads_are_bitwise_equal_to_one(backend, frequent_thread_switches):
    expected = [run_every_op(seed) for seed in range(2)]
    start = Barrier(2)

    def run_rounds(seed):
        start.wait()
        return [(seed, run_every_op(seed)) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(run_rounds, range(2)):
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
