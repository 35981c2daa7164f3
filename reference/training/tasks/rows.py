"""Rows of data files and of data sets of the model hub: JSONL, JSON, CSV and Parquet.

A row is a dictionary, with its place for error messages: file and line, or file and row.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reference.training.errors import UserError, import_package, near_path

LAYOUT = (
    "--data wants a .jsonl, .json, .csv or .parquet file, a directory with train.* and test.* of "
    "these types, or a data set ORG/NAME of the hub"
)
HELD_OUT_NAMES = ("test", "validation")  # of splits and of files
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([^:]*))?(?::(.+))?")  # name, config, split
NEEDS = 'needs the package {}: pip install -e ".[tasks]"'

MAX_DIGITS = 308  # of an integer: more do not fit into fp64
CSV_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,17})")
CSV_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d{1,2})?")
CSV_BOOLEANS = {"true": True, "false": False}


class Row(NamedTuple):
    place: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """The rows of --data.

    Attributes:
        train: the rows to train on, or all rows if `held_out` is None.
        held_out: the rows of the test split; None if there is none.
    """

    train: list[Row]
    held_out: list[Row] | None = None


@dataclass(frozen=True)
class Flaw:
    """Stands in a JSON value for what is wrong there, until the row is known."""

    says: str


def load(data: str, as_text: Collection[str] = ()) -> Source:
    """Read a file, a directory or a data set of the hub.

    Args:
        data: a path, or ORG/NAME, ORG/NAME:CONFIG or ORG/NAME:CONFIG:SPLIT.
        as_text: columns of a CSV file that stay text; others become numbers if all their values
            are.
    """
    path = Path(data)
    if path.is_dir():
        return load_directory(path, as_text)
    if path.exists():
        return Source(read_file(path, as_text))
    hub_id = HUB_ID.fullmatch(data)
    if hub_id is None or path.suffix.lower() in READERS:
        raise UserError(f"cannot read {data}: there is no such file{near_path(path)}; {LAYOUT}")
    return load_with_datasets(hub_id[1], hub_id[2], hub_id[3])


def load_directory(directory: Path, as_text: Collection[str] = ()) -> Source:
    """Read train.* and test.* or validation.*, or other layouts that the package datasets knows."""
    by_stem: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in READERS:
            other = by_stem.setdefault(path.stem, path)
            if other != path and path.stem in ("train", *HELD_OUT_NAMES):
                raise UserError(f"--data {directory}: {other.name} and {path.name}: keep one")
    held_out = next((by_stem[name] for name in HELD_OUT_NAMES if name in by_stem), None)
    if "train" not in by_stem:
        return load_with_datasets(str(directory))
    train = by_stem["train"]
    if held_out is None:
        return Source(read_file(train, as_text))
    return Source(read_file(train, as_text), read_file(held_out, as_text))


def load_with_datasets(name: str, config: str | None = None, split: str | None = None) -> Source:
    """Load a data set of the hub, or a local directory, with the package datasets."""
    datasets: Any = import_package("datasets", f"--data {name} {NEEDS.format('datasets')}")
    splits: Any
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            splits = datasets.load_from_disk(name)
            splits = splits if hasattr(splits, "keys") else {"train": splits}
        elif split:
            splits = {split: datasets.load_dataset(name, config or None, split=split)}
        else:
            splits = datasets.load_dataset(name, *([config] if config else []))
    except Exception as error:  # no connection, no such set, a broken cache: each its own type
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        what = "cannot be loaded" if Path(name).is_dir() else "is no file, and not on the hub"
        raise UserError(f"--data {name} {what} ({reason}); {LAYOUT}") from None

    def rows(split: str) -> list[Row]:
        numbered = enumerate(splits[split], start=1)
        return [Row(f"{name}, {split} row {number}", dict(row)) for number, row in numbered]

    train = "train" if "train" in splits else next(iter(splits))
    if train != "train" and len(splits) > 1:
        raise UserError(
            f"--data {name} has no split train, but {', '.join(splits)}: name one as "
            f"{name}:{config or ''}:SPLIT"
        )
    held_out = next((other for other in HELD_OUT_NAMES if other in splits), train)
    return Source(rows(train), None if held_out == train else rows(held_out))


def read_file(path: Path, as_text: Collection[str] = ()) -> list[Row]:
    """Read the rows of a file of one of the types in READERS."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"cannot read {path}: {LAYOUT}")
    try:
        return reader(path, as_text)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"cannot read {path}: it is not UTF-8, but has the byte {byte:#x}; convert it, for "
            "example by iconv"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; {LAYOUT}") from None


def read_jsonl(path: Path, as_text: Collection[str] = ()) -> list[Row]:
    """Read one object per line; empty lines are skipped."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                value = DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not JSON: {error}") from None
            rows.append(Row(place, _expect_object(value, place)))
    return rows


def read_json(path: Path, as_text: Collection[str] = ()) -> list[Row]:
    """Read a list of objects, {"data": [...]} with such a list, or one object per line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return read_jsonl(path)
        raise UserError(f"{path}: not JSON: {error}") from None
    if isinstance(value, dict):
        value = value.get("data", value)
    if not isinstance(value, list):
        raise UserError(f'{path}: expected a list of objects, or {{"data": [...]}}')
    places = (f"{path}, row {number}" for number in range(1, len(value) + 1))
    return [
        Row(place, _expect_object(row, place)) for place, row in zip(places, value, strict=True)
    ]


def _expect_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object; got {json.dumps(value, default=str)[:80]}")
    flaw = _find_flaw(value)
    if flaw is not None:
        raise UserError(f"{place}: {flaw}")
    return value


def _find_flaw(value: Any) -> str | None:
    """Find a `Flaw`, or a text that has half of a surrogate pair and is therefore not Unicode."""
    found = [value]
    for item in found:  # grows in the loop
        if isinstance(item, str):
            if not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    half = ascii(item[error.start])[1:-1]
                    return f"half a surrogate pair, {half}, in the text {item[:80]!a}"
        elif isinstance(item, dict):
            found += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            found += item
        elif isinstance(item, Flaw):
            return item.says
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        value[twice] = Flaw(f"the name {twice!r} occurs twice")
    return value


def _integer(digits: str) -> int | Flaw:
    count = len(digits.lstrip("-"))
    if count > MAX_DIGITS:
        return Flaw(f"an integer of {count} digits; put it in quotes")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def read_csv(path: Path, as_text: Collection[str] = ()) -> list[Row]:
    """Read a table with a header, separated by commas, semicolons or tabs.

    An empty cell is None. Columns of numbers, true and false are converted.
    """
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=first.count)
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            lines = [cells for cells in reader if cells]
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    header, *table = lines or [[]]
    header = [name.strip() for name in header]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: the column {twice[0]!r} occurs twice in the first line")
    hint = f': a text with "{delimiter}" needs quotes'
    for number, cells in enumerate(table, start=1):
        if len(cells) != len(header):
            raise UserError(
                f"{path}, row {number}: expected {len(header)} cells ({', '.join(header)}); "
                f"got {len(cells)}{hint * (len(cells) > len(header))}"
            )
    columns = [
        [cell if cell.strip() else None for cell in cells] for cells in zip(*table, strict=True)
    ]
    columns = [
        cells if name in as_text else _convert(cells)
        for name, cells in zip(header, columns, strict=bool(table))
    ]
    return [
        Row(f"{path}, row {number}", dict(zip(header, cells, strict=True)))
        for number, cells in enumerate(zip(*columns, strict=True), start=1)
    ]


def _convert(cells: Sequence[str | None]) -> Sequence[Any]:
    """Convert a column of numbers or truth values; 007 is a text."""
    texts = {cell.strip() for cell in cells if cell is not None}
    kinds: tuple[tuple[Callable[[str], Any], Callable[[str], Any]], ...] = (
        (CSV_INTEGER.fullmatch, int),
        (CSV_NUMBER.fullmatch, float),
        (lambda text: text.lower() in CSV_BOOLEANS, lambda text: CSV_BOOLEANS[text.lower()]),
    )
    for matches, convert in kinds:
        if texts and all(map(matches, texts)):
            return [None if cell is None else convert(cell.strip()) for cell in cells]
    return cells


def read_parquet(path: Path, as_text: Collection[str] = ()) -> list[Row]:
    """Read a Parquet file with pyarrow."""
    parquet: Any = import_package("pyarrow.parquet", f"{path} {NEEDS.format('pyarrow')}")
    try:
        # Not `read_table`: in a directory such as level=3/ it adds a column.
        rows = parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:  # ArrowInvalid, ArrowNotImplementedError, OSError
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


READERS: dict[str, Callable[[Path, Collection[str]], list[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
