"""Print the chunk sizes that are planned for each GPU, and the predicted time of every part.

    python -m benchmarks.plan               all GPUs
    python -m benchmarks.plan --write       also put the H100's table into benchmarks/README.md

Nothing is measured: grpo_kernels/lm_head/roofline.py predicts, and says with which assumptions. The
old plan is that of a GPU whose rates are not known: one chunk size for logits and gradients, from a
workspace of 1 GiB.
"""

import argparse
from collections.abc import Iterator

import torch

from benchmarks.core.results import ROOT
from benchmarks.core.shapes import HEADS
from benchmarks.report.pages import replace_marked
from benchmarks.report.targets import MODEL, TARGETS
from grpo_kernels.lm_head.chunk_size import plan_chunks
from grpo_kernels.lm_head.device_rates import DEVICES, H100, DeviceRates
from grpo_kernels.lm_head.roofline import ChunkSizes, HeadWork, Prediction, predict

README = ROOT / "benchmarks" / "README.md"
V, H = HEADS[MODEL].V, HEADS[MODEL].H
TOKENS = (8192, 16_384)
DTYPE = torch.bfloat16

# The loops over the chunks of each operator, and the task and phase of its target. Logits are fp32:
# statistics read 4 bytes of each; a gradient reads 4 and writes 2; the loss in one launch reads 4
# and writes 2, and reads 4 again from the L2 where the rows fit.
STATISTICS = HeadWork(0, V, H, DTYPE.itemsize, row_bytes=4)
GRADIENT = STATISTICS._replace(row_bytes=6, hidden_grad=True, weight_grad=True)
BOTH_MODELS = STATISTICS._replace(logits=2, row_bytes=8)
OPERATORS: dict[str, tuple[tuple[HeadWork, ...], tuple[str, str]]] = {
    "F: statistics": ((STATISTICS,), ("linear_token_stats", "forward")),
    "frozen head": (
        (STATISTICS._replace(row_bytes=4 + 6, hidden_grad=True),),
        ("linear_token_stats_frozen", "both"),
    ),
    "A: loss": ((GRADIENT._replace(row_again=4),), ("linear_grpo_loss", "both")),
    "B: statistics and gradient": ((STATISTICS, GRADIENT), ("linear_token_stats", "both")),
    "F, reverse KL": ((BOTH_MODELS,), ("linear_reverse_kl", "forward")),
    "A, reverse KL": (
        (GRADIENT._replace(logits=2, row_bytes=8 + 10),),
        ("linear_grpo_loss_kl", "both"),
    ),
}
COLUMNS = (
    "operator", "N", "logits at a time", "gradients at a time", "logits", "rows", "d_hidden",
    "d_weight", "d_weight traffic", "copies", "gaps", "predicted", "old plan", "target",
)  # fmt: skip


def planned_sizes(work: HeadWork, rates: DeviceRates | None, memory: int) -> ChunkSizes:
    """Return the sizes of the plan; without rates, those of the old one."""
    return plan_chunks(
        work.N, V, H, DTYPE, memory, rates, kl=work.logits == 2,
        gradient=work.hidden_grad, weight_grad=work.weight_grad and rates is not None,
    )  # fmt: skip


def predict_operator(
    name: str, N: int, device: DeviceRates, rates: DeviceRates | None
) -> tuple[ChunkSizes, Prediction]:
    """Predict an operator on a device with the plan for these rates.

    Returns:
        (the sizes of its last loop, its seconds).
    """
    sizes, parts = ChunkSizes(0, 0), []
    for loop in OPERATORS[name][0]:
        work = loop._replace(N=N)
        sizes = planned_sizes(work, rates, device.memory)
        parts.append(predict(work, sizes, device))
    return sizes, Prediction(*map(sum, zip(*parts, strict=True)))


def rows(device: DeviceRates) -> Iterator[tuple[str, ...]]:
    """Format a line for each operator and number of tokens."""
    targets = {(x.task, x.phase, x.N): x.milliseconds for x in TARGETS}
    for name, (_, task) in OPERATORS.items():
        for N in TOKENS:
            sizes, seconds = predict_operator(name, N, device, device)
            _, old = predict_operator(name, N, device, None)
            target = targets.get((*task, N)) if device == H100 else None
            yield (
                name, f"{N:,}", *(f"{size:,}" for size in sizes),
                *(f"{1e3 * part:.2f}" for part in seconds),
                *(f"{1e3 * total:.1f}" for total in (seconds.total, old.total)),
                "" if target is None else f"{target:g}",
            )  # fmt: skip


def table(device: DeviceRates) -> str:
    """Return the table of a device in Markdown."""
    lines = [COLUMNS, (":--", *["--:"] * (len(COLUMNS) - 1)), *rows(device)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def readme() -> str:
    """Return benchmarks/README.md with the table of today's plan for the H100."""
    text = README.read_text(encoding="utf-8")
    return replace_marked(text, "plan figures", table(H100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update benchmarks/README.md")
    arguments = parser.parse_args()
    for device in DEVICES:
        print(f"{device.name}, {MODEL}, bf16: predicted milliseconds, not measured")
        print(f"{device.bandwidth / 1e12:.2f} TB/s, {device.matmul_rate / 1e12:.0f} TFLOP/s\n")
        print(table(device), end="\n\n")
    if arguments.write:
        README.write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
