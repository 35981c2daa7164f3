"""token_stats on this machine against the materialising reference: time and extra memory.

    pytest benchmarks                          clocks, and the comparison at the end
    pytest benchmarks --benchmark-disable      every case once, unclocked

The shape is that of one micro-batch under the Llama 3 head: 512 tokens x 128,256 logits in bf16.
"""

import statistics
import time

import pytest
import torch

import grpo_kernels
import reference
from benchmarks.memory import peak_extra_bytes

N, V = 512, 128_256
IMPLEMENTATIONS = {"fused": grpo_kernels, "reference": reference}


def make_inputs(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, V, generator=generator).mul_(3).bfloat16()
    return logits, torch.randint(0, V, (n,), generator=generator)


def forward_backward(module, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    leaf = logits.detach().requires_grad_()
    stats = module.token_stats(leaf, tokens)
    (stats.logprob.sum() - 0.01 * stats.entropy.sum()).backward()
    return leaf.grad


@pytest.fixture(scope="module")
def inputs():
    return make_inputs()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_forward_backward(benchmark, inputs, name):
    benchmark.group = f"token_stats forward + backward, {N} x {V}, bf16"
    gate_logits, gate_tokens = make_inputs(4)
    exact = forward_backward(reference, gate_logits.double(), gate_tokens)
    ours = forward_backward(IMPLEMENTATIONS[name], gate_logits, gate_tokens)
    assert (ours.double() - exact).abs().max() < 2**-8  # half a bf16 step at 1

    benchmark.pedantic(
        forward_backward, (IMPLEMENTATIONS[name], *inputs), rounds=5, warmup_rounds=1
    )
    benchmark.extra_info["extra_bytes"] = peak_extra_bytes(
        lambda: forward_backward(IMPLEMENTATIONS[name], *inputs)
    )


def test_fused_takes_at_most_a_quarter_of_the_reference_memory(inputs):
    extra = {
        name: peak_extra_bytes(lambda module=module: forward_backward(module, *inputs))
        for name, module in IMPLEMENTATIONS.items()
    }
    print({name: f"{each / 2**20:.0f} MiB" for name, each in extra.items()})
    assert extra["fused"] <= extra["reference"] / 4


def test_fused_is_no_slower_than_the_reference(inputs, pytestconfig):
    if pytestconfig.getoption("benchmark_disable"):
        pytest.skip("clocks are off")
    seconds = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(5):  # in turn, so that a change in the machine's speed meets both
        for name, module in IMPLEMENTATIONS.items():
            start = time.perf_counter()
            forward_backward(module, *inputs)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print({name: f"{each:.2f} s" for name, each in medians.items()})
    assert medians["fused"] <= medians["reference"]
