"""The table of alternating rounds: times as ratios to this package, reasons of peers that fail."""

import time

import pytest

from benchmarks import side_by_side
from benchmarks.core import correctness, results
from benchmarks.peers import OURS, PEERS, REFERENCE, Peer

pytestmark = pytest.mark.usefixtures("pytorch_backend")
TASK = "linear_distillation_jsd"


def test_table_of_a_task(monkeypatch, capsys):
    compute = PEERS[OURS].tasks[TASK]

    def slow(problem):
        time.sleep(0.05)
        return compute(problem)

    def wrong(problem):
        return {"loss": 1.5 * compute(problem)["loss"]}

    absent = Peer("absent", {TASK: compute}, "nothing", package="no-such-package")
    peers = {name: PEERS[name] for name in (OURS, REFERENCE)} | {"absent": absent}
    for name, adapter in (("slow", slow), ("wrong", wrong)):
        peers[name] = Peer(name, {TASK: adapter}, "nothing")
    monkeypatch.setattr(side_by_side, "PEERS", peers)
    monkeypatch.setattr(correctness, "PEERS", peers)

    side_by_side.main([TASK, "--model", "tiny", "--tokens", "16", "--rounds", "3"])
    title, _, *table = capsys.readouterr().out.strip().split("\n")
    assert title == f"{TASK}, both, tiny, 16 tokens, fp32, 3 rounds"
    rows = {row[0]: row for row in (line.strip("| ").split(" | ") for line in table[2:])}
    assert list(rows) == ["bare products", OURS, REFERENCE, "absent", "slow", "wrong"]
    assert float(rows[OURS][3]) == 1 < float(rows["slow"][3])
    assert rows["wrong"][1].startswith("refused: error of loss")
    assert rows["absent"][1] == "failed: ModuleNotFoundError: no-such-package is not installed"


def test_wrong_result_of_ours_is_an_error(monkeypatch):
    compute = PEERS[OURS].tasks[TASK]
    wrong = Peer(OURS, {TASK: lambda problem: {"loss": 1.5 * compute(problem)["loss"]}}, "nothing")
    monkeypatch.setitem(PEERS, OURS, wrong)
    with pytest.raises(correctness.Refused, match="error of loss"):
        side_by_side.main([TASK, "--model", "tiny", "--tokens", "16"])


def test_shape_and_peer_of_the_user(monkeypatch, capsys):
    peers = {name: PEERS[name] for name in (OURS, REFERENCE)}  # the command adds its peer
    monkeypatch.setattr(side_by_side, "PEERS", peers)
    monkeypatch.setattr(correctness, "PEERS", peers)
    command = ["linear_grpo_loss", "--rounds", "2", "--shape", "16,65,8,fp32", "32,90,8,bf16"]
    side_by_side.main([*command, "--peer", "grpo_kernels:linear_grpo_loss"])
    printed = capsys.readouterr().out
    for title in ("V = 65, H = 8, 16 tokens, fp32", "V = 90, H = 8, 32 tokens, bf16"):
        assert f"linear_grpo_loss, both, {title}, 2 rounds" in printed
    assert printed.count("| grpo_kernels:linear_grpo_loss |") == 2


def test_memory_alone_and_results_that_are_not_measured_again(monkeypatch, tmp_path, capsys):
    peers = {name: PEERS[name] for name in (OURS, REFERENCE)}
    monkeypatch.setattr(side_by_side, "PEERS", peers)
    monkeypatch.setattr(correctness, "PEERS", peers)
    file = tmp_path / "cpu.json"
    command = ["linear_grpo_loss", "--rounds", "0", "--model", "tiny", "--results", str(file)]
    side_by_side.main([*command, "--tokens", "256", "32"])
    _, records, _ = results.read(file)
    memory = {(record.peer, record.N): record.extra_bytes for record in records}
    assert memory[OURS, 32] < memory[OURS, 256] < memory[REFERENCE, 256]
    assert not any(record.seconds for record in records)
    capsys.readouterr()
    side_by_side.main([*command, "--tokens", "32", "64"])
    assert "64 tokens" in (printed := capsys.readouterr().out) and "32 tokens" not in printed


@pytest.mark.parametrize("text", ["64,512,fp32", "64,512,32,int8", "0,512,32,fp32", "a,b,c,fp32"])
def test_wrong_shape(text, capsys):
    with pytest.raises(SystemExit):
        side_by_side.main(["linear_grpo_loss", "--shape", text])
    assert "expected N,V,H,DTYPE with sizes of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no_such_module:f", "grpo_kernels:nothing", "grpo_kernels"])
def test_wrong_peer(text, capsys):
    with pytest.raises(SystemExit):
        side_by_side.main(["linear_grpo_loss", "--peer", text])
    assert f"expected module:function, got {text!r}" in capsys.readouterr().err
