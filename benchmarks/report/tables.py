"""Records as rows of Markdown tables."""

from collections.abc import Iterable, Sequence

from benchmarks.core.results import Record

NONE = "–"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table; the first column is text, the others are figures."""
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds < 1e3 else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.3g} µs"


def memory(count: int | None) -> str:
    if count is None:
        return NONE
    mebibytes = count / 2**20
    return f"{mebibytes / 1024:.3g} GiB" if mebibytes >= 1000 else f"{mebibytes:.3g} MiB"


def percent_of(floor: Record | None, record: Record) -> str:
    """Return the speed of a record in percent of that of its floor."""
    if floor is None or floor.seconds is None or record.seconds is None:
        return NONE
    return f"{100 * floor.seconds / record.seconds:.0f}%"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0f}%"


def largest_error(record: Record, *, gradients: bool) -> str:
    """Return the largest error of the record's gradients, or of its values."""
    errors = record.errors.items()
    found = [error for name, error in errors if name.startswith("d_") is gradients]
    return f"{max(found):.0e}" if found else NONE


def outcome(record: Record | None) -> str:
    """Return the time, or the status that explains why there is none."""
    if record is None:
        return NONE
    return time(record.seconds) if record.status == "ok" else record.status


def quartiles(record: Record) -> str:
    if record.seconds is None:
        return NONE
    return f"{time(record.lower_quartile)} to {time(record.upper_quartile)}"


DETAILS = ("implementation", "time", "quartiles", "rate", "of the floor", "extra memory")
DETAILS += ("error of values", "error of gradients")


def details(record: Record, floor: Record | None) -> list[str]:
    """Return the row under DETAILS."""
    if record.status != "ok":
        reason = f"{record.status}: {record.reason}" if record.reason else record.status
        return [record.peer, reason.replace("|", "\\|"), *[NONE] * (len(DETAILS) - 2)]
    rate = NONE
    if record.seconds is not None and record.bytes is not None:
        rate = f"{record.bytes / record.seconds / 1e9:.3g} GB/s"
    elif record.seconds is not None and record.flops is not None:
        rate = f"{record.flops / record.seconds / 1e12:.3g} TFLOP/s"
    return [
        record.peer,
        time(record.seconds),
        quartiles(record),
        rate,
        percent_of(floor, record),
        memory(record.extra_bytes),
        largest_error(record, gradients=False),
        largest_error(record, gradients=True),
    ]
