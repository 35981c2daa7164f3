"""python -m benchmarks.parity: our losses against TRL's own, option by option, in fp64.

Every combination of the options is computed by TRL, by grpo_kernels and by the reference, a few
minutes in all; benchmarks/results/trl_parity.md says how far apart they are. `trl_options` has what
is compared, `trl_differences` what is not.
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import grpo_kernels
from benchmarks.core.results import DIRECTORY
from benchmarks.report import tables
from benchmarks.trl_parity.differences import DIFFERS, Difference, left_out
from benchmarks.trl_parity.options import (
    EPSILONS,
    FIXED,
    OPTIONS,
    PLAIN,
    Options,
    combinations,
    keywords_of,
    settings_of,
)
from benchmarks.trl_parity.oracle import Batch, Result, trl_loss
from grpo_kernels.integrations.trl_loss import loss_config
from reference import losses as reference

RESULTS = DIRECTORY / "trl_parity.md"
SIDES = {"grpo_kernels": grpo_kernels, "reference": reference}
KINDS = ("loss", "gradient", "metrics")
OF_TRL_ALONE = frozenset({"entropy_coef"})  # a setting among the metrics
EXAMPLES = 8  # batches that show a difference
PAGE = """\
# TRL's losses and ours

Written by `python -m benchmarks.trl_parity`: {versions}, fp64, on a CPU.

TRL's own `_compute_loss` is called on per-token tensors, beside it `policy_loss` of grpo_kernels
and of the reference. A row is of every combination with the other options, each on a random batch
of its own; a figure is the largest absolute difference of either from TRL. A combination counts
where gradients are compared.

{table}

In all of them {fixed}.

## Meant to differ

Left out above, in the parts that are named. A figure is the largest difference in an example.

{differences}
"""


def make_batch(seed: int, kind: str) -> Batch:
    """A few sequences of a few tokens, on both sides of every bound that FIXED sets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    B, T = (int(torch.randint(2, most, (), generator=generator)) for most in (6, 8))
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    lengths[0] = T
    if kind == "one sequence masked":
        lengths[-1] = 0
    mask = torch.arange(T) < lengths
    logprob = -normal(B, T).abs()
    old, ref, sampling = (logprob + normal(B, T) for _ in range(3))
    if kind == "far":
        old[0, 0] = logprob[0, 0] - 30
    if kind == "not scored":
        sampling[0, 0] = torch.nan
    return Batch(
        logprob=logprob,
        entropy=normal(B, T).abs(),
        mask=mask,
        advantages=normal(B, T) if kind == "an advantage per token" else normal(B),
        old_logprob=None if kind == "on-policy" else old,
        ref_logprob=ref,
        sampling_logprob=sampling,
        generated_tokens=3 * int(mask.sum()) + 5,
    )


def our_loss(side: str, settings: Mapping[str, Any], batch: Batch) -> Result:
    """What one of SIDES makes of the batch under TRL's settings."""
    logprob, entropy = (x.detach().requires_grad_() for x in (batch.logprob, batch.entropy))
    loss, metrics = SIDES[side].policy_loss(
        logprob,
        batch.advantages,
        entropy=entropy,
        config=loss_config(settings),
        **keywords_of(settings, batch),
    )
    gradients = torch.autograd.grad(loss, (logprob, entropy), materialize_grads=True)
    return Result(loss.item(), *gradients, {name: x.item() for name, x in metrics.items()})


def apart(one: Result, other: Result) -> dict[str, float]:
    """Absolute differences by part: "loss", "gradient" (the largest), each metric of `one`."""
    gradients = zip(one[1:3], other[1:3], strict=True)
    found = {
        "loss": abs(one.loss - other.loss),
        "gradient": max((x - y).abs().max().item() for x, y in gradients),
    }
    names = sorted(one.metrics.keys() - OF_TRL_ALONE)
    found |= {name: abs(one.metrics[name] - other.metrics[name]) for name in names}
    return {part: math.inf if math.isnan(value) else value for part, value in found.items()}


def from_trl(settings: Mapping[str, Any], batch: Batch) -> dict[str, dict[str, float]]:
    """How far each side is from TRL, by part, whether that is meant or not."""
    theirs = trl_loss(settings, batch)
    return {side: apart(theirs, our_loss(side, settings, batch)) for side in SIDES}


def is_left_out(part: str, parts: frozenset[str]) -> bool:
    """Whether a part of a result is among those of a Difference."""
    return part in parts or ("metrics" in parts and part not in ("loss", "gradient"))


def unmeant(options: Options, seed: int) -> dict[str, dict[str, float]]:
    """How far each side is from TRL in the parts that are compared, on a batch of the seed."""
    parts, batch = left_out(options), make_batch(seed, options["batch"])
    return {
        side: {part: value for part, value in found.items() if not is_left_out(part, parts)}
        for side, found in from_trl(settings_of(options), batch).items()
    }


def meant(difference: Difference) -> float:
    """How far apart the example of a difference is, in the parts that it leaves out."""
    options = PLAIN | difference.example
    batches = (make_batch(seed, options["batch"]) for seed in range(EXAMPLES))
    return max(
        value
        for batch in batches
        for found in from_trl(settings_of(options), batch).values()
        for part, value in found.items()
        if is_left_out(part, difference.parts)
    )


@dataclass
class Worst:
    """Of some combinations: how many, and the largest difference by kind of part."""

    count: int = 0
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def add(self, found: Mapping[str, float]) -> None:
        self.count += 1
        for part, value in found.items():
            kind = part if part in KINDS else "metrics"
            self.largest[kind] = max(self.largest[kind], value)


def sweep(every: Iterable[Options]) -> dict[str, Worst]:
    """By option, "name=value", of the combinations that have it; and of all, by ""."""
    rows = {name: Worst() for name in ["", *option_names()]}
    for seed, options in enumerate(every):
        if "gradient" in left_out(options):
            continue
        sides = unmeant(options, seed).values()
        found = {part: max(side[part] for side in sides) for part in next(iter(sides))}
        for name in ["", *(f"{name}={value}" for name, value in options.items())]:
            rows[name].add(found)
    return rows


def option_names() -> list[str]:
    return [f"{name}={value}" for name, values in OPTIONS.items() for value in values]


def page(rows: Mapping[str, Worst]) -> str:
    """The result file."""
    heads = ["option of TRL", "combinations", *KINDS]
    lines = (
        [f"`{name or 'all'}`", f"{worst.count:,}", *map(_figure, worst.largest.values())]
        for name, worst in rows.items()
    )
    of_one = (f"with {name} {_listed(settings)}" for name, settings in EPSILONS.items())
    return PAGE.format(
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "trl")),
        table=tables.table(heads, lines),
        fixed="; ".join((_listed(FIXED), *of_one)),
        differences="\n".join(map(_item, DIFFERS)),
    )


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in settings.items())


def _item(difference: Difference) -> str:
    parts = ", ".join(f"`{part}`" for part in sorted(difference.parts))
    figure = _figure(meant(difference))
    return f"* **{difference.where}** ({figure}): {difference.reason}. Of {parts}."


def _figure(value: float) -> str:
    return "not a number" if math.isinf(value) else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    out = parser.parse_args().out
    text = page(sweep(combinations()))
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
