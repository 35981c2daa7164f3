"""The script on two ranks under torchrun: same numbers as one process, restarts, SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_kernels import TokenSupport
from reference.training.distributed import SINGLE_PROCESS, Ranks, to_device
from reference.training.errors import UserError
from reference.training.run.graceful_shutdown import GracefulShutdown, Stopped

SCRIPT = Path(__file__).parents[3] / "reference" / "train.py"
BASE = (
    *("--preset", "tiny", "--steps", "4", "--prompts", "5", "--minibatches", "2"),
    *("--eval-questions", "33", "--eval-every", "2", "--checkpoint-every", "1"),
    *("--print-every", "1", "--no-tensorboard", "--top-p", "0.9"),
)
OBJECTIVE = ("--loss", "topr", "--aggregation", "prompt_mean", "--advantage", "ema")
OBJECTIVE += ("--nll-coef", "0.1", "--beta", "0.05")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
CLOCKS = ("time", "per_second", "memory")


def run(directory, *flags, launcher=(sys.executable,), objective=OBJECTIVE):
    # Interpreted kernels would take minutes.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [*launcher, SCRIPT, *BASE, *objective, "--output-dir", directory, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def metrics(directory):
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [
        {name: x for name, x in row.items() if not any(clock in name for clock in CLOCKS)}
        for row in rows
    ]


def assert_same_run(one, other):
    """Compare the metrics and the models of two runs."""
    for ours, expected in zip(metrics(one), metrics(other), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=2e-5)
    ours, expected = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    directory = tmp_path_factory.mktemp("single") / "run"
    done = run(directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_match_one_process(single, tmp_path, parallel):
    done = run(tmp_path / "run", "--parallel", parallel, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sampled completions:") == 3, "only the first rank prints"
    assert_same_run(tmp_path / "run", single)


@pytest.mark.slow
def test_two_ranks_distil_like_one_process(single, tmp_path):
    flags = ("--teacher", str(single / "model"), "--steps", "2", "--eval-questions", "4")
    launchers = {"one": (sys.executable,), "fsdp": TORCHRUN}
    for name, launcher in launchers.items():
        parallel = () if name == "one" else ("--parallel", name)
        done = run(tmp_path / name, *flags, *parallel, launcher=launcher, objective=())
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "fsdp", tmp_path / "one")


DIES = """
    import os, signal

    calls = []

    def dies(prompts, completions, answers):
        calls.append(None)
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        # The first call is the trial before the model is loaded.
        if first and os.environ["RANK"] == "1" and len(calls) == 4:
            {how}
        return [0.0] * len(completions)
"""


def dying_reward(tmp_path, how):
    path = tmp_path / "dies.py"
    path.write_text(textwrap.dedent(DIES).format(how=how))
    return f"{path}:dies=0.0"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_rank_restarts_from_the_last_checkpoint(single, tmp_path, parallel):
    reward = dying_reward(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    launcher = (*TORCHRUN, "--max-restarts=1")
    flags = ("--parallel", parallel, "--reward", reward)
    done = run(tmp_path / "run", *flags, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "goes on after step 2" in done.stdout
    whole = [
        {name: x for name, x in row.items() if name != "rewards/dies/mean"}
        for row in metrics(tmp_path / "run")
    ]
    for ours, expected in zip(whole, metrics(single), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=2e-5)


@pytest.mark.slow
def test_failing_rank_stops_all_ranks_with_its_error(tmp_path):
    reward = dying_reward(tmp_path, "raise ValueError('the reward fell over')")
    began = time.monotonic()
    flags = ("--reward", reward, "--checkpoint-every", "None")
    done = run(tmp_path / "run", *flags, launcher=TORCHRUN)
    assert done.returncode != 0 and "the reward fell over" in done.stderr
    assert time.monotonic() - began < 60
    # With DDP the first rank has all that a checkpoint needs.
    steps = max(row["step"] for row in metrics(tmp_path / "run"))
    assert steps > 0 and (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir()


@pytest.mark.slow
def test_sigterm_stops_all_ranks_after_a_step(single, tmp_path):
    """One rank receives it, and both save together."""
    reward = dying_reward(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)")
    done = run(tmp_path / "run", "--reward", reward, "--checkpoint-every", "9", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGTERM" in done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run") if "reward" in row] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()


def test_signal_during_the_stop_collective_is_deferred():
    class Pair:
        """Two ranks: the other was asked to stop, this one is during the collective."""

        size, is_first, calls = 2, True, 0

        def all_gather(self, value):
            signal.raise_signal(signal.SIGTERM)  # in the midst of a collective
            self.calls += 1
            return [signal.SIGTERM, value]

    with GracefulShutdown() as shutdown:
        shutdown.share(ranks := Pair())
        with pytest.raises(Stopped):
            shutdown.raise_if_requested()
        assert ranks.calls == 1
        signal.raise_signal(signal.SIGTERM)  # they save, together


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_partition_items_in_order(size):
    items = list(range(5))
    shards = [Ranks(rank, size).shard(items) for rank in range(size)]
    assert [item for shard in shards for item in shard] == items
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_single_process_needs_no_collectives():
    value = {"x": torch.ones(2)}
    assert SINGLE_PROCESS.all_gather(value) == [value] and SINGLE_PROCESS.broadcast(value) is value
    with SINGLE_PROCESS.shared_rng(3, torch.device("cpu")) as draw:
        torch.manual_seed(0)
        drawn = draw()
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_to_device_moves_nested_tensors():
    value = {"a": [torch.ones(1)], "b": (1, "text"), "c": TokenSupport.from_lists([[1]])}
    moved = to_device(value, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["b"] == value["b"]
    assert moved["c"].token_ids.is_meta and moved["c"].offsets.is_meta


def test_settings_unsuited_to_several_ranks_are_named():
    with pytest.raises(UserError, match="--prompts must be at least the 3 ranks; got 2"):
        Ranks(0, 3).check_settings(2, "shared-prompt")
    with pytest.raises(UserError, match="--sampler generate draws on each rank alike"):
        Ranks(0, 2).check_settings(8, "generate")
