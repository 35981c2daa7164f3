"""Train a language model with GRPO, on one machine, in a file that reads straight down.

    python reference/train.py                 SmolLM2-135M learns to add: 7 minutes on two CPU cores
    python reference/train.py --preset tiny   75k parameters learn to reverse digits: under a minute
    python reference/train.py --help          every setting

Each step asks the model questions, samples a group of answers to each, rewards the right ones, and
makes the answers that beat their group's mean more likely. Left out: more than one GPU, a separate
inference engine, LoRA, resuming. The rooms beside this file, in the order in which they act: config
(settings), tasks (questions and rewards), models (where weights come from), policy (asking a
model), rollout (sampling), supervised (the warm start of --preset tiny), learner (the update),
checkpoint, plots.
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
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from reference import checkpoint, models
from reference.config import TrainConfig, parse_command_line
from reference.errors import UserError
from reference.learner import Learner
from reference.plots import plot_curves
from reference.policy import Answers, Policy, pick_device
from reference.supervised import warm_start
from reference.tasks import TASKS, Question, Task

ABOUT_THE_LOSS = """\
A note on the loss: with one optimiser step per batch its VALUE is about 0, since the ratio of new
to old policy is 1 and the advantages of a group add up to 0. Its gradient is not 0. Watch the
reward.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 after an error of the user, 130 after Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # so that `| tee` shows what happens
    try:
        run(parse_command_line(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the end: no model was saved", file=sys.stderr)
        return 130
    return 0


def run(config: TrainConfig) -> dict[str, float]:
    """Train as `config` says; returns what summary.json holds."""
    started = time.perf_counter()
    transformers_logging.disable_progress_bar()

    # What can be wrong with the settings is found here, before any model is loaded.
    losses, causal_lm = pick_losses(config.loss_impl)
    loss_config = losses.LossConfig(**config.loss_fields())
    device = pick_device(config.device)
    task = TASKS[config.task](config.seed)
    if config.prompts > len(task.train):
        raise UserError(f"--prompts {config.prompts}: the task has {len(task.train)} questions")
    directory = checkpoint.make_run_directory(config)
    try:
        policy, order = make_policy(config, task, device, causal_lm.forward)
        before = policy.accuracy(task, task.held_out)
        print(f"held-out greedy accuracy before: {before:.1%} of {len(task.held_out)} questions\n")
        learner = Learner(policy, losses, loss_config, config)
        history = train(config, task, policy, learner, order, directory)
        after = policy.accuracy(task, task.held_out)
    finally:
        checkpoint.remove_if_empty(directory)

    print(f"\nheld-out greedy accuracy: {before:.1%} before, {after:.1%} after")
    checkpoint.save_model(directory, policy.model, policy.tokenizer)
    title = f"{directory.name}: held-out accuracy {before:.0%} before, {after:.0%} after"
    plot_curves(directory / "curves.png", history, before, after, title)
    seconds = round(time.perf_counter() - started, 1)
    summary = {"accuracy_before": before, "accuracy_after": after, "seconds": seconds}
    checkpoint.save_json(directory / "summary.json", summary)
    print(f"{seconds:.0f} s; in {directory}: model/ metrics.jsonl curves.png summary.json")
    return summary


def pick_losses(name: str):
    """The losses, and how a model runs up to them; both modules have the same functions."""
    if name == "fused":
        import grpo_kernels as losses
        from grpo_kernels.integrations import causal_lm
    else:
        import reference as losses
        from reference import causal_lm
    return losses, causal_lm


def make_policy(
    config: TrainConfig, task: Task, device: torch.device, forward: Callable
) -> tuple[Policy, random.Random]:
    """The model before GRPO, and the source of the order of questions; seeds everything."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = models.locate(config.model, config.cache_dir)
    torch.manual_seed(config.seed)
    order = random.Random(config.seed)
    policy = Policy.load(source, device, config.max_new_tokens, forward)
    if source is None:
        steps = warm_start(policy, task, order)
        print(f"warm start: {steps} supervised steps")
    return policy, order


def train(
    config: TrainConfig,
    task: Task,
    policy: Policy,
    learner: Learner,
    order: random.Random,
    directory: Path,
) -> list[dict[str, float]]:
    """The loop: ask, score, learn, tell. Returns one row of metrics per step."""
    print(ABOUT_THE_LOSS)
    history = []
    tokens_seen = 0
    pace = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file needs few lines
    steps = range(1, config.steps + 1)
    bar = tqdm(steps, desc="GRPO", unit="step", dynamic_ncols=True, mininterval=pace)
    for step in bar:
        started = time.perf_counter()
        questions = order.sample(task.train, config.prompts)
        answers = policy.ask(questions, config.group_size, config.temperature)
        rewards = score(task, questions, answers.texts)
        reward = sum(rewards.values())
        learned = learner.step(answers, reward)
        seconds = time.perf_counter() - started

        sampled = int(answers.completions.mask.sum())
        tokens_seen += sampled + int(answers.prompts.mask.sum()) * config.group_size
        row = {"step": step, **describe(task, questions, answers, rewards), **learned}
        row |= {"num_tokens": tokens_seen, "step_time": seconds}
        history.append(row)
        checkpoint.append_json_line(directory / "metrics.jsonl", row)
        shown = {name: row[name] for name in ("reward", "accuracy", "entropy") if name in row}
        bar.set_postfix(shown | {"tokens/s": round(sampled / seconds)}, refresh=False)
        if (step - 1) % config.print_every == 0:
            example = f"{questions[0].text!r} -> {answers.texts[0]!r}, reward {reward[0, 0]:.1f}"
            tqdm.write(f"step {step}: {example}", file=sys.stdout)
    return history


def score(task: Task, questions: list[Question], texts: list[str]) -> dict[str, Tensor]:
    """The rewards [B, G] of each reward function, by name.

    Raises:
        UserError: a reward is NaN or infinite.
    """
    group_size = len(texts) // len(questions)
    rewards = {}
    for name, function in task.rewards.items():
        values = [function(text, questions[i // group_size].answer) for i, text in enumerate(texts)]
        rewards[name] = torch.tensor(values, dtype=torch.float32).view(-1, group_size)
        bad = (~rewards[name].isfinite()).flatten().nonzero().flatten()
        if len(bad):
            raise UserError(
                f"reward {name!r} gave {values[bad[0]]} for the answer {texts[bad[0]]!r}"
            )
    return rewards


def describe(
    task: Task, questions: list[Question], answers: Answers, rewards: dict[str, Tensor]
) -> dict[str, float]:
    """What the sampled answers were like, under the names that TRL uses."""
    reward = sum(rewards.values())
    G = reward.shape[1]
    right = [task.correct(text, questions[i // G].answer) for i, text in enumerate(answers.texts)]
    completions = answers.completions
    return {
        "reward": reward.mean().item(),
        "reward_std": reward.std(dim=-1).mean().item(),
        "frac_reward_zero_std": reward.eq(reward[:, :1]).all(-1).float().mean().item(),
        **{f"rewards/{name}/mean": values.mean().item() for name, values in rewards.items()},
        "accuracy": sum(right) / len(right),
        "completions/mean_length": completions.mask.sum(-1).float().mean().item(),
        "completions/clipped_ratio": 1.0 - completions.finished.float().mean().item(),
    }


if __name__ == "__main__":
    sys.exit(main())
