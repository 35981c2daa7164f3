"""The result file of the comparison with verl: results/verl_parity.md."""

import math
from importlib.metadata import version

from benchmarks.core.results import DIRECTORY
from benchmarks.report import tables
from benchmarks.verl_parity import estimators, losses, rejection

RESULTS = DIRECTORY / "verl_parity.md"
TEMPLATE = """\
# verl's losses and advantages, and ours

Written by `python -m benchmarks.verl_parity`: {versions}, fp64, on a CPU.

A row calls verl's policy loss and the one that `grpo_kernels.integrations.verl_plugin` registers
with the same tensors and the same `ActorConfig`, on random batches of short sequences: with and
without rollout weights, with the counts of the micro-batch and of all ranks. A figure is the
largest absolute difference. verl adds 1e-8 to denominators, from which the figures near 1e-9 come.
`metrics` are {metrics}.

{losses}

`gmpo` and `sapo` are averaged over sequences in every mode, in verl and here; ours warn if another
is set.

## Intended differences

They are left out above. A figure is the largest difference in an example.

{differences}

## Advantages

verl's `index` gives the groups, of equal or of uneven size; of the latter, one has a single
completion. verl adds 1e-6 to a standard deviation and 1e-8 to a variance; ours divide by the
unchanged number.

{estimators}

## Rejection

verl's `rollout_rs` with its threshold, and the same rules as `LossConfig.rejection`, on random
log-ratios.

{rejection}
"""


def _figure(value: float) -> str:
    return "not a number" if math.isinf(value) else f"{value:.1e}"


def format_page() -> str:
    rows = []
    for name, verl_name in losses.NAMES.items():
        for mode in losses.MODES:
            count, largest = losses.largest_differences(name, mode)
            cells = (f"`{name}`, {mode}", f"`{verl_name}`", str(count))
            rows.append([*cells, *map(_figure, largest.values())])
    items = []
    for where, difference in losses.DIFFERENCES.items():
        options = next(losses.combinations()) | difference.example
        parts = losses.differences_from_verl(difference.name, "seq-mean-token-mean", options)
        value = _figure(max(parts["loss"], parts["gradient"]))
        items.append(f"* **{where}** ({value}): {difference.reason}.")
    advantages = [
        [
            f"`{name}`",
            f"`{estimator}`" + "".join(f", `{key}={value}`" for key, value in keywords.items()),
            *(_figure(estimators.largest_difference(name, x)) for x in estimators.GROUPS.values()),
        ]
        for name, (estimator, keywords) in estimators.NAMES.items()
    ]
    rejections = [
        [
            f"`{option}`",
            f"`{threshold}`",
            ", ".join(f"`{rule}`" for rule in rules),
            *map(str, rejection.kept_tokens(option, threshold)),
        ]
        for (option, threshold), rules in rejection.RULES.items()
    ]
    return TEMPLATE.format(
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "verl")),
        metrics=", ".join(f"`{name}`" for name in losses.METRICS),
        losses=tables.table(["ours", "verl", "batches", "loss", "gradient", "metrics"], rows),
        differences="\n".join(items),
        estimators=tables.table(["ours", "verl", *estimators.GROUPS], advantages),
        rejection=tables.table(
            ["rollout_rs", "threshold", "ours", "tokens", "kept by verl", "different"], rejections
        ),
    )
