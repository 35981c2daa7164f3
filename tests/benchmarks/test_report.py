"""The pages show the figures of the result files, and says so if there are none."""

import json
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from benchmarks import trainers
from benchmarks.core import results
from benchmarks.core.results import Record
from benchmarks.core.shapes import PLANS, Shape
from benchmarks.peers import OURS, PEERS
from benchmarks.peers.plain import PLAIN
from benchmarks.report import charts, pages, tables
from benchmarks.report.__main__ import main


def record(peer=OURS, **changes):
    shape = changes.pop("shape", PLANS["cpu"].base)
    values = {
        "seconds": 0.5,
        "lower_quartile": 0.4,
        "upper_quartile": 0.6,
        "flops": 10**11,
        "extra_bytes": 3 << 20,
        "errors": {"loss": 1e-7, "d_weight": 2e-6},
    }
    task = changes.pop("task", "linear_grpo_loss")
    return Record(task, "both", *astuple(shape), peer, **values | changes)


def write_file(directory, name, *records, commit="abc", kind="cpu", **content):
    machine = {
        "kind": kind,
        "device": f"a {kind}",
        "driver": None,
        "threads": 2,
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
        "commit": commit,
        "date": "2026-01-01",
        "roofs": {},
    }
    content |= {"machine": machine, "records": [vars(record) for record in records]}
    (directory / f"{name}.json").write_text(json.dumps(content))


def test_written_figures_match_the_result_files():
    assert pages.stale() == []


def test_changed_figure_is_stale(monkeypatch):
    devices = results.load()
    devices[0].find("linear_grpo_loss", "both", OURS).seconds = 123.0
    monkeypatch.setattr(pages, "load", lambda: devices)
    assert "benchmarks/README.md" in pages.stale()


def test_section_of_a_machine_without_results(tmp_path):
    assert pages.section("cuda", []) == "not measured yet"
    write_file(tmp_path, "cpu", record())
    assert pages.section("cuda", results.load(tmp_path)) == "not measured yet"


def test_sections_separate_cpu_and_gpu(tmp_path):
    write_file(tmp_path, "cpu", record(seconds=0.111))
    gpu_base = PLANS["cuda"].base
    write_file(
        tmp_path, "gpu", record(seconds=0.222, shape=gpu_base), kind="cuda", tests="7 passed"
    )
    devices = results.load(tmp_path)
    for kind, own, other in (("cpu", "111 ms", "222 ms"), ("cuda", "222 ms", "111 ms")):
        text = pages.section(kind, devices)
        assert own in text
        assert other not in text
    assert "Tests on the device: 7 passed." in pages.all_cases(devices)


def test_failed_and_faster_peers_are_shown(tmp_path):
    failed = record("TRL", status="failed", reason="RuntimeError: no | driver", seconds=None)
    write_file(tmp_path, "cpu", record(), failed, record("Liger", seconds=0.25))
    devices = results.load(tmp_path)
    summary = pages.section("cpu", devices)
    assert "| TRL | failed |" in summary
    assert "| Liger | 250 ms |" in summary
    assert "failed: RuntimeError: no \\| driver" in pages.all_cases(devices)


def test_sizes_headline_and_the_reasons_of_the_slower(tmp_path):
    base = PLANS["cpu"].base
    large, larger = replace(base, N=512), replace(base, N=4096)
    peers = {"bare products": 0.25, OURS: 0.5, PLAIN: 1.0, "TRL": 0.8}
    files = [
        *(record(name, shape=large, seconds=s) for name, s in peers.items()),
        record(shape=larger, seconds=None, extra_bytes=1 << 30),
        record(PLAIN, shape=larger, seconds=None, extra_bytes=10 << 30),
        record("TRL", shape=larger, seconds=None, status="out of memory"),
    ]
    write_file(tmp_path, "cpu", record(), *files)
    (device,) = results.load(tmp_path)
    text = "\n".join(pages.size_tables(device))
    assert "| plain PyTorch | 1 s | 25% | 3 MiB | 2e-06 |" in text
    assert f"TRL: {PEERS['TRL'].cost}." in text and PEERS[OURS].cost not in text
    headline = pages.headline([device])
    assert (
        "**10 times less memory than plain PyTorch at 4,096 tokens, and 0.50 of its time at 512.**"
        in headline
    )
    data = charts.memory_data(device.records, base)
    assert data.by_peer["TRL"] == [(512, 3.0), (4096, None)]
    charts.draw(charts.Chart(data, "light", "title"), tmp_path / "chart.svg")
    assert "4,096 tokens do not fit" in (tmp_path / "chart.svg").read_text()


def test_help_writes_nothing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--help"])
    monkeypatch.setattr(Path, "write_text", None)
    with pytest.raises(SystemExit, match="0"):
        main()


def test_files_of_different_commits_are_refused(tmp_path):
    write_file(tmp_path, "one", record())
    write_file(tmp_path, "two", record(), commit="def")
    with pytest.raises(ValueError, match=r"two\.json is of other code"):
        results.load(tmp_path)


def test_replace_marked():
    with pytest.raises(ValueError, match="expected one pair of markers"):
        pages.replace_marked("no markers", "cpu figures", "figures")
    text = "before\n<!-- cpu figures -->\nold\n<!-- end of cpu figures -->\nafter"
    assert "old" not in (new := pages.replace_marked(text, "cpu figures", "new \\1"))
    assert new.startswith("before") and "new \\1" in new and new.endswith("after")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1234.5, "1234 s"), (1.5, "1.5 s"), (0.01234, "12.3 ms"), (4.56e-5, "45.6 µs"), (None, "–")],
)
def test_format_of_times(seconds, text):
    assert tables.time(seconds) == text


def test_shape_in_words():
    shape = Shape("Llama 3.2 1B", 8192, "bf16", masked=0.5, inert=0.4)
    assert str(shape) == "Llama 3.2 1B, 8,192 tokens, bf16, 50% masked, 40% inert"


def test_table_of_trainers(tmp_path):
    runs = {"grpo_kernels": [2.0, 3.0, 4.0], "TRL": [20.0, 30.0, 40.0]}
    rest = {"before": {"lenient": 0.25}, "after": {"lenient": 0.5}, "peak_bytes": 3 << 30}
    rest["rewards"] = [0.25, 0.5, 0.75]
    records = [trainers.record_of(name, {"step_times": x, **rest}) for name, x in runs.items()]
    write_file(tmp_path, "cpu", record())
    write_file(tmp_path, "trainers", *records)
    text = pages.section("cpu", results.load(tmp_path))
    assert "| grpo_kernels | 3 s | 3 GiB | 25.0% → 50.0% after 3 steps, mean reward 0.500 |" in text
    assert "| TRL | 30 s | 3 GiB | 25.0% → 50.0% after 3 steps, mean reward 0.500 |" in text


def test_tables_of_lora_are_left_out_until_they_are_measured(tmp_path):
    write_file(tmp_path, "cpu", record())
    text = pages.section("cpu", results.load(tmp_path))
    assert "frozen" not in text and "tree" not in text and "LoRA" not in text
    measured = [
        record(task="linear_token_stats_frozen", seconds=0.111),
        record("TRL", task="linear_token_stats_frozen", seconds=0.222),
        record(task="lora_step", seconds=1.0),
        record("TRL", task="lora_step", seconds=3.0),
        record("no head", task="lora_step", seconds=0.5, extra_bytes=1 << 20),
        record(task="lora_stats_step", seconds=2.0),
    ]
    write_file(tmp_path, "cpu", record(), *measured)
    text = pages.section("cpu", results.load(tmp_path))
    assert "| `linear_token_stats_frozen`, fp32, 64 tokens | time |" in text
    assert "| TRL | 222 ms | – | 3 MiB |" in text
    assert "| LoRA step, SmolLM2 135M, 64 tokens, fp32 | time with `linear_grpo_loss` |" in text
    assert "| no head | 500 ms | 1 MiB | – | – |" in text
    assert "| grpo_kernels | 1 s | 3 MiB | 2 s | 3 MiB |" in text
    assert "| TRL | 3 s | 3 MiB | – | – |" in text
