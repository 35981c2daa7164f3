"""Profile the chunk loop: a loss and its gradients under torch.profiler.

    python -m benchmarks.profile [--model NAME] [--tokens N] [--chunk-tokens N] [--trace FILE]

Prints the operators that take the most time, the share of the matmuls, and how often the host
waited for the device. FILE is a trace for chrome://tracing or Perfetto.
"""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.core import clock
from benchmarks.core.problem import make_problem
from benchmarks.core.shapes import DTYPES, HEADS, Shape
from grpo_kernels import linear_grpo_loss

MATMULS = ("aten::mm", "aten::addmm")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
ROWS = 12  # printed operators


def profile_loss(shape: Shape, chunk_tokens: int | None, device: torch.device) -> profile:
    """Profile one loss with its gradients, after a warm-up."""
    problem = make_problem("hidden", shape, device)

    def step() -> None:
        output = linear_grpo_loss(
            problem.hidden,
            problem.weight,
            problem.tokens,
            problem.advantages,
            old_logprob=problem.old_logprob,
            chunk_tokens=chunk_tokens,
        )
        torch.autograd.grad(output.loss, list(problem.leaves.values()))

    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    return profiler


def summary(profiler: profile, device: torch.device) -> str:
    """Format a table of the operators by their own time, and the totals."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [(getattr(event, attribute), event) for event in profiler.key_averages()]
    rows.sort(key=lambda row: -row[0])
    total = sum(own_time for own_time, _ in rows)
    lines = [f"{'operator':60}{'calls':>7}{'ms':>10}{'share':>8}"]
    for own_time, event in rows[:ROWS]:
        text = f"{event.key[:58]:60}{event.count:7}{own_time / 1e3:10.2f}"
        lines.append(f"{text}{own_time / total:8.1%}")
    matmul_time = sum(own_time for own_time, event in rows if event.key in MATMULS)
    lines.append(f"matmuls: {matmul_time / total:.1%} of {total / 1e3:.1f} ms")
    if device.type == "cuda":
        # One wait ends the measurement, one is for the number of unmasked tokens.
        waits = sum(event.count for _, event in rows if event.key in WAITS)
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
    device = clock.default_device()
    shape = Shape(arguments.model, arguments.tokens, arguments.dtype)
    profiler = profile_loss(shape, arguments.chunk_tokens, device)
    print(f"{shape}, on {device.type}\n{summary(profiler, device)}")
    if arguments.trace:
        profiler.export_chrome_trace(str(arguments.trace))


if __name__ == "__main__":
    main()
