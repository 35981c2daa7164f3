"""Read counts from the machine code of the compiled kernels and predict their time.

    python -m benchmarks.codegen                        sm_90, bf16
    python -m benchmarks.codegen --all --json FILE      every target and dtype
    python -m benchmarks.codegen --spread               the same for the main kernels; each of the
                                                        others in each dtype on one of the targets

No GPU is needed: each kernel is compiled offline and disassembled with the tools in Triton's own
wheel. The report gives, for each pass over the row, the instructions and special-function calls
(exponentials, reciprocals) per vocabulary entry, the bytes of each load and store per thread, and
the barriers; for the kernel, its registers, spills and shared memory. The time is predicted from
these by chips.py; it is not measured.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path

from benchmarks.codegen.kernel_report import KernelReport, make_report
from benchmarks.codegen.variants import LAYOUTS, TARGETS, N, V, variants

HEAD = (
    f"{'kernel':45} {'target':7}{'dtype':10}{'regs':>4}{'spill':>6}{'shared':>7}"
    f"{'resident':>9}  {'instr./spec. a pass':20} {'binds':8}{'time':>10}{'floor':>6}"
)

DEFAULT = ("sm_90", "bf16")
# One of each kernel that a training step launches, with all that it computes at once.
MAIN_KERNELS = (
    "token_stats_forward: log-prob, entropy",
    "token_stats_backward: log-prob, entropy",
    "token_stats_part: log-prob, entropy",
    "grpo_loss: k3, entropy, importance",
)


def table_row(report: KernelReport) -> str:
    text = f"{report.kernel:45} {report.target:7}{report.dtype:10}{report.registers:4}"
    text += f"{report.spills:6}{report.shared_bytes:7}"
    if report.prediction is None:
        return text + f"  loads of {report.load_bytes[-1]} bytes" if report.load_bytes else text
    passes = " + ".join(f"{loop.instructions:.1f}/{loop.special:.2f}" for loop in report.loops)
    prediction = report.prediction
    text += f"{report.resident_programs:9}  {passes:20} {prediction['binds']:8}"
    return text + f"{1e3 * prediction['seconds']:7.2f} ms{100 * prediction['of_floor']:5.0f}%"


def spread(names: list[str]) -> list[tuple[str, str, str]]:
    """Return about a quarter of the cases (variant, target, dtype), without those of DEFAULT.

    A main kernel meets every target in every dtype. Any other meets each dtype once and each target
    once, and the pairs of dtype and target change from one variant to the next.
    """
    targets = tuple(TARGETS)
    return [
        (name, target, dtype)
        for i, name in enumerate(names)
        for j, dtype in enumerate(LAYOUTS)
        for target in (targets if name in MAIN_KERNELS else (targets[(i + j) % len(targets)],))
        if (target, dtype) != DEFAULT
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every target and dtype")
    parser.add_argument("--spread", action="store_true", help="a quarter of --all, see spread()")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    names = [variant.name for variant in variants()]
    if arguments.spread:
        cases = spread(names)
    elif arguments.all:
        cases = list(product(names, TARGETS, LAYOUTS))
    else:
        cases = [(name, *DEFAULT) for name in names]
    print(f"Predicted from machine code for {N} rows of {V:,} entries; nothing was timed.\n{HEAD}")
    reports = []
    with ProcessPoolExecutor() as pool:
        for report in pool.map(make_report, cases):
            reports.append(asdict(report))
            print(table_row(report), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
