"""Train a language model with GRPO, in a file that reads straight down.

    python reference/train.py                             SmolLM2-135M learns to add, on a laptop
    python reference/train.py --preset tiny               75k parameters learn to reverse digits
    python reference/train.py --preset llama-3.2-1b       Llama 3.2 1B Instruct on GSM8K, on a GPU
    python reference/train.py --task capital-of-brazil --prompts 1 --max-new-tokens 64
    python reference/train.py --resume runs/...           goes on with a run that was stopped
    torchrun --nproc-per-node=8 reference/train.py ...    the same run on eight GPUs
    python reference/train.py --help                      every setting

Each step asks the model questions, samples a group of answers to each, rewards the right ones, and
makes the answers that beat their group's mean more likely.
The rooms beside this file, in the order in which they act: presets, config, settings and losses
(the command line), tasks and rewards, models and adapters (where weights come from), policy (asking
a model), samplers, rollout and server (how it answers), supervised (the warm start of --preset
tiny), evaluate, experience (groups of rewarded answers), credit (advantages), learner, parts and
guards (the update), ranks (several processes), run_directory, runlog and plots (what a run leaves),
training_state, checkpoint, resume and stopping (how it ends before its end and goes on).
"""

from __future__ import annotations

import os

# Waiting threads sleep: on a machine with other work, spinning made single steps 20 times slower.
# PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import NoneType

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import grpo_kernels
from grpo_kernels.integrations.transformers import forward_to_hidden
from reference.training.collect import describe, gather, samples
from reference.training.command_line import parse_command_line
from reference.training.config import TrainConfig
from reference.training.credit import StepReward, advantages_of
from reference.training.distributed import (
    ALONE,
    Ranks,
    finish,
    full_state,
    is_lost,
    is_sharded,
    start,
)
from reference.training.errors import UserError
from reference.training.evaluate import accuracy, chat, pass_at
from reference.training.model import plain_scorer as causal_lm
from reference.training.model.policy import Policy, pick_device
from reference.training.rollout.samplers import Sampler, is_server, pick_sampler
from reference.training.run import run_directory
from reference.training.run.checkpoint import Checkpoints
from reference.training.run.graceful_shutdown import GracefulShutdown, Stopped
from reference.training.run.plots import load_matplotlib, plot_dashboard
from reference.training.run.resume import (
    find_checkpoint,
    record_torchrun_run,
    resume_after_torchrun_restart,
    resume_command,
)
from reference.training.run.run_log import RunLog, load_wandb, read_metrics, summary_table
from reference.training.run.training_state import TrainingState
from reference.training.tasks.rewards import choose_rewards, load_function
from reference.training.tasks.tasks import Task, make_task
from reference.training.update.learner import Learner
from reference.training.warm_start import warm_start

ABOUT_THE_LOSS = """\
A note on the loss: its VALUE says nothing about progress. With one optimiser step per batch the
ratio of new to old policy is 1 and the advantages of a group add up to 0, so that a loss of clipped
ratios is about 0, or what answers of unequal length leave of it. Its gradient is not. Watch the
reward.
"""
CHAT_TOKENS = 256
TRACKERS = ("tensorboard", "wandb")
# --loss-impl: how a model runs up to its losses.
LOSS_IMPLS = {"fused": forward_to_hidden, "reference": causal_lm.forward}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, also after SIGTERM, 2 after an error of the user,
    and 130 after Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # so that `| tee` shows what happens
    try:
        run(parse_command_line(arguments))
        finish()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the end", file=sys.stderr)
        return 130
    except Stopped:
        print("\nstopped by SIGTERM", file=sys.stderr)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        print("stopped because another rank has", file=sys.stderr)
        return 1
    return 0


def run(config: TrainConfig) -> dict[str, float]:
    """Train, evaluate or chat as `config` says; returns what summary.json holds."""
    transformers_logging.disable_progress_bar()

    # What can be wrong with the settings is found here, before any model is loaded.
    forward = LOSS_IMPLS[config.loss_impl]
    config.check_loss(grpo_kernels.LossConfig)
    loss_config = grpo_kernels.LossConfig(**config.loss_fields())
    sampler = pick_sampler(config.sampler)
    ranks, device = start(pick_device(config.device))
    ranks.check(config.prompts, config.sampler)
    if config.chat:
        policy, _ = make_policy(config, device, forward, sampler, config.system)
        chat(policy, config.temperature, CHAT_TOKENS, input)
        return {}
    task = task_of(config)
    step_reward = None if config.step_reward is None else load_function(config.step_reward)
    if config.wandb:
        load_wandb()
    if config.eval_only:
        policy, _ = make_policy(config, device, forward, sampler, task.system, ranks)
        with ranks.quiet():
            return evaluate(policy, task, config)

    load_matplotlib()
    config = resume_after_torchrun_restart(config, ranks)
    with (
        ranks.quiet(),
        run_directory.lock_run_dir(config, ranks) as directory,
        GracefulShutdown(ranks) as shutdown,
    ):
        checkpoints = Checkpoints(ranks.told(directory), config.keep_checkpoints)
        found = find_checkpoint(config, checkpoints)
        policy, order = make_policy(config, device, forward, sampler, task.system, ranks)
        if config.model == "scratch" and found is None:
            alone = replace(policy, ranks=ALONE)  # all ranks alike
            print(f"warm start: {warm_start(alone, task, order)} supervised steps")
        learner = Learner(policy, loss_config, config)
        state = TrainingState(learner, order, config.as_json())
        if found is not None:
            state.load(found)
        if config.resume is not None:
            print(f"{directory} goes on after step {state.step}")
            if ranks.is_first:
                checkpoints.truncate_logs(found)
        if config.overwrite:
            run_directory.clear(directory, config.as_json())
        record_torchrun_run(directory)
        outside = {name: getattr(config, name) and ranks.is_first for name in TRACKERS}
        after = None if config.resume is None else state.step
        log = RunLog(directory, config.as_json(), **outside, after=after)
        try:
            with closing(log):
                return train(task, sampler, step_reward, state, checkpoints, shutdown, log)
        except (Stopped, KeyboardInterrupt, UserError):
            if state.saved_step and ranks.is_first:
                line = resume_command(config, directory)
                print(f"\nto go on after step {state.saved_step}: {line}", file=sys.stderr)
            raise


def task_of(config: TrainConfig) -> Task:
    """The task, with the rewards that the command line adds and the weights that it sets."""
    options = {"data": config.data, "question": config.question, "answer": config.answer}
    task = make_task(config.task, config.seed, settings=config.task_settings(), **options)
    rewards = choose_rewards(task.rewards, config.reward, config.reward_weight)
    system = task.system if config.system is None else config.system
    return replace(task, rewards=rewards, system=system)


def make_policy(
    config: TrainConfig,
    device: torch.device,
    forward: Callable,
    sampler: Sampler,
    system: str | None,
    ranks: Ranks = ALONE,
) -> tuple[Policy, random.Random]:
    """The model before GRPO, and the source of the order of questions; seeds everything."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    own = {} if is_server(config.sampler) else {"sampler": sampler}  # a server's weights are older
    policy = Policy.load(
        config.model,
        device,
        config.max_new_tokens,
        forward,
        cache_dir=config.cache_dir,
        random_weights=config.random_weights,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        gradient_checkpointing=config.gradient_checkpointing,
        autocast=config.autocast,
        system=system,
        **own,
    )
    policy = replace(policy, ranks=ranks)
    return policy, random.Random(config.seed)


def evaluate(policy: Policy, task: Task, config: TrainConfig) -> dict[str, float]:
    """Accuracy on the held-out questions, greedy, and pass@k where it is asked for."""
    questions = task.held_out[: config.eval_questions]
    device = policy.device
    devices = [] if device.type == "cpu" else [device]
    # Asking more often leaves the training as it is.
    with torch.random.fork_rng(devices, device_type=device.type):
        found = accuracy(policy, task, questions)
        if config.pass_at is not None:
            found |= pass_at(policy, task, questions, config.pass_at, config.temperature)
    shown = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
    print(f"{len(questions)} held-out questions: {shown}")
    return found | {"questions": len(questions)}


def train(
    task: Task,
    sampler: Sampler,
    step_reward: StepReward | None,
    state: TrainingState,
    checkpoints: Checkpoints,
    shutdown: GracefulShutdown,
    log: RunLog,
) -> dict[str, float]:
    """The run: ask, score, learn, tell, and save; also where it is stopped before its end."""
    learner, order, directory = state.learner, state.order, log.directory
    config, policy = learner.config, learner.policy
    goes_on = state.step > 0 and policy.ranks.is_first
    history, evaluations = policy.ranks.told(read_metrics(directory) if goes_on else ([], []))
    if state.step == 0:
        evaluations.append({"step": 0, **evaluate(policy, task, config)})
        log.evaluation(0, evaluations[0])
    title = f"{Path(config.model).name} on {config.task}"
    draw = partial(plot_dashboard, directory / "curves.png", history, evaluations, title)
    draw()
    print(ABOUT_THE_LOSS)
    decode = partial(policy.tokenizer.decode, skip_special_tokens=True)

    kept = partial(saved_when_stopped, state, checkpoints, shutdown)
    try:
        with kept():  # before the model is
            for step in (bar := progress_bar(state.step, config.steps, policy.ranks)):
                state.record_rng()
                began = time.perf_counter()
                found = gather(policy, task, sampler, order, config)
                gathered = time.perf_counter()
                shutdown.defer()
                advantages = policy.ranks.told(
                    advantages_of(found, config, task.rewards, step_reward, decode)
                )
                learned = learner.step(found.answers, advantages)
                ended = time.perf_counter()

                state.advance(found.seen)
                row = {"step": step, **describe(found), **learned, "num_tokens": state.tokens_seen}
                row |= {"step_time": ended - began, "rollout_time": gathered - began}
                row |= {"tokens_per_second": found.sampled / (ended - began)}
                row |= {"memory_gib": memory_gib(policy.device)}
                history.append(row)
                log.step(row)
                shown = {name: row[name] for name in ("reward", "accuracy/lenient")}
                bar.set_postfix(shown, refresh=False)
                if (step - 1) % config.print_every == 0:
                    examples = samples(found, advantages)
                    log.completions(step, examples)
                    tqdm.write(f"step {step}: {spoken(examples[0])}", file=sys.stdout)
                if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                    evaluations.append({"step": step, **evaluate(policy, task, config)})
                    log.evaluation(step, evaluations[-1])
                if step % config.dashboard_every == 0:
                    draw()
                every = config.checkpoint_every
                if every and (step % every == 0 or step == config.steps):
                    state.try_save(checkpoints)
                shutdown.raise_if_requested()
    finally:
        if history and together(policy.ranks):
            with kept():
                save_model(policy, directory, len(history))

    with kept():
        after = evaluate(policy, task, config)
        shutdown.defer()  # what is left takes no longer than a step
    evaluations.append({"step": config.steps, **after})
    log.evaluation(config.steps, after)
    draw()
    seconds = round(state.elapsed, 1)
    before = {name: value for name, value in evaluations[0].items() if name != "step"}
    summary = {"before": before, "after": after, "seconds": seconds}
    run_directory.save_json(directory / "summary.json", summary)
    if policy.ranks.is_first:
        checkpoints.prune(state.step, keep=1)
    print(summary_table(before, after, history))
    written = ", ".join(sorted(path.name for path in directory.iterdir()))
    print(f"{seconds:.0f} s; in {directory}: {written}")
    shutdown.raise_if_requested()
    return summary


@contextmanager
def saved_when_stopped(
    state: TrainingState, checkpoints: Checkpoints, shutdown: GracefulShutdown
) -> Iterator[None]:
    """Where this is stopped between two steps, the last one is saved unless it has been."""
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        if not shutdown.is_deferred and state.step > state.saved_step:
            state.save(checkpoints)
        raise


def together(ranks: Ranks) -> bool:
    """Whether all ranks are at this place: after the last step, or where all have been stopped."""
    return ranks.size == 1 or isinstance(sys.exception(), Stopped | NoneType)


def save_model(policy: Policy, directory: Path, steps: int) -> None:
    weights = full_state(policy.model) if is_sharded(policy.model) else None
    if policy.ranks.is_first:
        saved = run_directory.save_model(
            directory, policy.model_to_save(), policy.tokenizer, weights
        )
        print(f"\nthe model after {steps} steps: {saved}")


def progress_bar(done: int, steps: int, ranks: Ranks) -> tqdm:
    pace = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file needs few lines
    left = range(done + 1, steps + 1)
    settings = {"unit": "step", "dynamic_ncols": True, "mininterval": pace}
    settings["disable"] = not ranks.is_first
    return tqdm(left, "GRPO", initial=done, total=steps, **settings)


def spoken(sample: dict) -> str:
    return f"{sample['question']!r} -> {sample['completion']!r}, reward {sample['reward']:.1f}"


def memory_gib(device: torch.device) -> float:
    """The peak of the device, or on a CPU what this process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


if __name__ == "__main__":
    sys.exit(main())
