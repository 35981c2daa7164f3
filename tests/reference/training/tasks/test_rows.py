"""Rows of data files and of the hub: values, places and errors."""

import sys

import pytest

from reference.training.errors import UserError
from reference.training.tasks import rows
from reference.training.tasks.rows import Row


def columns(found):
    return [row.columns for row in found]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_jsonl_rows_name_their_line(tmp_path):
    text = b"\xef\xbb\xbf" + '{"prompt": "a\u2028b", "n": 7}\r\n\n{"prompt": "c"}'.encode()
    path = write(tmp_path / "a.jsonl", text)
    assert rows.read_file(path) == [
        Row(f"{path}:1", {"prompt": "a\u2028b", "n": 7}),
        Row(f"{path}:3", {"prompt": "c"}),
    ]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1}, {"a": 2}]}'])
def test_json_is_a_list_of_objects(tmp_path, text):
    path = write(tmp_path / "a.json", text)
    assert rows.read_file(path) == [
        Row(f"{path}, row 1", {"a": 1}),
        Row(f"{path}, row 2", {"a": 2}),
    ]


def test_json_may_hold_one_object_per_line(tmp_path):
    path = write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n')
    assert columns(rows.read_file(path)) == [{"a": 1}, {"a": 2}]


NINES = "9" * 400
BAD_ROWS = [
    ('{"a": "hi \\ud83d 1"}', r"half a surrogate pair, \\ud83d, in the text 'hi \\ud83d 1'"),
    ('{"a": {"b": ["\\udc00"]}}', "half a surrogate pair"),
    ('{"\\udc00": 1}', "half a surrogate pair"),
    (f'{{"a": {NINES}}}', "an integer of 400 digits; put it in quotes"),
    (f'{{"a": [{{"b": -{"9" * 5000}}}]}}', "an integer of 5000 digits; put it in quotes"),
    ('{"a": 1, "b": 2, "a": 3}', "the name 'a' occurs twice"),
    ('{"x": {"a": 1, "a": 1}}', "the name 'a' occurs twice"),
    ("[1, 2]", r"expected an object; got \[1, 2\]"),
    ('"text"', "expected an object"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS)
def test_bad_row_is_named_by_file_and_row(tmp_path, row, says):
    lines = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n\n{row}\n')
    with pytest.raises(UserError, match=rf"a.jsonl:3: {says}") as error:
        rows.read_file(lines)
    assert "\n" not in str(error.value) and str(error.value).isascii()
    items = write(tmp_path / "a.json", f'[{{"a": 1}}, {row}]')
    with pytest.raises(UserError, match=rf"a.json, row 2: {says}"):
        rows.read_file(items)


@pytest.mark.parametrize("row", ['{"prompt": "p", "answer"', "[" * 100_000, "{'a': 1}"])
def test_line_that_is_not_json_raises(tmp_path, row):
    path = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{row}')
    with pytest.raises(UserError, match=r"a.jsonl:2: not JSON: "):
        rows.read_file(path)
    with pytest.raises(UserError, match=r"a.json: not JSON: "):
        rows.read_file(write(tmp_path / "a.json", row))
    with pytest.raises(UserError, match="expected a list of objects"):
        rows.read_file(write(tmp_path / "a.json", '{"question": {"0": "p"}}'))


def test_unusual_text_and_numbers_are_values(tmp_path):
    text = f'{{"a": "\\ud83d\\ude00\\u0000 é", "b": {"9" * 300}, "c": NaN, "d": "{NINES}"}}'
    (found,) = columns(rows.read_file(write(tmp_path / "a.jsonl", text)))
    assert found["a"] == "😀\x00 é" and found["b"] == 10**300 - 1 and found["d"] == NINES


def test_csv_columns_of_numbers_are_converted(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "\ufeffquestion,answer,difficulty,share,code,hard\r\n"
        '"What is\n7, plus 5?",007,3,0.5,007,True\r\n'
        "\r\n"
        "q,8,,1e3,12,false\r\n",
    )
    found = rows.read_file(path, as_text={"answer"})
    assert [row.place for row in found] == [f"{path}, row 1", f"{path}, row 2"]
    first, second = columns(found)
    assert first == {
        "question": "What is\n7, plus 5?", "answer": "007", "difficulty": 3, "share": 0.5,
        "code": "007", "hard": True,
    }  # fmt: skip
    assert second == {
        "question": "q", "answer": "8", "difficulty": None, "share": 1000.0, "code": "12",
        "hard": False,
    }  # fmt: skip
    assert isinstance(first["difficulty"], int) and isinstance(second["share"], float)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_may_be_separated_by_semicolons_or_tabs(tmp_path, separator):
    text = f"question{separator}answer\nWhat, now?{separator}x\n"
    found = rows.read_file(write(tmp_path / "a.csv", text))
    assert columns(found) == [{"question": "What, now?", "answer": "x"}]


def test_csv_cell_may_be_long(tmp_path):
    cell = "x" * 200_000
    assert columns(rows.read_file(write(tmp_path / "a.csv", f"a,b\n{cell},1\n")))[0]["a"] == cell


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n3\n", r"a.csv, row 2: expected 2 cells \(a, b\); got 1"),
        ("a,b\n1,2,3\n", r"a.csv, row 1: expected 2 cells"),
        ('a,b\n1,"2\n', r"a.csv:2: not CSV: unexpected end of data"),
        ("a,b,a\n1,2,3\n", "the column 'a' occurs twice in the first line"),
        (b"a,b\n\xe9,1\n", "cannot read .*a.csv: it is not UTF-8, but has the byte 0xe9"),
    ],
)
def test_malformed_csv_raises_with_its_row(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        rows.read_file(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize("text", ["", "a,b\n"])
def test_csv_without_rows_is_empty(tmp_path, text):
    assert rows.read_file(write(tmp_path / "a.csv", text)) == []


def write_parquet(path, *table):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(list(table)), path)
    return path


def test_parquet_keeps_its_types(tmp_path):
    chat = [{"role": "user", "content": "7+5?"}]
    row = {"prompt": chat, "answer": "007", "difficulty": 3, "tags": ["a"], "other": None}
    path = write_parquet(tmp_path / "a.parquet", row, {**row, "difficulty": None})
    assert rows.read_file(path) == [
        Row(f"{path}, row 1", row),
        Row(f"{path}, row 2", {**row, "difficulty": None}),
    ]


def test_damaged_parquet_raises(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*a.parquet: Parquet magic bytes") as error:
        rows.read_file(write(tmp_path / "a.parquet", b"PAR1" + b"x" * 100))
    assert "\n" not in str(error.value)


def test_missing_package_raises_with_the_extra(monkeypatch, tmp_path):
    path = write(tmp_path / "a.parquet", b"")
    for module, data in (("pyarrow.parquet", str(path)), ("datasets", "org/name")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"{module[:7]}.*\.\[tasks\]"):
            rows.load(data)


def test_jsonl_and_csv_need_no_package(monkeypatch, tmp_path):
    for module in ("datasets", "pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, module, None)
    assert rows.load(str(write(tmp_path / "a.jsonl", '{"a": 1}'))).train[0].columns == {"a": 1}
    assert rows.load(str(write(tmp_path / "a.csv", "a\n1"))).train[0].columns == {"a": 1}


@pytest.mark.parametrize("held_out", ["test.csv", "validation.parquet"])
def test_directory_has_a_file_per_split(tmp_path, held_out):
    write(tmp_path / "train.jsonl", '{"a": 1}')
    if held_out == "test.csv":
        write(tmp_path / held_out, "a\n2\n")
        write(tmp_path / "validation.csv", "a\n3\n")
    else:
        write_parquet(tmp_path / held_out, {"a": 2})
    write(tmp_path / "notes.txt", "")
    source = rows.load(str(tmp_path))
    assert columns(source.train) == [{"a": 1}] and columns(source.held_out) == [{"a": 2}]


def test_directory_with_two_files_of_a_split_raises(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        write(tmp_path / name, "")
    with pytest.raises(UserError, match=r"train.csv and train.jsonl: keep one"):
        rows.load(str(tmp_path))


def test_directory_with_train_only_has_no_test_split(tmp_path):
    source = rows.load(str(write(tmp_path / "train.csv", "a\n1\n").parent))
    assert columns(source.train) == [{"a": 1}] and source.held_out is None


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_directory_in_the_layout_of_the_hub(hub_cache, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", {"a": 1}, {"a": 2})
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", {"a": 3})
    source = rows.load(str(tmp_path / "set"))
    assert columns(source.train) == [{"a": 1}, {"a": 2}]
    assert source.held_out == [Row(f"{tmp_path / 'set'}, test row 1", {"a": 3})]


def test_directory_of_save_to_disk(hub_cache, tmp_path):
    import datasets

    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "one")
    assert columns(rows.load(str(tmp_path / "one")).train) == [{"a": 1}]
    splits = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert columns(rows.load(str(tmp_path / "two")).held_out) == [{"a": "test"}]


def test_unusable_paths_raise_with_the_layout(tmp_path):
    write(tmp_path / "a.xlsx", b"")
    (tmp_path / "empty").mkdir()
    for name in ("none.jsonl", "a.xlsx", "empty", "set/"):
        with pytest.raises(UserError, match=r"train\.\* and test\.\* of these types") as error:
            rows.load(f"{tmp_path}/{name}")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"a.xls: there is no such file; did you mean .*a.xlsx\?"):
        rows.load(str(tmp_path / "a.xls"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_other_encodings_are_named(suffix, tmp_path):
    write(tmp_path / f"latin.{suffix}", 'prompt\n{"prompt": "é"}'.encode("latin-1"))
    says = (
        f"latin.{suffix}: it is not UTF-8, but has the byte 0xe9; convert it, for example by iconv"
    )
    with pytest.raises(UserError) as error:
        rows.load(str(tmp_path / f"latin.{suffix}"))
    assert str(error.value).endswith(says)


def test_cells_beyond_the_first_line_of_a_csv_file_need_quotes(tmp_path):
    write(tmp_path / "a.csv", b"question\nAdd 1, 2\n")
    with pytest.raises(UserError, match=r'got 2: a text with "," needs quotes'):
        rows.load(str(tmp_path / "a.csv"))


@pytest.fixture
def hub(monkeypatch):
    """Replace the hub; each call is recorded."""
    calls, splits = [], {}

    def load_dataset(*names, split=None):
        calls.append((*names, split))
        return splits if split is None else splits[split.partition("[")[0]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls, splits


@pytest.mark.parametrize(
    ("data", "call"),
    [
        ("org/name", ("org/name", None)),
        ("org/name:main", ("org/name", "main", None)),
        ("org/name:main:train", ("org/name", "main", "train")),
        ("org/name::train[:2]", ("org/name", None, "train[:2]")),
    ],
)
def test_hub_id_may_name_config_and_split(hub, data, call):
    calls, splits = hub
    splits |= {"train": [{"a": 1}], "validation": [{"a": 2}], "test": [{"a": 3}]}
    source = rows.load(data)
    assert calls == [call]
    assert columns(source.train) == [{"a": 1}]
    assert source.train[0].place == f"org/name, {call[-1] or 'train'} row 1"
    expected = [Row("org/name, test row 1", {"a": 3})] if call[-1] is None else None
    assert source.held_out == expected


def test_hub_set_without_train_split(hub):
    _, splits = hub
    splits["test"] = [{"a": 1}]
    source = rows.load("org/name")
    assert columns(source.train) == [{"a": 1}] and source.held_out is None
    splits["validation"] = [{"a": 2}]
    with pytest.raises(UserError, match=r"no split train, but test, validation: .*org/name::SPLIT"):
        rows.load("org/name")


def test_unknown_hub_set_raises_in_one_line(monkeypatch):
    def missing(*names):
        raise ValueError("Config name is missing.\nPlease pick one: ['main', 'socratic']")

    monkeypatch.setattr("datasets.load_dataset", missing)
    message = r"org/name is no file, and not on the hub \(Config name is missing. Please pick one"
    with pytest.raises(UserError, match=message) as error:
        rows.load("org/name")
    assert "\n" not in str(error.value)
