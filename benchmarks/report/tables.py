"""Records as rows of Markdown."""

from collections.abc import Iterable, Sequence

from benchmarks.core.results import Record

NONE = "–"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
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


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0f}%"


def error(errors: Iterable[float]) -> str:
    return f"{found:.0e}" if (found := max(errors, default=None)) is not None else NONE


def error_of_values(record: Record) -> str:
    return error(each for name, each in record.errors.items() if not name.startswith("d_"))


def error_of_gradients(record: Record) -> str:
    return error(each for name, each in record.errors.items() if name.startswith("d_"))


def rate(record: Record) -> str:
    """GB/s of the counted bytes, or TFLOP/s of the counted products."""
    if record.seconds is None:
        return NONE
    if record.bytes is not None:
        return f"{record.bytes / record.seconds / 1e9:.3g} GB/s"
    if record.flops is not None:
        return f"{record.flops / record.seconds / 1e12:.3g} TFLOP/s"
    return NONE


def outcome(record: Record | None) -> str:
    """Its time, or in one word why it has none."""
    if record is None:
        return NONE
    return time(record.seconds) if record.status == "ok" else record.status


DETAILS = ("implementation", "time", "quartiles", "rate", "of roof", "extra memory")
DETAILS += ("error of values", "error of gradients")


def details(record: Record) -> list[str]:
    if record.status != "ok":
        reason = f"{record.status}: {record.reason}" if record.reason else record.status
        return [record.peer, reason.replace("|", "\\|"), *[NONE] * (len(DETAILS) - 2)]
    return [
        record.peer,
        time(record.seconds),
        f"{time(record.lower_quartile)} to {time(record.upper_quartile)}",
        rate(record),
        percent(record.percent_of_roof),
        memory(record.extra_bytes),
        error_of_values(record),
        error_of_gradients(record),
    ]
