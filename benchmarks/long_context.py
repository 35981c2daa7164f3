"""Measure extra memory and time per token of linear_grpo_loss from short to very long batches.

    python -m benchmarks.long_context --tokens 8192 65536 1048576 --vocab 49152 --hidden 64
    python -m benchmarks.long_context --tokens 1024 4096 --chunk-tokens 256    seconds, any machine

Loss and gradients of one packed sequence, called once for each size, because a million tokens take
minutes. Memory and time are of that call; the profiler that counts memory costs it less than the
noise. The rate of one size predicts the time of the next: a size that would end after --seconds is
left out and named.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.core import clock
from benchmarks.core.memory import peak_extra_bytes
from benchmarks.core.problem import STD
from benchmarks.core.results import describe_machine, write_json
from benchmarks.core.shapes import DTYPES
from benchmarks.report.tables import table
from grpo_kernels import LossConfig, linear_grpo_loss

TOKENS = (8192, 32_768, 131_072, 524_288, 1_048_576)
SECONDS = 540.0
COLUMNS = ("tokens", "time", "time per token", "extra memory", "of it d_hidden", "the rest")


@dataclass
class Row:
    """One size; None where nothing was measured."""

    N: int
    extra_bytes: int | None = None  # peak, inputs not counted
    d_hidden_bytes: int | None = None  # the gradient that the caller asked for
    seconds: float | None = None
    reason: str | None = None  # why a size was left out

    def cells(self) -> list[str]:
        if self.extra_bytes is None or self.d_hidden_bytes is None:
            return [f"{self.N:,}", self.reason or "", "", "", "", ""]
        times = ["", ""]
        if self.seconds is not None:
            times = [f"{self.seconds:.2f} s", f"{1e6 * self.seconds / self.N:.1f} µs"]
        sizes = (self.extra_bytes, self.d_hidden_bytes, self.extra_bytes - self.d_hidden_bytes)
        return [f"{self.N:,}", *times, *(f"{size / 2**20:.1f} MiB" for size in sizes)]


def measure(
    N: int,
    V: int,
    H: int,
    dtype: str,
    device: torch.device,
    *,
    chunk_tokens: int | None = None,
) -> Row:
    """Measure memory and time of one call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        x = torch.randn(size, generator=generator, device=device, dtype=DTYPES[dtype])
        return x.mul_(std).requires_grad_()

    hidden, weight = normal(N, H), normal(V, H, std=STD / H**0.5)
    tokens = torch.randint(0, V, (N,), generator=generator, device=device)
    advantages = torch.randn(N, generator=generator, device=device)
    seconds = 0.0

    def loss_and_gradients() -> None:
        nonlocal seconds
        start = clock.now()
        loss, _ = linear_grpo_loss(
            hidden, weight, tokens, advantages, config=LossConfig.dapo(), chunk_tokens=chunk_tokens
        )
        loss.backward()
        seconds = clock.now() - start

    extra_bytes = peak_extra_bytes(loss_and_gradients)
    return Row(N, extra_bytes, hidden.nbytes, seconds)


def measure_all(
    settings: argparse.Namespace, device: torch.device, results: Path | None
) -> list[Row]:
    """Measure sizes in rising order while the prediction stays below the limit."""
    machine = describe_machine(device)
    shape = {name: getattr(settings, name) for name in ("vocab", "hidden", "dtype", "chunk_tokens")}
    rows: list[Row] = []
    # The first call of a process is slower.
    measure(1, settings.vocab, settings.hidden, settings.dtype, device)
    start, seconds_per_token = time.perf_counter(), 0.0
    for N in sorted(settings.tokens):
        begin = time.perf_counter()
        predicted = begin - start + N * seconds_per_token
        if predicted > settings.seconds:
            rows.append(Row(N, reason=f"left out: ends after {predicted:.0f} s"))
        else:
            rows.append(
                measure(
                    N,
                    settings.vocab,
                    settings.hidden,
                    settings.dtype,
                    device,
                    chunk_tokens=settings.chunk_tokens,
                )
            )
            seconds_per_token = (time.perf_counter() - begin) / N
        print(", ".join(filter(None, rows[-1].cells())), flush=True)
        if results is not None:
            content = {"machine": machine, "shape": shape, "rows": [asdict(row) for row in rows]}
            write_json(results, content)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--chunk-tokens", type=int, help="instead of the planned chunk size")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for all sizes")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write a JSON file as well")
    settings = parser.parse_args(arguments)
    rows = measure_all(settings, clock.default_device(), settings.results)
    print(f"\nV = {settings.vocab:,}, H = {settings.hidden}, {settings.dtype}\n")
    print(table(COLUMNS, [row.cells() for row in rows]))


if __name__ == "__main__":
    main()
