"""Where the time of the chunk loop goes: a loss and its gradients under torch.profiler.

    python -m benchmarks.profile [--model NAME] [--tokens N] [--chunk-tokens N] [--trace FILE]

Prints the operators that take the most time, the share of the matrix products, and how often the
host waited for the device; FILE is a trace for chrome://tracing or Perfetto.
"""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.core import clock
from benchmarks.core import problem as problems
from benchmarks.core.shapes import DTYPES, HEADS, Shape
from grpo_kernels import linear_grpo_loss

PRODUCTS = ("aten::mm", "aten::addmm")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
ROWS = 12  # printed


def traced(shape: Shape, chunk_tokens: int | None, device: torch.device) -> profile:
    """The profile of one loss with its gradients, after another that warmed up."""
    problem = problems.make("hidden", shape, device)

    def step() -> None:
        leaves = list(problem.leaves.values())
        inputs = (problem.hidden, problem.weight, problem.tokens, problem.advantages)
        output = linear_grpo_loss(
            *inputs, old_logprob=problem.old_logprob, chunk_tokens=chunk_tokens
        )
        torch.autograd.grad(output.loss, leaves)

    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    return profiler


def summary(profiler: profile, device: torch.device) -> str:
    """A table of the operators by the time that is their own, and what it adds up to."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda each: -getattr(each, attribute))
    total = sum(getattr(each, attribute) for each in events)
    lines = [f"{'operator':60}{'calls':>7}{'ms':>10}{'share':>8}"]
    for each in events[:ROWS]:
        own = getattr(each, attribute)
        lines.append(f"{each.key[:58]:60}{each.count:7}{own / 1e3:10.2f}{own / total:8.1%}")
    products = sum(getattr(each, attribute) for each in events if each.key in PRODUCTS)
    waits = sum(each.count for each in events if each.key in WAITS)
    lines.append(f"matrix products: {products / total:.1%} of {total / 1e3:.1f} ms")
    if device.type == "cuda":
        # One is the end of the measurement, one the count of the tokens that are not masked.
        lines.append(f"the host waited {waits} times")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(HEADS), default="SmolLM2 135M")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--trace", type=Path, help="write the whole trace to this file")
    arguments = parser.parse_args()
    device = clock.device()
    shape = Shape(arguments.model, arguments.tokens, arguments.dtype)
    profiler = traced(shape, arguments.chunk_tokens, device)
    print(f"{shape}, on {device.type}\n{summary(profiler, device)}")
    if arguments.trace:
        profiler.export_chrome_trace(str(arguments.trace))


if __name__ == "__main__":
    main()
