"""The result file of the comparison with TRL: results/trl_parity.md."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from benchmarks.core.results import DIRECTORY
from benchmarks.report import tables
from benchmarks.trl_parity.compare import (
    differences_from_trl,
    make_batch,
    unintended_differences,
)
from benchmarks.trl_parity.differences import (
    DIFFERENCES,
    Difference,
    excluded_parts,
    is_excluded,
)
from benchmarks.trl_parity.options import EPSILONS, FIXED, OPTIONS, PLAIN, Options, settings_of

RESULTS = DIRECTORY / "trl_parity.md"
KINDS = ("loss", "gradient", "metrics")
EXAMPLES = 8  # batches per intended difference
TEMPLATE = """\
# TRL's losses and ours

Written by `python -m benchmarks.trl_parity`: {versions}, fp64, on a CPU.

TRL's own `_compute_loss` and `policy_loss` of grpo_kernels and of the reference are called on the
same per-token tensors. A row is over all combinations of the option with the others, each on a
random batch of its own; a figure is the largest absolute difference from TRL. Combinations whose
gradients are compared are counted.

{table}

In all of them {fixed}.

## Intended differences

They are left out above, in the parts named last. A figure is the largest difference in an example.

{differences}
"""


@dataclass
class Worst:
    """The number of some combinations and their largest difference by kind of part."""

    count: int = 0
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def add(self, differences: Mapping[str, float]) -> None:
        self.count += 1
        for part, value in differences.items():
            kind = part if part in KINDS else "metrics"
            self.largest[kind] = max(self.largest[kind], value)


def option_names() -> list[str]:
    return [f"{name}={value}" for name, values in OPTIONS.items() for value in values]


def sweep(combinations: Iterable[Options]) -> dict[str, Worst]:
    """Compare all combinations; return a row per option, "name=value", and one for all, ""."""
    rows = {name: Worst() for name in ["", *option_names()]}
    for seed, options in enumerate(combinations):
        if "gradient" in excluded_parts(options):
            continue
        ours, reference = unintended_differences(options, seed).values()
        larger = {part: max(ours[part], reference[part]) for part in ours}
        for name in ["", *(f"{name}={value}" for name, value in options.items())]:
            rows[name].add(larger)
    return rows


def largest_in_example(difference: Difference) -> float:
    """Return the largest value of an intended difference over EXAMPLES batches."""
    options = PLAIN | difference.example
    return max(
        value
        for seed in range(EXAMPLES)
        for parts in differences_from_trl(
            settings_of(options), make_batch(seed, options["batch"])
        ).values()
        for part, value in parts.items()
        if is_excluded(part, difference.parts)
    )


def format_page(rows: Mapping[str, Worst]) -> str:
    def listed(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"`{name}={value}`" for name, value in settings.items())

    def figure(value: float) -> str:
        return "not a number" if math.isinf(value) else f"{value:.1e}"

    table = tables.table(
        ["option of TRL", "combinations", *KINDS],
        (
            [f"`{name or 'all'}`", f"{worst.count:,}", *map(figure, worst.largest.values())]
            for name, worst in rows.items()
        ),
    )
    epsilons = (f"with {name} {listed(settings)}" for name, settings in EPSILONS.items())
    items = []
    for difference in DIFFERENCES:
        parts = ", ".join(f"`{part}`" for part in sorted(difference.parts))
        value = figure(largest_in_example(difference))
        items.append(f"* **{difference.where}** ({value}): {difference.reason}. In {parts}.")
    return TEMPLATE.format(
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "trl")),
        table=table,
        fixed="; ".join((listed(FIXED), *epsilons)),
        differences="\n".join(items),
    )
