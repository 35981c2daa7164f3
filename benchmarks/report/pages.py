"""The written pages: the headline of README.md, benchmarks/README.md, and results/README.md."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from benchmarks.core.results import DIRECTORY, ROOT, DeviceResults, Record, load, slug
from benchmarks.core.roofline import FLOORS
from benchmarks.core.shapes import PLANS, Shape
from benchmarks.core.tasks import TASKS
from benchmarks.peers import OURS, PEERS
from benchmarks.peers.plain import PLAIN
from benchmarks.report import tables, targets
from benchmarks.report.charts import HEADLINE, THEMES, Chart, chart_data, memory_data

README = ROOT / "README.md"
BENCHMARKS = ROOT / "benchmarks" / "README.md"
ALL_CASES = DIRECTORY / "README.md"
KINDS = {"cpu": "CPU", "cuda": "GPU"}


def texts(devices: list[DeviceResults]) -> dict[Path, str]:
    """Return the new text of each page."""
    readme = replace_marked(README.read_text(encoding="utf-8"), "headline", headline(devices))
    page = BENCHMARKS.read_text(encoding="utf-8")
    for kind in KINDS:
        page = replace_marked(page, f"{kind} figures", section(kind, devices))
    return {README: readme, BENCHMARKS: page, ALL_CASES: all_cases(devices)}


def all_charts(devices: list[DeviceResults]) -> dict[Path, Chart]:
    charts = {}
    for results in devices:
        base, kind = results.base, KINDS[results.machine["kind"]]
        for level, task in HEADLINE.items():
            title = f"{task}, {base.model}'s head, {base.dtype}, "
            title += f"on {kind}: {results.machine['device']}"
            data = chart_data(results.records, level, base)
            for theme in THEMES:
                charts[chart_path(results, level, theme)] = Chart(data, theme, title)
        memory = memory_data(results.records, base)
        title = f"extra memory of loss and gradients, {base.model}'s head, {base.dtype}"
        for theme in THEMES if memory.by_peer else ():
            charts[chart_path(results, "memory", theme)] = Chart(memory, theme, title)
    return charts


def stale() -> list[str]:
    """Return the files that do not show what the result files say."""
    devices = load()
    pages, charts = texts(devices), all_charts(devices)
    written = {
        path: path.read_text(encoding="utf-8") if path.exists() else ""
        for path in (*pages, *charts)
    }
    old = [path for path, text in pages.items() if written[path] != text]
    old += [path for path, chart in charts.items() if chart.data.digest not in written[path]]
    return [link(path) for path in old]


def replace_marked(text: str, name: str, content: str) -> str:
    """Replace what stands between two markers."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
    replaced, count = pattern.subn(lambda _: f"{start}\n{content}\n{end}", text)
    if count != 1:
        raise ValueError(f"expected one pair of markers {start} … {end}, found {count}")
    return replaced


def link(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def chart_path(results: DeviceResults, level: str, theme: str) -> Path:
    return DIRECTORY / f"{slug(results.machine['device'])}-{level}-{theme}.svg"


def picture(results: DeviceResults, chart: str, directory: Path) -> str:
    """Return the HTML of a chart; links are relative to the directory of the page."""
    light, dark = (
        chart_path(results, chart, theme).relative_to(directory).as_posix() for theme in THEMES
    )
    shown = "extra memory against tokens: plain PyTorch, TRL, Liger and grpo_kernels"
    if chart in HEADLINE:
        shown = f"{HEADLINE[chart]}: time, memory, percentage of the floor, accuracy"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{shown}" src="{light}"></picture>'
    )


def machine_line(machine: dict) -> str:
    versions = machine["versions"]
    place = machine["device"]
    place += f", {machine['threads']} threads" if machine["kind"] == "cpu" else ""
    place += f", driver {machine['driver']}" if machine["driver"] else ""
    return (
        f"{place}, torch {versions['torch']}, triton {versions.get('triton', 'absent')}, "
        f"commit {machine['commit']}, {machine['date']}"
    )


def headline(devices: Iterable[DeviceResults]) -> str:
    """Return the reason to use the package: memory and time, each at its largest N."""
    parts = []
    for results in devices:
        base = results.base
        pairs = [
            (ours, plain)
            for ours in results.records
            if (ours.task, ours.phase, ours.peer) == ("linear_grpo_loss", "both", OURS)
            and replace(ours.shape, N=base.N) == base
            and (plain := results.find(ours.task, "both", PLAIN, ours.shape)) is not None
            and plain.extra_bytes and ours.extra_bytes
        ]  # fmt: skip
        clocked = [(ours, plain) for ours, plain in pairs if plain.seconds and ours.seconds]
        if not clocked:
            continue
        ours, plain = max(pairs, key=lambda pair: pair[0].N)
        our_time, plain_time = max(clocked, key=lambda pair: pair[0].N)
        parts += [
            f"**{plain.extra_bytes / ours.extra_bytes:.2g} times less memory than plain PyTorch at "
            f"{ours.N:,} tokens, and {our_time.seconds / plain_time.seconds:.2f} of its time at "
            f"{our_time.N:,}.** Loss and gradient under the head of {base.model} in {base.dtype} "
            f"take {tables.memory(ours.extra_bytes)} of extra memory instead of "
            f"{tables.memory(plain.extra_bytes)}, and {tables.time(our_time.seconds)} instead of "
            f"{tables.time(plain_time.seconds)} ({machine_line(results.machine)}).",
            picture(results, "memory", ROOT),
        ]
    return "\n\n".join(parts) or "not measured yet"


def section(kind: str, devices: Iterable[DeviceResults]) -> str:
    """Return the figures of a kind of machine, as they stand in benchmarks/README.md."""
    parts = []
    for results in devices:
        if results.machine["kind"] != kind:
            continue
        base = results.base
        parts += [
            f"{machine_line(results.machine)}. Forward and backward of {base.N:,} tokens under the "
            f"head of {base.model} (V = {base.head.V:,}, H = {base.head.H:,}) in {base.dtype}, "
            "medians.",
            *head_table(results, "linear_grpo_loss", base),
            *head_table(results, "linear_grpo_loss", PLANS[kind].other_dtype),
            *size_tables(results),
            *head_table(results, "linear_token_stats_frozen", base),
            *head_table(results, "linear_grpo_loss_tree", base),
            *head_table(results, "linear_grpo_loss_support", base),
            function_table(results),
            *lora_table(results),
            *trainer_table(results),
            *([target_table(results), *max_tokens_table(results)] if kind == "cuda" else []),
            picture(results, "memory", BENCHMARKS.parent),
            "A chunk of logits may take about 1 GiB, and `chunk_tokens` makes it smaller; Liger's "
            "chunks are smaller.",
            picture(results, "hidden", BENCHMARKS.parent),
            "[Every case, quartile and failure](results/README.md).",
        ]
    return "\n\n".join(parts) or "not measured yet"


def head_table(results: DeviceResults, task: str, shape: Shape) -> list[str]:
    """Return the table of a task by every implementation: time, memory and accuracy.

    A task that was not measured has none.
    """
    rows, floor = [], results.find(task, "both", FLOORS["hidden"][0], shape)
    measured = measured_at(results, task, shape)
    for record in measured:
        # The buffers of a floor are no measurement.
        memory = tables.memory(record.extra_bytes) if record.peer in PEERS else tables.NONE
        error = tables.largest_error(record, gradients=True)
        percent = tables.percent_of(floor, record)
        rows.append([record.peer, tables.outcome(record), percent, memory, error])
    heads = [
        f"`{task}`, {shape.dtype}, {shape.N:,} tokens",
        "time",
        "speed, of the bare products",
        "extra memory",
        "error of gradients",
    ]
    return [tables.table(heads, rows), *costs(measured)] if rows else []


def measured_at(results: DeviceResults, task: str, shape: Shape) -> list[Record]:
    """Return the records of the floor and of every implementation."""
    found = (results.find(task, "both", peer, shape) for peer in (FLOORS["hidden"][0], *PEERS))
    return [record for record in found if record is not None]


def costs(records: Iterable[Record]) -> list[str]:
    """Say why implementations are slower than ours, and why ours is slower than any."""
    times = {record.peer: record.seconds for record in records if record.seconds is not None}
    ours = times.get(OURS)
    if ours is None:
        return []
    peers = [name for name in times if name in PEERS and name != OURS]
    slower = [name for name in peers if times[name] > 1.05 * ours]
    if any(times[name] < ours / 1.05 for name in peers):
        slower = [OURS, *slower]
    found = [f"{name}: {PEERS[name].cost}." for name in slower if PEERS[name].cost]
    return ["Why slower. " + " ".join(found)] if found else []


def size_tables(results: DeviceResults) -> list[str]:
    """Return a table per head and dtype of the loss at the sizes that `side_by_side` clocked.

    A GPU has none: its base shape is as large.
    """
    if results.machine["kind"] != "cpu":
        return []
    task, smallest = "linear_grpo_loss", 512
    floor = FLOORS["hidden"][0]
    shapes: dict[tuple[str, str], list[Shape]] = {}
    for record in records_of(results, task):
        is_plain = not record.masked and not record.inert and record.phase == "both"
        if record.peer == floor and record.N >= smallest and record.seconds and is_plain:
            shapes.setdefault((record.model, record.dtype), []).append(record.shape)
    parts = []
    for (model, dtype), found in shapes.items():
        found.sort(key=lambda shape: shape.N)
        columns = [measured_at(results, task, shape) for shape in found]
        heads = [f"`{task}`, {model} (V = {found[0].head.V:,}), {dtype}"]
        for shape in found:
            heads += [f"{shape.N:,} tokens", "of the bare products", "extra memory"]
        rows = []
        for peer in (floor, *PEERS):
            cells, last = [], None
            for records in columns:
                record = next((record for record in records if record.peer == peer), None)
                last = record or last
                memory = tables.memory(record.extra_bytes if record else None)
                percent = tables.percent_of(records[0], record) if record else tables.NONE
                cells += [tables.outcome(record), percent, memory]
            if last is not None:
                rows.append([peer, *cells, tables.largest_error(last, gradients=True)])
        parts += [tables.table([*heads, "error of gradients"], rows), *costs(columns[-1])]
    return parts


def function_table(results: DeviceResults) -> str:
    """Return the table of all functions, a column per implementation that was tried."""
    tried = {record.peer for record in results.records}
    peers = [name for name in PEERS if name in tried]
    rows = []
    for task in TASKS.values():
        floor = results.find(task.name, "both", FLOORS[task.level][0])
        found = [results.find(task.name, "both", peer) for peer in peers]
        if any(found):
            rows.append([f"`{task.name}`", *map(tables.outcome, (floor, *found))])
    steps = {record.peer: record for record in records_of(results, "training_step")}
    if steps:
        step = next(iter(steps.values()))
        name = f"training step, {step.model}, {step.N:,} tokens, {step.dtype}"
        found = [steps.get(peer) for peer in ("no head", *peers)]  # the former is its floor
        rows.append([name, *map(tables.outcome, found)])
    floors = " or ".join(sorted(floor for floor, _ in FLOORS.values()))
    return tables.table(["", floors, *peers], rows)


def lora_table(results: DeviceResults) -> list[str]:
    """Return the table of LoRA training steps, a row per loss head, if they were measured."""
    losses = {
        "lora_step": "`linear_grpo_loss`",
        "lora_stats_step": "`linear_token_stats` and `policy_loss`",
    }
    steps = {task: {record.peer: record for record in records_of(results, task)} for task in losses}
    measured = [*steps["lora_step"].values(), *steps["lora_stats_step"].values()]
    if not measured:
        return []
    rows = []
    for peer in ("no head", *PEERS):
        found = [steps[task].get(peer) for task in losses]
        if any(found):
            cells = [
                (tables.outcome(record), tables.memory(record.extra_bytes if record else None))
                for record in found
            ]
            rows.append([peer, *chain(*cells)])
    step = measured[0]
    heads = [f"LoRA step, {step.model}, {step.N:,} tokens, {step.dtype}"]
    for loss in losses.values():
        heads += [f"time with {loss}", "extra memory"]
    return [tables.table(heads, rows)]


def records_of(results: DeviceResults, task: str) -> list[Record]:
    return [record for record in results.records if record.task == task]


def trainer_table(results: DeviceResults) -> list[str]:
    """Return the table of the training script beside TRL's trainer, if it was measured."""
    heads = ["training SmolLM2 135M to add", "a step", "peak memory", "held-out accuracy"]
    rows = [
        [record.peer, tables.outcome(record), tables.memory(record.extra_bytes), record.reason]
        for record in records_of(results, "grpo_training")
    ]
    compared = (
        "The two rows of TRL do equal work: the same trainer and the same random numbers, with "
        "and without our losses. The script's sampler and random numbers are its own, so its "
        "rollouts differ, and its time is not comparable with theirs."
    )
    return [tables.table(heads, rows), compared] if rows else []


def target_table(results: DeviceResults) -> str:
    rows = []
    for task, phase, N, milliseconds in targets.TARGETS:
        shape = Shape(targets.MODEL, N, targets.DTYPE)
        floor = results.find(task, phase, FLOORS[TASKS[task].level][0], shape)
        ours = tables.outcome(results.find(task, phase, OURS, shape))
        name = f"`{task}`, {phase}, N = {N:,}"
        rows.append([name, tables.outcome(floor), f"{milliseconds:g} ms", ours])
    return tables.table(["target on an H100", "floor", "target", "measured"], rows)


def max_tokens_table(results: DeviceResults) -> list[str]:
    rows = [
        [record.peer, f"{record.N:,}", record.reason or tables.NONE]
        for record in records_of(results, "memory_ceiling")
    ]
    return [tables.table(["most tokens of a loss", "N", "beyond"], rows)] if rows else []


def all_cases(devices: list[DeviceResults]) -> str:
    """Return the page with every record."""
    parts = [
        "# All cases",
        "Written by `python -m benchmarks.report`; the columns are explained in "
        "[benchmarks/README.md](../README.md).",
        "## What each leaves out",
        "\n".join(f"* {name}: {peer.leaves_out}." for name, peer in PEERS.items()),
    ]
    for results in devices:
        machine = results.machine
        roofs = ", ".join(f"{name} {value:.3g}" for name, value in machine["roofs"].items())
        versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
        tried = {record.peer for record in results.records}
        absent = ", ".join(
            name for name, peer in PEERS.items() if peer.package and name not in tried
        )
        parts += [
            f"## {KINDS[machine['kind']]}: {machine['device']}",
            f"{machine_line(machine)}. {versions}. Roofs: {roofs}.",
            *([f"Not installed: {absent}."] if absent else []),
            *([f"Tests on the device: {results.tests}."] if results.tests else []),
            *(picture(results, level, DIRECTORY) for level in HEADLINE),
            *case_tables(results),
        ]
    return "\n\n".join(parts) + "\n"


def case_tables(results: DeviceResults) -> Iterator[str]:
    """Yield a heading and a table per task, phase and shape."""
    groups: dict[tuple[str, str, Shape], list[Record]] = {}
    for record in results.records:
        groups.setdefault((record.task, record.phase, record.shape), []).append(record)
    for (task, phase, shape), records in groups.items():
        yield f"### {task}, {phase}: {shape}"
        floors = {record.peer: record for record in records}
        floor = floors.get(FLOORS[TASKS[task].level][0]) if task in TASKS else None
        yield tables.table(tables.DETAILS, (tables.details(record, floor) for record in records))
