"""The script on two ranks under torchrun: same numbers as one process, restarts, SIGTERM."""

import json
import os
import re
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

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "reference" / "train.py"
QUICK = ROOT / "tests" / "helpers" / "quick_train.py"
BASE = (
    *("--preset", "tiny", "--steps", "4", "--prompts", "5", "--minibatches", "2"),
    *("--eval-questions", "33", "--eval-every", "2", "--checkpoint-every", "1"),
    *("--print-every", "1", "--no-tensorboard", "--top-p", "0.9"),
)
OBJECTIVE = ("--loss", "topr", "--aggregation", "prompt_mean", "--advantage", "ema")
OBJECTIVE += ("--nll-coef", "0.1", "--beta", "0.05")
PYTHON = (sys.executable,)
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
CLOCKS = ("time", "per_second", "memory")


def run(directory, *flags, launcher=TORCHRUN, script=QUICK):
    # Interpreted kernels would take minutes.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [*launcher, script, *BASE, "--output-dir", directory, *flags],
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


def assert_same_metrics(ours, expected):
    for row, expected_row in zip(ours, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-3, abs=2e-5)


def assert_same_run(one, other):
    """Compare the metrics and the models of two runs."""
    assert_same_metrics(metrics(one), metrics(other))
    ours, expected = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


OLD_HEAD = """
    import sys

    from transformers import LlamaForCausalLM

    from reference import train
    from reference.training.rollout import samplers
    from tests.helpers.own_weights import CopySampler

    class OldHead(CopySampler):
        def start(self, policy, directory):
            model = policy.model
            super().start(type("Policy", (), {"model": LlamaForCausalLM(model.config)}), directory)
            with policy.ranks.unsharded(model):
                self.sync(policy)
            self.old = ("lm_head",)

    samplers.SAMPLERS["old-head"] = OldHead
    sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_stop_together_if_the_sampler_has_an_old_head(tmp_path, tiny_model, parallel):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(OLD_HEAD))
    flags = ("--sampler", "old-head", "--model", tiny_model, "--parallel", parallel)
    flags += ("--learning-rate", "1e-3", "--warmup-steps", "0", "--beta", "0", "--steps", "2")
    done = run(tmp_path / "run", *flags, launcher=TORCHRUN, script=script)
    assert done.returncode != 0
    # Two ranks write to one stream: an error may follow other text on its line.
    errors = re.findall("error: step 2: the log.*", done.stderr)
    assert len(set(errors)) == 1, done.stderr
    assert "These look old: the tied LM head (lm_head);" in errors[0]
    assert [row["step"] for row in metrics(tmp_path / "run") if "reward" in row] == [1]


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
    """Write a reward with which the second rank ends in step 3, and return its flags."""
    path = tmp_path / "dies.py"
    path.write_text(textwrap.dedent(DIES).format(how=how))
    return ("--reward", f"{path}:dies=0.0")


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny_model):
    """Directory of a run of one process, in which nothing dies."""
    directory = tmp_path_factory.mktemp("single")
    flags = ("--model", tiny_model, *dying_reward(directory, "never = None"), *OBJECTIVE)
    done = run(directory / "run", *flags, launcher=PYTHON)
    assert done.returncode == 0, done.stderr
    return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_rank_restarts_and_two_ranks_match_one_process(
    single, tiny_model, tmp_path, parallel
):
    reward = dying_reward(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    flags = ("--model", tiny_model, *reward, *OBJECTIVE, "--parallel", parallel)
    done = run(tmp_path / "run", *flags, launcher=(*TORCHRUN, "--max-restarts=1"))
    assert done.returncode == 0, done.stderr
    assert "goes on after step 2" in done.stdout
    assert_same_run(tmp_path / "run", single)


@pytest.mark.slow
@pytest.mark.parametrize("coef", ["None", "0.5"])
def test_two_ranks_distil_like_one_process_from_a_warm_start(tiny_model, tmp_path, coef):
    flags = ("--teacher", tiny_model, "--steps", "2", "--eval-questions", "4")
    flags += ("--teacher-coef", coef)
    for name, launcher in (("one", PYTHON), ("fsdp", TORCHRUN)):
        parallel = () if name == "one" else ("--parallel", name)
        done = run(tmp_path / name, *flags, *parallel, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert "warm start: 4 supervised steps" in done.stdout
    assert_same_run(tmp_path / "fsdp", tmp_path / "one")


@pytest.mark.slow
def test_failing_rank_stops_all_ranks_with_its_error(tiny_model, tmp_path):
    reward = dying_reward(tmp_path, "raise ValueError('the reward fell over')")
    began = time.monotonic()
    done = run(tmp_path / "run", "--model", tiny_model, *reward, "--checkpoint-every", "None")
    assert done.returncode != 0 and "the reward fell over" in done.stderr
    assert time.monotonic() - began < 60
    # With DDP the first rank has all that a checkpoint needs.
    steps = max(row["step"] for row in metrics(tmp_path / "run"))
    assert steps > 0 and (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir()


@pytest.mark.slow
def test_sigterm_stops_all_ranks_after_a_step(single, tiny_model, tmp_path):
    """One rank receives it, and both save together. Until then they match one process."""
    reward = dying_reward(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)")
    flags = ("--model", tiny_model, *reward, *OBJECTIVE, "--checkpoint-every", "9")
    done = run(tmp_path / "run", *flags, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGTERM" in done.stderr
    assert done.stdout.count("sampled completions:") == 2, "only the first rank prints"
    stopped = metrics(tmp_path / "run")
    assert [row["step"] for row in stopped if "reward" in row] == [1, 2, 3]
    assert_same_metrics(stopped, metrics(single)[: len(stopped)])
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
