"""The README's figures are those of the result files, and say so when there are none."""

import json

import pytest

from benchmarks import trainers
from benchmarks.core.results import Record
from benchmarks.core.shapes import Shape
from benchmarks.peers import OURS
from benchmarks.report import __main__ as report
from benchmarks.report import tables

BASE = report.PLANS["cpu"].base


def record(peer=OURS, **changes):
    of = changes.pop("shape", BASE)
    key = ("linear_grpo_loss", "both", of.model, of.N, of.dtype, of.masked, of.inert, peer)
    values = {
        "seconds": 0.5,
        "lower_quartile": 0.4,
        "upper_quartile": 0.6,
        "flops": 10**11,
        "percent_of_roof": 91.0,
        "extra_bytes": 3 << 20,
        "errors": {"loss": 1e-7, "d_weight": 2e-6},
    }
    return Record(*key, **values | changes)


def file(directory, name, *records, commit="abc", kind="cpu", **content):
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
    content |= {"machine": machine, "records": [vars(each) for each in records]}
    (directory / f"{name}.json").write_text(json.dumps(content))


def test_what_stands_in_the_repository_is_what_its_result_files_say():
    assert report.stale() == []


def test_a_changed_figure_is_stale(monkeypatch):
    found = report.load()
    found[0].find("linear_grpo_loss", "both", OURS).seconds = 123.0
    monkeypatch.setattr(report, "load", lambda: found)
    assert "README.md" in report.stale()


def test_a_machine_that_was_not_measured_says_so_and_nothing_else(tmp_path):
    assert report.section("cuda", []) == "not measured yet"
    file(tmp_path, "cpu", record())
    assert report.section("cuda", report.load(tmp_path)) == "not measured yet"


def test_figures_of_a_cpu_never_stand_among_those_of_a_gpu(tmp_path):
    file(tmp_path, "cpu", record(seconds=0.111))
    gpu_base = report.PLANS["cuda"].base
    file(tmp_path, "gpu", record(seconds=0.222, shape=gpu_base), kind="cuda", tests="7 passed")
    found = report.load(tmp_path)
    for kind, own, other in (("cpu", "111 ms", "222 ms"), ("cuda", "222 ms", "111 ms")):
        text = report.section(kind, found)
        assert own in text
        assert other not in text
    assert "Tests on the device: 7 passed." in report.all_cases(found)


def test_a_failed_peer_and_a_faster_peer_are_shown(tmp_path):
    failed = record("TRL", status="failed", reason="RuntimeError: no | driver", seconds=None)
    file(tmp_path, "cpu", record(), failed, record("Liger", seconds=0.25))
    found = report.load(tmp_path)
    summary = report.section("cpu", found)
    assert "| TRL | failed |" in summary
    assert "| Liger | 250 ms |" in summary
    assert "failed: RuntimeError: no \\| driver" in report.all_cases(found)


def test_files_of_different_code_are_not_mixed(tmp_path):
    file(tmp_path, "one", record())
    file(tmp_path, "two", record(), commit="def")
    with pytest.raises(ValueError, match=r"two\.json is of other code"):
        report.load(tmp_path)


def test_text_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="expected one pair of markers"):
        report.marked("no markers", "cpu", "figures")
    text = "before\n<!-- cpu figures -->\nold\n<!-- end of cpu figures -->\nafter"
    assert "old" not in (new := report.marked(text, "cpu", "new \\1"))
    assert new.startswith("before") and "new \\1" in new and new.endswith("after")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1234.5, "1234 s"), (1.5, "1.5 s"), (0.01234, "12.3 ms"), (4.56e-5, "45.6 µs"), (None, "–")],
)
def test_times_have_three_digits(seconds, text):
    assert tables.time(seconds) == text


def test_a_shape_reads_as_words():
    shape = Shape("Llama 3.2 1B", 8192, "bf16", masked=0.5, inert=0.4)
    assert str(shape) == "Llama 3.2 1B, 8,192 tokens, bf16, 50% masked, 40% inert"


def test_the_training_script_stands_beside_trl_s_trainer(tmp_path):
    runs = {"grpo_kernels": [2.0, 3.0, 4.0], "TRL": [20.0, 30.0, 40.0]}
    rest = {"before": {"lenient": 0.25}, "after": {"lenient": 0.5}, "peak_bytes": 3 << 30}
    rest["rewards"] = [0.25, 0.5, 0.75]
    records = [trainers.record_of(name, {"step_times": x, **rest}) for name, x in runs.items()]
    file(tmp_path, "cpu", record())
    file(tmp_path, "trainers", *records)
    text = report.section("cpu", report.load(tmp_path))
    assert "| grpo_kernels | 3 s | 3 GiB | 25.0% → 50.0% after 3 steps, mean reward 0.500 |" in text
    assert "| TRL | 30 s | 3 GiB | 25.0% → 50.0% after 3 steps, mean reward 0.500 |" in text
