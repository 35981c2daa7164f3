"""benchmarks.gpu: parts that fail, hang or are killed lose no case that was measured."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.core.results import ROOT, Record, ResultFile

HANGS = (
    "import subprocess, sys, time, pathlib\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "pathlib.Path({path!r}).write_text(str(child.pid))\n"
    "time.sleep(60)"
)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Parts that fail, succeed and hang with a child."""
    commands = {
        "fails": ("-c", "raise SystemExit(3)"),
        "works": ("-c", "print('== 5 cases ==')"),
        "hangs": ("-c", HANGS.format(path=str(tmp_path / "child"))),
        "works too": ("-c", "pass"),
    }
    made = {
        name: gpu.Part("?", command, limit=4.0, writes=False, rehearse=())
        for name, command in commands.items()
    }
    monkeypatch.setattr(gpu, "PARTS", made)
    monkeypatch.setattr(gpu, "GRACE", 1.0)


def test_failed_or_hanging_part_does_not_stop_the_others(parts, tmp_path):
    started = time.monotonic()
    run = gpu.Run(tmp_path, torch.device("cpu"), rehearse=True)
    for name in gpu.PARTS:
        run.execute(name, 100.0)
    found = {name: outcome["outcome"] for name, outcome in run.outcomes.items()}
    assert found == {
        "fails": "failed (exit 3)",
        "works": "done",
        "hangs": "cut off",
        "works too": "done",
    }
    assert time.monotonic() - started < 30
    child = f"/proc/{(tmp_path / 'child').read_text()}/stat"
    assert not os.path.exists(child) or " Z " in open(child).read()
    summary = (tmp_path / "summary.md").read_text()
    assert "| fails | ? | failed (exit 3) |" in summary and "5 cases" in summary
    # The same command again repeats what is not done, and nothing else.
    again = gpu.Run(tmp_path, torch.device("cpu"), rehearse=True)
    before = again.outcomes["works"]
    again.execute("works", 0.0)
    again.execute("fails", 0.0)
    assert again.outcomes["works"] is before and again.outcomes["fails"]["outcome"] == "cut off"


def records(path):
    return json.loads(path.read_text())["records"] if path.exists() else []


def test_killed_part_keeps_its_cases_and_continues(tmp_path):
    path = tmp_path / "logits.json"
    arguments = ("logits", "--rehearse", "--results", str(path))
    command = [sys.executable, "-m", "benchmarks.gpu_parts", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while len(records(path)) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = records(path)
    assert 2 <= len(kept) < 6
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert records(path)[: len(kept)] == kept and len(records(path)) == 6
    assert all(record["status"] == "ok" and record["seconds"] > 0 for record in records(path))


@pytest.mark.parametrize(("seconds", "verdict"), [(0.0015, "met"), (0.0017, "missed: 1.70")])
def test_summary_says_which_targets_are_met(tmp_path, seconds, verdict):
    device = torch.device("cpu")
    run = gpu.Run(tmp_path, device, rehearse=False)
    results = ResultFile(run.file_of("logits"), device, {})
    results.add(
        Record("grpo_loss", "both", gpu.MODEL, 8192, "bf16", 0.0, 0.0, gpu.OURS, seconds=seconds)
    )
    assert f"| 1.6 ms | {verdict} |" in run.summary()
