"""python -m benchmarks.report: the README's figures, all tables and the charts, from result files.

Reads benchmarks/results/*.json. Nothing that it writes is typed by hand, and the test suite fails
where a written figure is not that of the files.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.core import targets
from benchmarks.core.floors import FLOORS
from benchmarks.core.results import DIRECTORY, ROOT, Record, read, same_run, slug
from benchmarks.core.shapes import PLANS, Shape
from benchmarks.core.tasks import TASKS
from benchmarks.peers import OURS, PEERS
from benchmarks.report import charts, tables

README = ROOT / "README.md"
ALL_CASES = DIRECTORY / "README.md"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
NOT_MEASURED = "not measured yet"


@dataclass
class Results:
    """All that was measured on one device."""

    machine: dict  # of one of its files
    records: list[Record] = field(default_factory=list)
    tests: str | None = None  # the closing line of the gpu-marked tests

    @property
    def base(self) -> Shape:
        return PLANS[self.machine["kind"]].base

    def find(self, task: str, phase: str, peer: str, shape: Shape | None = None) -> Record | None:
        key = (task, phase, *_key(shape or self.base), peer)
        return next((each for each in self.records if each.key == key), None)


def _key(shape: Shape) -> tuple:
    return shape.model, shape.N, shape.dtype, shape.masked, shape.inert


def load(directory: Path = DIRECTORY) -> list[Results]:
    """One per device."""
    found: dict[str, Results] = {}
    for path in sorted(directory.glob("*.json")):
        machine, records, tests = read(path)
        of = found.setdefault(machine["device"], Results(machine))
        if not same_run(of.machine, machine):
            raise ValueError(f"{path.name} is of other code or versions than the files beside it")
        of.machine["roofs"] |= machine["roofs"]
        of.records += records
        of.tests = tests or of.tests
    return list(found.values())


# The README


def section(kind: str, found: Iterable[Results]) -> str:
    """Of a kind of machine, as it stands between the README's markers."""
    return "\n\n".join(_summary(each) for each in found if each.machine["kind"] == kind) or (
        NOT_MEASURED
    )


def _summary(of: Results) -> str:
    head = of.base.head
    parts = [
        f"{_machine(of.machine)}. Forward and backward of {of.base.N:,} tokens under the head of "
        f"{of.base.model} (V = {head.V:,}, H = {head.H:,}) in {of.base.dtype}, medians.",
        *_loss_tables(of),
        _all_functions(of),
        *_trainers(of),
    ]
    if of.machine["kind"] == "cuda":
        parts += [_targets(of), *_ceilings(of)]
    parts += [_picture(of, "hidden"), f"[Every case, quartile and failure]({_link(ALL_CASES)})."]
    return "\n\n".join(parts)


def _machine(machine: dict) -> str:
    versions = machine["versions"]
    place = machine["device"]
    place += f", {machine['threads']} threads" if machine["kind"] == "cpu" else ""
    place += f", driver {machine['driver']}" if machine["driver"] else ""
    return (
        f"{place}, torch {versions['torch']}, triton {versions.get('triton', 'absent')}, "
        f"commit {machine['commit']}, {machine['date']}"
    )


def _loss_tables(of: Results) -> Iterable[str]:
    """linear_grpo_loss by everyone, in both dtypes: speed is one column of four."""
    plan = PLANS[of.machine["kind"]]
    for shape in (plan.base, plan.other_dtype):
        yield _loss_table(of, shape)


def _loss_table(of: Results, shape: Shape) -> str:
    task = "linear_grpo_loss"
    found = [each for name in _columns("hidden") if (each := of.find(task, "both", name, shape))]
    rows = [
        [
            each.peer,
            tables.outcome(each),
            tables.percent(each.percent_of_roof),
            NO_FLOOR if each.peer not in PEERS else tables.memory(each.extra_bytes),
            tables.error_of_gradients(each),
        ]
        for each in found
    ]
    heads = [
        f"`{task}`, {shape.dtype}, {shape.N:,} tokens",
        "time",
        "of the rate of `torch.mm`",
        "extra memory",
        "error of gradients",
    ]
    return tables.table(heads, rows)


NO_FLOOR = tables.NONE


def _columns(level: str) -> list[str]:
    return [FLOORS[level][0], *PEERS]


def _all_functions(of: Results) -> str:
    """A row per function, a column per implementation that was tried."""
    floors = {floor for floor, _ in FLOORS.values()}
    tried = {each.peer for each in of.records}
    columns = [name for name in PEERS if name in tried]
    rows = []
    for task in TASKS.values():
        floor = of.find(task.name, "both", FLOORS[task.level][0])
        found = [of.find(task.name, "both", name) for name in columns]
        if any(found):
            rows.append([f"`{task.name}`", tables.outcome(floor), *map(tables.outcome, found)])
    rows += _step_rows(of, columns)
    return tables.table(["", " or ".join(sorted(floors)), *columns], rows)


def _step_rows(of: Results, columns: list[str]) -> list[list[str]]:
    """The whole step of a model; its floor is the step without a head."""
    steps = [each for each in of.records if each.task == "training_step"]
    if not steps:
        return []
    by_peer = {each.peer: each for each in steps}
    name = f"training step, {steps[0].model}, {steps[0].N:,} tokens, {steps[0].dtype}"
    found = [by_peer.get(each) for each in ("no head", *columns)]
    return [[name, *map(tables.outcome, found)]]


def _targets(of: Results) -> str:
    rows = []
    for task, phase, N, wanted in targets.TARGETS:
        shape = Shape(targets.MODEL, N, targets.DTYPE)
        ours = of.find(task, phase, OURS, shape)
        floor = of.find(task, phase, FLOORS[TASKS[task].level][0], shape)
        name = f"`{task}`, {phase}, N = {N:,}"
        rows.append([name, tables.outcome(floor), f"{wanted:g} ms", tables.outcome(ours)])
    return tables.table(["target on an H100", "floor", "target", "measured"], rows)


def _ceilings(of: Results) -> list[str]:
    found = [each for each in of.records if each.task == "memory_ceiling"]
    rows = [[each.peer, f"{each.N:,}", each.reason or tables.NONE] for each in found]
    return [tables.table(["most tokens of a loss", "N", "beyond"], rows)] if rows else []


def _trainers(of: Results) -> list[str]:
    """The training script beside TRL's trainer."""
    found = [each for each in of.records if each.task == "grpo_training"]
    rows = [
        [each.peer, tables.outcome(each), tables.memory(each.extra_bytes), each.reason]
        for each in found
    ]
    heads = ["training SmolLM2 135M to add", "a step", "peak memory", "held-out accuracy"]
    return [tables.table(heads, rows)] if rows else []


def _picture(of: Results, level: str) -> str:
    light, dark = (chart_path(of, level, theme) for theme in charts.THEMES)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_link(dark)}">'
        f'<img alt="{charts.HEADLINE[level]}: time, memory, percentage of the roof, accuracy" '
        f'src="{_link(light)}"></picture>'
    )


def _link(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def chart_path(of: Results, level: str, theme: str) -> Path:
    return DIRECTORY / f"{slug(of.machine['device'])}-{level}-{theme}.svg"


def marked(text: str, kind: str, content: str) -> str:
    """The text with what stands between the markers of a kind replaced."""
    start, end = f"<!-- {kind} figures -->", f"<!-- end of {kind} figures -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
    replaced, count = pattern.subn(lambda _: f"{start}\n{content}\n{end}", text)
    if count != 1:
        raise ValueError(f"expected one pair of markers {start} … {end}, found {count}")
    return replaced


# All cases


def all_cases(found: list[Results]) -> str:
    parts = [
        "# All cases",
        "Written by `python -m benchmarks.report`; the columns are explained in "
        "[benchmarks/README.md](../README.md).",
        "## What each leaves out",
        "\n".join(f"* {name}: {peer.leaves_out}." for name, peer in PEERS.items()),
    ]
    for of in found:
        roofs = ", ".join(f"{name} {value:.3g}" for name, value in of.machine["roofs"].items())
        versions = ", ".join(f"{name} {value}" for name, value in of.machine["versions"].items())
        absent = [name for name, peer in PEERS.items() if not _was_tried(of, name)]
        parts += [
            f"## {KINDS[of.machine['kind']]}: {of.machine['device']}",
            f"{_machine(of.machine)}. {versions}. Roofs: {roofs}.",
            *([f"Not installed: {', '.join(absent)}."] if absent else []),
            *([f"Tests on the device: {of.tests}."] if of.tests else []),
            *(_image(of, level) for level in charts.HEADLINE),
            *_tables(of),
        ]
    return "\n\n".join(parts) + "\n"


def _was_tried(of: Results, peer: str) -> bool:
    return any(each.peer == peer for each in of.records)


def _image(of: Results, level: str) -> str:
    return _picture(of, level).replace(_link(DIRECTORY) + "/", "")


def _tables(of: Results) -> Iterable[str]:
    groups: dict[tuple, list[Record]] = {}
    for each in of.records:
        groups.setdefault(each.key[:-1], []).append(each)
    for (task, phase, model, N, dtype, masked, inert), records in groups.items():
        yield f"### {task}, {phase}: {Shape(model, N, dtype, masked, inert)}"
        yield tables.table(tables.DETAILS, map(tables.details, records))


# Writing, and whether what is written is still true


def texts(found: list[Results]) -> dict[Path, str]:
    readme = README.read_text(encoding="utf-8")
    for kind in KINDS:
        readme = marked(readme, kind, section(kind, found))
    return {README: readme, ALL_CASES: all_cases(found)}


def all_charts(found: list[Results]) -> dict[Path, tuple[charts.Data, str, str]]:
    """By file: data, theme, title."""
    return {
        chart_path(of, level, theme): (
            charts.data_of(of.records, level, of.base),
            theme,
            f"{charts.HEADLINE[level]}, {of.base.model}'s head, {of.base.dtype}, on "
            f"{KINDS[of.machine['kind']]}: {of.machine['device']}",
        )
        for of in found
        for level in charts.HEADLINE
        for theme in charts.THEMES
    }


def stale() -> list[str]:
    """What is not what the result files say."""
    found = load()
    old = [path for path, text in texts(found).items() if _text(path) != text]
    old += [
        path for path, (data, *_) in all_charts(found).items() if data.digest not in _text(path)
    ]
    return [_link(path) for path in old]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main() -> None:
    found = load()
    for path, text in texts(found).items():
        path.write_text(text, encoding="utf-8")
    for path, (data, theme, title) in all_charts(found).items():
        charts.draw(data, theme, title, path)
        print(_link(path))


if __name__ == "__main__":
    main()
