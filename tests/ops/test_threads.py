"""Calls at the same time from two threads, and on two streams, give the bits they give alone."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss, token_stats
from tests.helpers.tensors import make_case, normal

SIZES = [(3, 3, 37), (2, 4, 64)]
ROUNDS = 12


def work(seed, device="cpu"):
    """Losses and gradients of every level, from inputs of this seed's own sizes."""
    B, T, V = SIZES[seed % len(SIZES)]
    logits, tokens = make_case(seed, B, T, V, device=device)
    ref_logits, advantages = (
        normal(seed + 2, B, T, V, device=device),
        normal(seed + 3, B).to(device),
    )
    hidden = normal(seed + 4, B, T, 8, device=device)
    weight = normal(seed + 5, V, 8, device=device)
    leaves = [x.requires_grad_() for x in (logits, hidden, weight)]
    stats = token_stats(logits, tokens, kl="reverse", ref_logits=ref_logits)
    config = LossConfig(entropy_coef=0.01, epsilon_high=0.2 + seed / 100)
    losses = [
        stats.logprob.sum() + stats.entropy.sum() - stats.kl.sum(),
        grpo_loss(logits, tokens, advantages, config=config).loss,
        linear_grpo_loss(hidden, weight, tokens, advantages, config=config, chunk_tokens=8).loss,
    ]
    gradients = torch.autograd.grad(sum(losses), leaves)
    return [x.detach() for x in (*losses, *gradients)]


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
def test_two_threads_give_the_bits_of_one(backend, eager_switches):
    """Backward too: autograd runs it on the thread that asks."""
    expected = [work(seed) for seed in range(2)]
    together = Barrier(2)

    def many(seed):
        together.wait()
        return [(seed, work(seed)) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(many, range(2)):
            assert_same(results, expected)


@pytest.mark.gpu
def test_two_streams_give_the_bits_of_one():
    expected = [work(seed, "cuda") for seed in range(2)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(ROUNDS):
        for seed, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((seed, work(seed, "cuda")))
    torch.cuda.synchronize()
    assert_same(results, expected)
