"""Train a language model with GRPO.

    python reference/train.py                             SmolLM2-135M learns to add, on a laptop
    python reference/train.py --preset tiny               75k parameters learn to reverse digits
    python reference/train.py --preset llama-3.2-1b       Llama 3.2 1B Instruct on GSM8K, on a GPU
    python reference/train.py --task capital-of-brazil    it learns to think and answer in tags
    python reference/train.py --teacher runs/.../model    on-policy distillation from a teacher
    python reference/train.py --resume runs/...           continues a run that was stopped
    torchrun --nproc-per-node=8 reference/train.py ...    the same run on eight GPUs
    python reference/train.py --help                      the main settings; --help all: every one

Each step samples groups of completions, one group per question, rewards the right ones, and makes
the completions that beat their group's mean more likely. `train` below is that loop. With --teacher
the update lowers the divergence from the teacher on the completions instead.

The parts are in reference/training. In reading order:

    config, command_line           settings, their flags and presets; flag_errors: misspelt ones
    tasks/                         questions, ground truths and rewards
    model/                         loading a model; LoRA; policy and teacher; scorers (--loss-impl)
    rollout/                       chat template, sampling, packing of completions into rows
    collect, advantages            completions with rewards, and how they compare in their group
    async_rollout                  the next batch is sampled while this one trains
    update/                        micro-batches, losses and optimiser steps
    evaluate, warm_start           accuracy on held-out questions; supervised start of --preset tiny
    run/                           run directory, logs, curves, checkpoints, resuming, Ctrl-C
    distributed, guards, errors    several processes; values that are not finite, and memory; errors
"""

from __future__ import annotations

import os

# Idle threads sleep: on a machine with other work, spinning made single steps 20 times slower.
# PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from reference.training.run.graceful_shutdown import GracefulShutdown, Stopped, exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # the imports below take seconds

import io
import random
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from reference.training.advantages import StepReward, compute_advantages, load_step_reward
from reference.training.async_rollout import AsyncRollouts
from reference.training.collect import collect_rollouts, examples, rollout_metrics
from reference.training.command_line import parse_command_line
from reference.training.config import TrainConfig
from reference.training.distributed import (
    SINGLE_PROCESS,
    finish_distributed,
    init_distributed,
    is_peer_lost,
)
from reference.training.errors import UserError, discard_stdout
from reference.training.evaluate import chat, evaluate
from reference.training.model.policy import load_policy, pick_device
from reference.training.model.scorers import FusedScorer, PlainScorer
from reference.training.model.teacher import Teacher
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.samplers import pick_sampler
from reference.training.run.checkpoint import Checkpoints
from reference.training.run.disk_use import describe_disk_use, describe_files
from reference.training.run.inputs import digest_inputs
from reference.training.run.plots import load_matplotlib, plot_dashboard
from reference.training.run.progress import memory_gib, progress_bar
from reference.training.run.resume import (
    find_checkpoint,
    how_to_go_on,
    record_torchrun_run,
    resume_after_torchrun_restart,
)
from reference.training.run.run_directory import clear, lock_run_dir, save_json, save_policy
from reference.training.run.run_log import RunLog, load_wandb, read_metrics, summary_table
from reference.training.run.training_state import TrainingState
from reference.training.tasks.tasks import Task, load_task
from reference.training.update.learner import Learner
from reference.training.warm_start import warm_start

ABOUT_THE_LOSS = """\
A note on the loss: its VALUE says nothing about progress. With one optimiser step per batch the
ratio of new to old policy is 1 and the advantages of a group add up to 0. A loss of clipped ratios
is then about 0, up to a remainder from completions of unequal length. Its gradient is not 0. Watch
the reward.
"""
ABOUT_BOTH = """\
The loss is that of the rewards plus {coef:g} times `divergence`, the KL to the teacher in nats per
token of the completions that the student sampled. The value of the first, `policy_loss`, says
nothing about progress. Watch the reward and the divergence.
"""
ABOUT_THE_DIVERGENCE = """\
The loss is the divergence of the student from the teacher, in nats per token of the completions
that the student sampled. Rewards are measured and not trained on.
"""
CHAT_TOKENS = 256
SCORERS = {"fused": FusedScorer(), "reference": PlainScorer()}  # --loss-impl


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, also after SIGTERM; 1 if another rank has stopped; 2 after an error of
        the user; 130 after Ctrl-C; 141 if the reader of its output has gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # So that `| tee` shows progress, and characters beyond the encoding are escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    shutdown = GracefulShutdown()
    try:
        with shutdown:
            run(parse_command_line(arguments), shutdown)
            finish_distributed()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if shutdown.is_first_rank:
            print(f"\n{shutdown.next_step()}\nstopped by {stop}", file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:  # `| head` has read enough, or `| tee` has died
        discard_stdout()
        print("stopped: the reader of the output has gone", file=sys.stderr)
        return 141
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        print("stopped because another rank has", file=sys.stderr)
        return 1
    return 0


def run(config: TrainConfig, shutdown: GracefulShutdown) -> dict:
    """Train, evaluate or chat; return the content of summary.json."""
    from transformers.utils import logging  # it takes a second, for which --help does not wait

    logging.disable_progress_bar()

    # Find errors in the settings before any model is loaded.
    config.check_loss()
    sampler = pick_sampler(config)
    ranks, device = init_distributed(pick_device(config.device))
    ranks.check_settings(config.prompts, config.sampler, config.async_rollout)
    if config.chat:
        policy = load_policy(config, device, sampler, config.system)
        shutdown.release()
        chat(policy, config.temperature, CHAT_TOKENS, input)
        return {}
    with ranks.only_rank0_prints():
        task = load_task(config)
        step_reward = load_step_reward(config, task)
    questions = task.train + task.held_out
    if config.wandb:
        load_wandb()  # imported now, so that a missing package stops the run here
    if config.eval_only:
        policy = load_policy(config, device, sampler, task.system, questions, ranks)
        with ranks.only_rank0_prints():
            return evaluate(policy, task, config)
    load_matplotlib()
    with ranks.only_rank0_prints():
        source = None if config.teacher is None else Teacher.find(config)

    config = resume_after_torchrun_restart(config, ranks)
    locked = lock_run_dir(config, ranks)
    with ranks.only_rank0_prints(), locked as directory, closing(sampler):
        # Load the model; a model from scratch first learns from ground truths. Every rank reads the
        # checkpoints in rank 0's directory; the directories of the others are temporary.
        checkpoints = Checkpoints(ranks.broadcast(directory), config.keep_checkpoints)
        inputs = digest_inputs(config, task)
        checkpoint = find_checkpoint(config, checkpoints, inputs)
        check = None if source is None else source.check_student
        policy = load_policy(config, device, sampler, task.system, questions, ranks, check)
        if not sampler.has_own_weights:
            sampler = policy.sampler  # not every model can share the prompt of a group
        teacher = None if source is None else source.load(policy, questions)
        scorer = SCORERS[config.loss_impl]  # log-probs and loss of a batch, fused or plain
        order = random.Random(config.seed)  # draws the questions of each step
        if config.model == "scratch" and checkpoint is None:
            alone = replace(policy, ranks=SINGLE_PROCESS)  # every rank computes the same steps
            print(f"warm start: {warm_start(alone, scorer, task, order)} supervised steps")

        # Restore the state of a run that is resumed, and cut its logs back to the checkpoint.
        learner = Learner(policy, scorer, config.loss_config(), config, teacher, sampler)
        state = TrainingState(learner, order, config.as_json(), inputs)
        print(describe_disk_use(directory, learner))
        if checkpoint is not None:
            state.load(checkpoint)
            print(f"{directory} goes on after step {state.step}")
        sampler.start(policy, directory)

        # Only now is an older run in this directory replaced.
        shutdown.share(ranks)
        shutdown.defer("the start")
        if config.overwrite:
            clear(directory, config.as_json())  # and write the new settings.json
        if config.resume is not None and ranks.is_first:
            checkpoints.restore_logs(checkpoint)
        record_torchrun_run(directory)
        log = RunLog(
            directory,
            config.as_json(),
            tensorboard=config.tensorboard and ranks.is_first,
            wandb=config.wandb and ranks.is_first,
            after=None if config.resume is None else state.step,
        )
        shutdown.next_step = partial(how_to_go_on, config, checkpoints)
        try:
            with closing(log):
                shutdown.raise_if_requested()
                return train(task, sampler, step_reward, state, checkpoints, shutdown, log)
        except Exception:
            if ranks.is_first and checkpoints.steps():
                print(f"\n{shutdown.next_step()}", file=sys.stderr)
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
    ahead = AsyncRollouts(learner, task, sampler, state.order) if config.async_rollout else None

    # Metrics so far: those of the run that is resumed, or an evaluation before the first step.
    so_far = read_metrics(directory) if policy.ranks.is_first else ([], [])
    history, evaluations = policy.ranks.broadcast(so_far)
    # The two lists grow, and each drawing shows what they then hold.
    title = f"{Path(config.model).name} on {config.task}"
    draw_curves = partial(
        plot_dashboard, directory / "curves.png", history, evaluations, title, task.reward_max
    )

    def evaluate_if_due() -> None:
        """Evaluate before the first step and every --eval-every steps, but not twice."""
        every, last = config.eval_every, evaluations[-1]["step"] if evaluations else None
        is_due = state.step == 0 or (every and state.step % every == 0)
        if is_due and state.step not in (last, config.steps):
            if ahead is not None:
                ahead.wait()  # an evaluation draws from the global random generator
            evaluations.append({"step": state.step, **evaluate(policy, task, config)})
            shutdown.defer("the evaluation")  # otherwise a resumed run might log it again
            log.evaluation(state.step, evaluations[-1])
            shutdown.raise_if_requested()

    try:
        evaluate_if_due()
        draw_curves()
        state.save_if_due(checkpoints)
        about = ABOUT_THE_LOSS if learner.teacher is None else ABOUT_BOTH
        about = ABOUT_THE_DIVERGENCE if config.distils_only else about
        print(about.format(coef=config.teacher_coef))
        name = "distillation" if config.distils_only else "GRPO"
        for step in (bar := progress_bar(name, state.step, config.steps, policy.ranks.is_first)):
            # Sample and reward groups of completions. A signal drops the step here; a resumed run
            # repeats it from the recorded state of the random generators.
            state.record()
            started = time.perf_counter()
            if ahead is None:
                rollouts = collect_rollouts(policy, task, sampler, state.order, config)
                sampling_metrics = {}
            else:
                rollouts, sampling_metrics = ahead.collect(step)
            rollout_time = time.perf_counter() - started

            # From here to the end of the step a signal has to wait.
            shutdown.defer()
            if ahead is not None and step < config.steps:
                ahead.begin(step + 1)

            # Compare each completion with the others of its group. All ranks use rank 0's result,
            # since a reward function may be random.
            advantages = policy.ranks.broadcast(
                compute_advantages(
                    rollouts, config, task.rewards, step_reward, decode, learner.reward_baseline
                )
            )

            # Compute the loss and its gradient, and update the policy.
            correct = rollouts.accuracy.get("strict")
            update_metrics = learner.step(rollouts.samples, advantages, correct)
            step_time = time.perf_counter() - started
            state.advance(rollouts.num_tokens)

            # Log the metrics of the step.
            row = {
                "step": step,
                **rollout_metrics(rollouts),
                **update_metrics,
                **sampling_metrics,
                "num_tokens": state.tokens_seen,
                "step_time": step_time,
                "rollout_time": rollout_time,
                "tokens_per_second": rollouts.num_sampled_tokens / step_time,
                "memory_gib": memory_gib(policy.device),
            }
            history.append(row)
            is_shown = (step - 1) % config.print_every == 0
            group = examples(rollouts, advantages) if is_shown else []
            log.step(row, group)
            names = ("reward", "divergence", "accuracy/lenient")
            shown = {name: row[name] for name in names if name in row}
            bar.set_postfix(shown, refresh=False)

            # Show some completions.
            if is_shown:
                first = f"{group[0]['question']!r} -> {group[0]['completion']!r}"
                earned = f"{group[0]['reward']:.1f}{task.of_reward_max}"
                tqdm.write(f"step {step}: {first}, reward {earned}", sys.stdout)

            # Save a checkpoint; stop here if a signal came during the step.
            state.save_if_due(checkpoints, step_time)
            shutdown.raise_if_requested()

            # Evaluate on held-out questions, and redraw the curves.
            evaluate_if_due()
            if step % config.dashboard_every == 0:
                draw_curves()

        save_policy(directory, policy, state.step)
        after = evaluate(policy, task, config)
        shutdown.defer("the summary")
    except BaseException as error:
        state.save_interrupted(error, checkpoints, shutdown, log)
        raise
    finally:
        if ahead is not None:
            ahead.close()

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
    print(summary_table(before, after, history, task.of_reward_max))
    print(f"{seconds:.0f} s; {describe_files(directory)}")
    shutdown.next_step = lambda: "the run is complete"
    shutdown.raise_if_requested()
    return summary


if __name__ == "__main__":
    sys.exit(main())
