"""Rollouts one step ahead, by a sampler that draws in a thread while the policy trains."""

import json
import os
import signal
import threading

import pytest
import torch

from reference import train
from reference.training.async_rollout import AsyncRollouts
from reference.training.distributed import Ranks
from reference.training.errors import UserError
from reference.training.rollout import samplers
from reference.training.update.learner import Learner
from tests.helpers.own_weights import CopySampler
from tests.helpers.training_runs import left_by, tiny

STEPS, TIMEOUT = 4, 60
FLAGS = ("--steps", str(STEPS), "--prompts", "4", "--group-size", "4")
# The entropy bonus gives every group a gradient.
FLAGS += ("--entropy-coef", "0.01")
FLAGS += ("--learning-rate", "1e-3", "--warmup-steps", "0", "--threads", "1", "--print-every", "1")
STALENESS = "sampling/staleness"


class Threads:
    """The events of a run: what the sampler's thread and the update wait for.

    Attributes:
        before_sample, before_step: called with the number of the batch, or of the step.
        batches, steps: how many have begun.
    """

    def __init__(self):
        self.before_sample = self.before_step = self.after_step = lambda number: None
        self.batches = self.steps = 0
        self.samples, self.closed_while_sampling = False, None


@pytest.fixture
def threads(monkeypatch):
    """Make `--sampler copy`, and record what its thread and the learner do."""
    made, step = Threads(), Learner.step

    class Recorded(CopySampler):
        old = ()

        def __init__(self):
            super().__init__(*self.old)

        def sample(self, *arguments):
            if threading.current_thread() is threading.main_thread():  # to compare
                return super().sample(*arguments)
            made.samples = True
            made.batches += 1
            try:
                made.before_sample(made.batches)
                torch.rand(1)  # as engines do
                return super().sample(*arguments)
            finally:
                made.samples = False

        def close(self):
            made.closed_while_sampling = made.samples

    def recorded_step(learner, *arguments):
        made.steps += 1
        made.before_step(made.steps)
        metrics = step(learner, *arguments)
        made.after_step(made.steps)
        return metrics

    made.sampler = Recorded
    monkeypatch.setitem(samplers.SAMPLERS, "copy", Recorded)
    monkeypatch.setattr(Learner, "step", recorded_step)
    monkeypatch.setattr("reference.train.plot_dashboard", lambda *_: None)
    return made


@pytest.fixture
def run(tmp_path, tiny_model):
    def run(name, *flags):
        start = ("--model", tiny_model, "--sampler", "copy", "--async-rollout", *FLAGS)
        return tiny(tmp_path / name, *start, *flags)

    return run


def wait_for(event):
    assert event.wait(TIMEOUT)


def rows_of(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "reward" in row]


def questions_of(file):
    return [line for line in file.read_text().splitlines() if line.startswith("question:")]


def test_next_batch_is_sampled_while_this_one_trains(threads, run, tmp_path):
    both = threading.Barrier(2, timeout=TIMEOUT)  # broken unless both threads are there

    def meet(number):
        both.wait()

    threads.before_sample = lambda number: number > 1 and meet(number)
    threads.before_step = lambda number: number < STEPS and meet(number)
    assert run("run", "--minibatches", "2") == 0
    assert threads.batches == threads.steps == STEPS, "nothing is sampled beyond --steps"
    rows = rows_of(tmp_path / "run")
    assert [row[STALENESS] for row in rows] == [0, 2, 2, 2]
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/importance_sampling_ratio/max"] == 1
        assert row["sampling/wait_time"] >= 0
    # The ratio is that of the policy to the sampler, from the first minibatch on.
    assert rows[1]["approx_kl"] > 1e-6


def test_result_does_not_depend_on_the_speed_of_the_threads(threads, run, tmp_path):
    trained = [threading.Event() for _ in range(STEPS + 1)]
    # The sampler draws batch n + 1 only after the update of step n, then only before it.
    threads.after_step = lambda number: trained[number].set()
    threads.before_sample = lambda number: number > 1 and wait_for(trained[number - 1])
    assert run("late", "--dynamic-sampling", "1") == 0

    threads.batches = threads.steps = 0
    drawn = [threading.Event() for _ in range(STEPS + 1)]
    sample = threads.sampler.sample

    def sample_and_tell(*arguments):
        completions = sample(*arguments)
        drawn[threads.batches].set()
        return completions

    threads.sampler.sample = sample_and_tell
    threads.after_step = threads.before_sample = lambda number: None
    threads.before_step = lambda number: number < STEPS and wait_for(drawn[number + 1])
    assert run("early", "--dynamic-sampling", "1", "--eval-every", "2") == 0
    late, early = (left_by(tmp_path / name) for name in ("late", "early"))
    evaluations = [row for row in early["metrics"] if row["step"] == 2 and "reward" not in row]
    assert len(evaluations) == 1, "while batch 3 was in flight"
    early["metrics"].remove(evaluations[0])
    assert early == late


def test_error_of_the_sampler_is_raised_and_the_run_resumes(threads, run, tmp_path, capsys):
    def fail(number):
        if number == 3:
            raise UserError("the server has gone")

    threads.before_sample = fail
    assert run("run") == 2
    error = capsys.readouterr().err
    assert "error: the server has gone" in error and "--resume" in error
    assert threads.steps == 2 and threads.closed_while_sampling is False
    threads.before_sample = lambda number: None
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    # The batch that trains first is sampled anew, from the weights of the checkpoint.
    assert [row[STALENESS] for row in rows_of(tmp_path / "run")] == [0, 1, 0, 1]
    assert run("whole") == 0
    for name in ("run", "whole"):
        text = (tmp_path / name / "completions.txt").read_text()
        questions = [line for line in text.splitlines() if "question" in line]
        assert questions, text


def test_ctrl_c_waits_for_the_sampler(threads, run, tmp_path, monkeypatch):
    closing, close = threading.Event(), AsyncRollouts.close

    def close_now(rollouts):
        closing.set()
        close(rollouts)

    monkeypatch.setattr(AsyncRollouts, "close", close_now)
    threads.before_step = lambda number: number == 2 and os.kill(os.getpid(), signal.SIGINT)
    threads.before_sample = lambda number: number == 3 and wait_for(closing)
    assert run("run") == 130
    assert threads.closed_while_sampling is False and threads.steps == 2
    assert len(rows_of(tmp_path / "run")) == 2
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert len(rows_of(tmp_path / "run")) == STEPS


def test_old_weights_are_noticed_before_they_train(threads, run, capsys):
    threads.sampler.old = ("lm_head",)
    assert run("run") == 2
    error = capsys.readouterr().err
    assert "error: before step 2: the log-probs of the sampler differ" in error
    assert "look old: the tied LM head (lm_head);" in error
    assert threads.batches == 2 and threads.steps == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--async-rollout samples while the policy trains, and --sampler shared-prompt"),
        (("--sampler", "http://x", "--top-p", "0.9", "--no-support"), "not with --no-support"),
        (("--sampler", "http://x", "--stale-sampler"), "on those of a fixed model: choose one"),
    ],
)
def test_settings_that_it_cannot_work_with(tmp_path, capsys, flags, message):
    assert tiny(tmp_path, "--async-rollout", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_several_ranks_are_refused():
    with pytest.raises(UserError, match="--async-rollout works in one process; got 2 ranks"):
        Ranks(0, 2).check_settings(8, "http://x", async_rollout=True)
