"""Train a language model with GRPO, on one machine, in a file that reads straight down.

    python reference/train.py                             SmolLM2-135M learns to add, on a laptop
    python reference/train.py --preset tiny               75k parameters learn to reverse digits
    python reference/train.py --preset llama-3.2-1b       Llama 3.2 1B Instruct on GSM8K, on a GPU
    python reference/train.py --task capital-of-brazil --prompts 1 --max-new-tokens 64
    python reference/train.py --help                      every setting

Each step asks the model questions, samples a group of answers to each, rewards the right ones, and
makes the answers that beat their group's mean more likely. Left out: more than one GPU, resuming.
The rooms beside this file, in the order in which they act: presets, config, settings and losses
(the command line), tasks and rewards, models and adapters (where weights come from), policy (asking
a model), samplers, rollout and server (how it answers), supervised (the warm start of --preset
tiny), evaluate, experience (groups of rewarded answers), credit (advantages), learner (the update),
checkpoint, runlog, plots.
"""

from __future__ import annotations

import os

# Waiting threads sleep: on a machine with other work, spinning made single steps 20 times slower.
# PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import grpo_kernels
import reference
from grpo_kernels.integrations import causal_lm as fused_causal_lm
from reference import causal_lm, checkpoint
from reference.config import TrainConfig
from reference.credit import StepReward, advantages_of
from reference.errors import UserError
from reference.evaluate import accuracy, chat, pass_at
from reference.experience import describe, gather, samples
from reference.learner import Learner
from reference.plots import plot_dashboard
from reference.policy import Policy, pick_device
from reference.presets import parse_command_line
from reference.rewards import chosen
from reference.rewards import load as load_function
from reference.runlog import RunLog, load_wandb, summary_table
from reference.samplers import Sampler, is_server, pick_sampler
from reference.supervised import warm_start
from reference.tasks import Task, make_task

ABOUT_THE_LOSS = """\
A note on the loss: its VALUE says nothing about progress. With one optimiser step per batch the
ratio of new to old policy is 1 and the advantages of a group add up to 0, so that a loss of clipped
ratios is about 0, or what answers of unequal length leave of it. Its gradient is not. Watch the
reward.
"""
CHAT_TOKENS = 256
# --loss-impl: the losses, and how a model runs up to them. Each pair has the same functions.
LOSS_IMPLS = {"fused": (grpo_kernels, fused_causal_lm), "reference": (reference, causal_lm)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 after an error of the user, 130 after Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # so that `| tee` shows what happens
    try:
        run(parse_command_line(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the end", file=sys.stderr)
        return 130
    return 0


def run(config: TrainConfig) -> dict[str, float]:
    """Train, evaluate or chat as `config` says; returns what summary.json holds."""
    transformers_logging.disable_progress_bar()

    # What can be wrong with the settings is found here, before any model is loaded.
    losses, causal_lm = LOSS_IMPLS[config.loss_impl]
    config.check_loss(grpo_kernels.LossConfig)  # whose twin takes anything
    loss_config = losses.LossConfig(**config.loss_fields())
    device = pick_device(config.device)
    sampler = pick_sampler(config.sampler)
    if config.chat:
        policy, _ = make_policy(config, device, causal_lm.forward, sampler, config.system)
        chat(policy, config.temperature, CHAT_TOKENS, input)
        return {}
    task = task_of(config)
    step_reward = None if config.step_reward is None else load_function(config.step_reward)
    if config.wandb:
        load_wandb()
    if config.eval_only:
        policy, _ = make_policy(config, device, causal_lm.forward, sampler, task.system)
        return evaluate(policy, task, config)

    directory = checkpoint.make_run_directory(config)
    try:
        policy, order = make_policy(config, device, causal_lm.forward, sampler, task.system)
        if config.model == "scratch":
            print(f"warm start: {warm_start(policy, task, order)} supervised steps")
        learner = Learner(policy, losses, loss_config, config)
        log = RunLog(directory, asdict(config), tensorboard=config.tensorboard, wandb=config.wandb)
        with closing(log):
            return train(task, sampler, step_reward, learner, order, log)
    finally:
        checkpoint.remove_if_empty(directory)


def task_of(config: TrainConfig) -> Task:
    """The task, with the rewards that the command line adds and the weights that it sets."""
    options = {"data": config.data, "question": config.question, "answer": config.answer}
    task = make_task(config.task, config.seed, settings=config.task_settings(), **options)
    rewards = chosen(task.rewards, config.reward, config.reward_weight)
    system = task.system if config.system is None else config.system
    return replace(task, rewards=rewards, system=system)


def make_policy(
    config: TrainConfig,
    device: torch.device,
    forward: Callable,
    sampler: Sampler,
    system: str | None,
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
    return policy, random.Random(config.seed)


def evaluate(policy: Policy, task: Task, config: TrainConfig) -> dict[str, float]:
    """Accuracy on the held-out questions, greedy, and pass@k where it is asked for."""
    questions = task.held_out[: config.eval_questions]
    with torch.random.fork_rng():  # asking more often leaves the training as it is
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
    learner: Learner,
    order: random.Random,
    log: RunLog,
) -> dict[str, float]:
    """The run: ask, score, learn, tell, and save; also where it is stopped before its end."""
    config, policy, directory = learner.config, learner.policy, log.directory
    started = time.perf_counter()
    before = evaluate(policy, task, config)
    evaluations, history, tokens_seen = [{"step": 0, **before}], [], 0
    log.evaluation(0, before)
    title = f"{Path(config.model).name} on {config.task}"
    draw = partial(plot_dashboard, directory / "curves.png", history, evaluations, title)
    draw()  # now, so that what is missing for it is not missed after the last step
    print(ABOUT_THE_LOSS)
    decode = partial(policy.tokenizer.decode, skip_special_tokens=True)

    try:
        for step in (bar := progress_bar(config.steps)):
            began = time.perf_counter()
            found = gather(policy, task, sampler, order, config)
            gathered = time.perf_counter()
            advantages = advantages_of(
                found, config, learner.losses, task.rewards, step_reward, decode
            )
            learned = learner.step(found.answers, advantages)
            ended = time.perf_counter()

            tokens_seen += found.seen
            row = {"step": step, **describe(found), **learned, "num_tokens": tokens_seen}
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
    finally:
        if history:
            saved = checkpoint.save_model(directory, policy.to_save(), policy.tokenizer)
            print(f"\nthe model after {len(history)} steps: {saved}")

    after = evaluate(policy, task, config)
    evaluations.append({"step": config.steps, **after})
    log.evaluation(config.steps, after)
    draw()
    seconds = round(time.perf_counter() - started, 1)
    summary = {"before": before, "after": after, "seconds": seconds}
    checkpoint.save_json(directory / "summary.json", summary)
    print(summary_table(before, after, history))
    written = ", ".join(sorted(path.name for path in directory.iterdir()))
    print(f"{seconds:.0f} s; in {directory}: {written}")
    return summary


def progress_bar(steps: int) -> tqdm:
    pace = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file needs few lines
    return tqdm(range(1, steps + 1), "GRPO", unit="step", dynamic_ncols=True, mininterval=pace)


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
