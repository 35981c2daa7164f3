"""Train a language model with GRPO.

    python reference/train.py                             SmolLM2-135M learns to add, on a laptop
    python reference/train.py --preset tiny               75k parameters learn to reverse digits
    python reference/train.py --preset llama-3.2-1b       Llama 3.2 1B Instruct on GSM8K, on a GPU
    python reference/train.py --task capital-of-brazil --prompts 1 --max-new-tokens 64
    python reference/train.py --resume runs/...           continues a run that was stopped
    torchrun --nproc-per-node=8 reference/train.py ...    the same run on eight GPUs
    python reference/train.py --help                      the main settings; --help all: every one

Each step samples groups of completions, one group per question, rewards the right ones, and makes
the completions that beat their group's mean more likely. `train` below is that loop.

The parts are in reference/training. In reading order:

    config, command_line           settings, their flags and presets; flag_errors: misspelt ones
    tasks/                         questions, ground truths and rewards
    model/                         loading a model; LoRA; the policy; scorers (--loss-impl)
    rollout/                       chat template, sampling, packing of completions into rows
    collect, advantages            completions with rewards, and how they compare in their group
    update/                        micro-batches, losses and optimiser steps
    evaluate, warm_start           accuracy on held-out questions; supervised start of --preset tiny
    run/                           run directory, logs, curves, checkpoints, resuming, SIGTERM
    distributed, guards, errors    several processes; values that are not finite, and memory; errors
"""

from __future__ import annotations

import os

# Idle threads sleep: on a machine with other work, spinning made single steps 20 times slower.
# PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import io
import random
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reference.training.advantages import StepReward, compute_advantages
from reference.training.collect import collect_rollouts, examples, rollout_metrics
from reference.training.command_line import parse_command_line
from reference.training.config import TrainConfig
from reference.training.distributed import (
    SINGLE_PROCESS,
    finish_distributed,
    init_distributed,
    is_peer_lost,
)
from reference.training.errors import UserError
from reference.training.evaluate import chat, evaluate
from reference.training.model.policy import load_policy, pick_device
from reference.training.model.scorers import FusedScorer, PlainScorer
from reference.training.rollout.samplers import Sampler, is_server, pick_sampler
from reference.training.run.checkpoint import Checkpoints
from reference.training.run.graceful_shutdown import GracefulShutdown, Stopped
from reference.training.run.plots import load_matplotlib, plot_dashboard
from reference.training.run.progress import memory_gib, progress_bar
from reference.training.run.resume import (
    find_checkpoint,
    record_torchrun_run,
    resume_after_torchrun_restart,
    resume_command,
)
from reference.training.run.run_directory import clear, lock_run_dir, save_json, save_policy
from reference.training.run.run_log import RunLog, load_wandb, read_metrics, summary_table
from reference.training.run.training_state import TrainingState
from reference.training.tasks.rewards import load_function
from reference.training.tasks.tasks import Task, load_task
from reference.training.update.learner import Learner
from reference.training.warm_start import warm_start

ABOUT_THE_LOSS = """\
A note on the loss: its VALUE says nothing about progress. With one optimiser step per batch the
ratio of new to old policy is 1 and the advantages of a group add up to 0. A loss of clipped ratios
is then about 0, up to a remainder from completions of unequal length. Its gradient is not 0. Watch
the reward.
"""
CHAT_TOKENS = 256
TRACKERS = ("tensorboard", "wandb")
SCORERS = {"fused": FusedScorer(), "reference": PlainScorer()}  # --loss-impl


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, also after SIGTERM; 1 if another rank has stopped; 2 after an error of
        the user; 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # So that `| tee` shows progress, and characters beyond the encoding are escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        run(parse_command_line(arguments))
        finish_distributed()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the end", file=sys.stderr)
        return 130
    except Stopped:
        print("\nstopped by SIGTERM", file=sys.stderr)
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        print("stopped because another rank has", file=sys.stderr)
        return 1
    return 0


def run(config: TrainConfig) -> dict:
    """Train, evaluate or chat; return the content of summary.json."""
    from transformers.utils import logging  # it takes a second, for which --help does not wait

    logging.disable_progress_bar()

    # Find errors in the settings before any model is loaded.
    config.check_loss()
    sampler = pick_sampler(config.sampler)
    ranks, device = init_distributed(pick_device(config.device))
    ranks.check_settings(config.prompts, config.sampler)
    if config.chat:
        policy = load_policy(config, device, sampler, config.system)
        chat(policy, config.temperature, CHAT_TOKENS, input)
        return {}
    task = load_task(config)
    questions = task.train + task.held_out
    step_reward: Any = None if config.step_reward is None else load_function(config.step_reward)
    if config.wandb:
        load_wandb()  # imported now, so that a missing package stops the run here
    if config.eval_only:
        policy = load_policy(config, device, sampler, task.system, questions, ranks)
        with ranks.only_rank0_prints():
            return evaluate(policy, task, config)
    load_matplotlib()

    config = resume_after_torchrun_restart(config, ranks)
    with (
        ranks.only_rank0_prints(),
        lock_run_dir(config, ranks) as directory,
        GracefulShutdown(ranks) as shutdown,
    ):
        # Load the model; a model from scratch first learns from ground truths. Every rank reads the
        # checkpoints in rank 0's directory; the directories of the others are temporary.
        checkpoints = Checkpoints(ranks.broadcast(directory), config.keep_checkpoints)
        checkpoint = find_checkpoint(config, checkpoints)
        policy = load_policy(config, device, sampler, task.system, questions, ranks)
        if not is_server(config.sampler):
            sampler = policy.sampler  # not every model can share the prompt of a group
        scorer = SCORERS[config.loss_impl]  # log-probs and loss of a batch, fused or plain
        order = random.Random(config.seed)  # draws the questions of each step
        if config.model == "scratch" and checkpoint is None:
            alone = replace(policy, ranks=SINGLE_PROCESS)  # every rank computes the same steps
            print(f"warm start: {warm_start(alone, scorer, task, order)} supervised steps")

        # Restore the state of a run that is resumed, and cut its logs back to the checkpoint.
        learner = Learner(policy, scorer, config.loss_config(), config)
        state = TrainingState(learner, order, config.as_json())
        if checkpoint is not None:
            state.load(checkpoint)
        if config.resume is not None:
            print(f"{directory} goes on after step {state.step}")
            if ranks.is_first:
                checkpoints.truncate_logs(checkpoint)

        # Only now is an older run in this directory replaced.
        if config.overwrite:
            clear(directory, config.as_json())  # and write the new settings.json
        record_torchrun_run(directory)
        trackers = {name: getattr(config, name) and ranks.is_first for name in TRACKERS}
        resumed_step = None if config.resume is None else state.step
        log = RunLog(directory, config.as_json(), **trackers, after=resumed_step)
        try:
            with closing(log):
                return train(task, sampler, step_reward, state, checkpoints, shutdown, log)
        except (Stopped, KeyboardInterrupt, UserError):
            if state.saved_step and ranks.is_first:
                line = resume_command(config, directory)
                print(f"\nto go on after step {state.saved_step}: {line}", file=sys.stderr)
            raise


def train(
    task: Task,
    sampler: Sampler,
    step_reward: StepReward | None,
    state: TrainingState,
    checkpoints: Checkpoints,
    shutdown: GracefulShutdown,
    log: RunLog,
) -> dict:
    """Run the training loop and the evaluations; return the content of summary.json."""
    learner, directory = state.learner, log.directory
    config, policy = learner.config, learner.policy
    decode = partial(policy.tokenizer.decode, skip_special_tokens=True)

    # Metrics so far: those of the run that is resumed, or an evaluation before the first step.
    history, evaluations = [], []
    if state.step > 0:
        so_far = read_metrics(directory) if policy.ranks.is_first else ([], [])
        history, evaluations = policy.ranks.broadcast(so_far)
    else:
        evaluations.append({"step": 0, **evaluate(policy, task, config)})
        log.evaluation(0, evaluations[0])
    # The two lists grow, and each drawing shows what they then hold.
    title = f"{Path(config.model).name} on {config.task}"
    draw_curves = partial(plot_dashboard, directory / "curves.png", history, evaluations, title)
    draw_curves()
    print(ABOUT_THE_LOSS)

    try:
        for step in (bar := progress_bar(state.step, config.steps, policy.ranks.is_first)):
            # Sample and reward groups of completions. SIGTERM drops the step here; a resumed run
            # repeats it from the recorded state of the random generators.
            state.record_rng()
            started = time.perf_counter()
            rollouts = collect_rollouts(policy, task, sampler, state.order, config)
            rollout_time = time.perf_counter() - started

            # From here to the end of the step SIGTERM has to wait.
            shutdown.defer()

            # Compare each completion with the others of its group. All ranks use rank 0's result,
            # since a reward function may be random.
            advantages = policy.ranks.broadcast(
                compute_advantages(rollouts, config, task.rewards, step_reward, decode)
            )

            # Compute the loss and its gradient, and update the policy.
            update_metrics = learner.step(rollouts.samples, advantages)
            step_time = time.perf_counter() - started
            state.advance(rollouts.num_tokens)

            # Log the metrics of the step.
            row = {
                "step": step,
                **rollout_metrics(rollouts),
                **update_metrics,
                "num_tokens": state.tokens_seen,
                "step_time": step_time,
                "rollout_time": rollout_time,
                "tokens_per_second": rollouts.num_sampled_tokens / step_time,
                "memory_gib": memory_gib(policy.device),
            }
            history.append(row)
            log.step(row)
            shown = {name: row[name] for name in ("reward", "accuracy/lenient")}
            bar.set_postfix(shown, refresh=False)

            # Show some completions.
            if (step - 1) % config.print_every == 0:
                group = examples(rollouts, advantages)
                log.completions(step, group)
                first = f"{group[0]['question']!r} -> {group[0]['completion']!r}"
                tqdm.write(f"step {step}: {first}, reward {group[0]['reward']:.1f}", sys.stdout)

            # Evaluate on held-out questions, and redraw the curves.
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                evaluations.append({"step": step, **evaluate(policy, task, config)})
                log.evaluation(step, evaluations[-1])
            if step % config.dashboard_every == 0:
                draw_curves()

            # Save a checkpoint; stop here if SIGTERM came during the step.
            every = config.checkpoint_every
            if every and (step % every == 0 or step == config.steps):
                state.try_save(checkpoints)
            shutdown.raise_if_requested()

        save_policy(directory, policy, state.step)
        after = evaluate(policy, task, config)
        shutdown.defer()  # the rest takes no longer than a step
    except BaseException as error:
        state.save_interrupted(error, checkpoints, shutdown, directory)
        raise

    # Write the summary, and keep the last checkpoint only.
    evaluations.append({"step": config.steps, **after})
    log.evaluation(config.steps, after)
    draw_curves()
    seconds = round(state.elapsed, 1)
    before = {name: value for name, value in evaluations[0].items() if name != "step"}
    summary = {"before": before, "after": after, "seconds": seconds}
    save_json(directory / "summary.json", summary)
    if policy.ranks.is_first:
        checkpoints.prune(state.step, keep=1)
    print(summary_table(before, after, history))
    written = ", ".join(sorted(path.name for path in directory.iterdir()))
    print(f"{seconds:.0f} s; in {directory}: {written}")
    shutdown.raise_if_requested()
    return summary


if __name__ == "__main__":
    sys.exit(main())
