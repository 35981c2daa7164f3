"""Runs of the training script with --sampler vllm: each step, Ctrl-C, ranks and refusals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reference import train
from tests.helpers.training_runs import left_by
from tests.helpers.vllm import MAX_DIFFERENCE, needs_vllm, save_tied_llama

pytestmark = needs_vllm

ROOT = Path(__file__).parents[2]
STEPS = 3
BASE = ("--sampler", "vllm", "--vllm-memory", "0.02", "--steps", str(STEPS), "--prompts", "2")
BASE += ("--group-size", "4", "--learning-rate", "1e-3", "--eval-questions", "4")
BASE += ("--loss-impl", "reference", "--no-tensorboard", "--print-every", "1")
REWARD = """
def varied(completions, **_):
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Return flags with a model and a reward that differs within each group."""
    directory = tmp_path_factory.mktemp("inputs")
    model = save_tied_llama(directory / "llama")
    (directory / "reward.py").write_text(REWARD)
    return [*BASE, "--model", str(model), "--reward", f"{directory / 'reward.py'}:varied"]


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags, "--output-dir", str(directory)]) == 0
    return directory


def steps_of(directory):
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "grad_norm" in row]


def assert_sampled_from_the_policy(rows):
    assert len(rows) == STEPS
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/max"] < MAX_DIFFERENCE


def test_each_step_samples_from_the_weights_of_the_step_before(whole_run):
    assert_sampled_from_the_policy(steps_of(whole_run))


def test_each_step_of_an_adapter_samples_from_it(flags, tmp_path):
    command = [*flags, "--lora-rank", "4", "--output-dir", str(tmp_path / "run")]
    assert train.main(command) == 0
    assert_sampled_from_the_policy(steps_of(tmp_path / "run"))


def test_ctrl_c_inside_the_engine_leaves_a_run_that_goes_on_to_the_same_result(
    flags, whole_run, tmp_path, monkeypatch
):
    from vllm.v1.engine.llm_engine import LLMEngine

    engine_step, calls = LLMEngine.step, []

    def interrupted_step(engine):
        calls.append(None)
        if len(calls) == 20:  # in the second step of the run: 12 tokens are 12 or 13 calls
            signal.raise_signal(signal.SIGINT)
        return engine_step(engine)

    monkeypatch.setattr(LLMEngine, "step", interrupted_step)
    stopped = tmp_path / "stopped"
    assert train.main([*flags, "--output-dir", str(stopped)]) == 130
    assert len(steps_of(stopped)) == 1
    assert train.main(["--resume", str(stopped), *flags[-2:]]) == 0
    assert left_by(stopped) == left_by(whole_run)


def test_ranks_with_sharded_weights_sample_what_one_process_samples(flags, whole_run, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script, directory = ROOT / "reference" / "train.py", tmp_path / "run"
    command = [*launcher, script, *flags, "--parallel", "fsdp", "--output-dir", directory]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_sampled_from_the_policy(steps_of(directory))
    # Later steps differ in the last digit of the weights.
    ours, expected = ((run / "completions.txt").read_text() for run in (directory, whole_run))
    first = expected[: expected.index("step 2")]
    assert ours.startswith(first)


def test_model_that_vllm_does_not_run_is_one_line(flags, tmp_path, capsys):
    model = save_tied_llama(tmp_path / "llama", hidden_size=40)  # heads of 20 have no attention
    command = [*flags, "--model", str(model), "--output-dir", str(tmp_path / "run")]
    assert train.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --sampler vllm does not run LlamaForCausalLM here: ")


def test_engine_without_sampling_masks_names_the_flag_that_does_without(flags, tmp_path, capsys):
    command = [*flags, "--top-p", "0.9", "--output-dir", str(tmp_path / "run")]
    assert train.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "here: sampling distribution replay requires" in error
    assert error.endswith("train without them with --no-support")
