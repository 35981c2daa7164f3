"""Compare the training script, TRL's GRPOTrainer, and GRPOTrainer with our loss.

    python -m benchmarks.trainers [--steps N] [--results FILE]

All three have the same model, questions, rewards, group size, learning rate, steps and seed. They
run in fp32 on a CPU, one after the other; each has a process of its own, whose peak resident memory
is reported. Both runs of GRPOTrainer draw the same random numbers; the script draws other ones.
Accuracy is greedy, on held-out questions, before the first and after the last step.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.core.results import Record, ResultFile

OURS, IN_TRL, TRL = "grpo_kernels", "grpo_kernels in TRL", "TRL"
TRAINERS = (OURS, IN_TRL, TRL)


def run_ours(steps: int, directory: Path) -> dict:
    from reference import train
    from reference.training.run.graceful_shutdown import GracefulShutdown

    config = replace(preset(steps), output_dir=directory / "run", tensorboard=False)
    summary = train.run(config, GracefulShutdown())
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").open()]
    trained = [row for row in rows if "step_time" in row]
    return {
        "before": summary["before"],
        "after": summary["after"],
        "step_times": [row["step_time"] for row in trained],
        "rewards": [row["reward"] for row in trained],
    }


def run_trl(steps: int, directory: Path, *, fused: bool) -> dict:
    """Run GRPOTrainer; fused: with our log-probs, entropies and loss."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo_kernels.integrations.trl import fuse_trainer
    from reference.training.evaluate import accuracy
    from reference.training.model.policy import load_policy
    from reference.training.rollout.samplers import SharedPrompt
    from reference.training.tasks.tasks import load_task

    config = preset(steps)
    task = load_task(config)
    policy = load_policy(config, torch.device("cpu"), SharedPrompt(), task.system)
    order = random.Random(config.seed)
    before = accuracy(policy, task, task.held_out)
    data = [
        {"prompt": [{"role": "user", "content": question.text}], "answer": question.answer}
        for _ in range(steps)
        for question in order.sample(task.train, config.prompts)
    ]
    arguments = GRPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=config.prompts * config.group_size,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        temperature=config.temperature,
        top_k=0,
        beta=config.beta,
        loss_type="grpo",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        seed=config.seed,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    times: list[float] = []
    rewards: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if logs and "step_time" in logs:
                times.append(logs["step_time"])
                rewards.append(logs["reward"])
                print(f"step {state.global_step}: {times[-1]:.1f} s", flush=True)

    trainer = GRPOTrainer(
        policy.model,
        [trl_reward(name, reward) for name, reward in task.rewards.items()],
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=policy.tokenizer,
        callbacks=[Clock()],
    )
    if fused:
        fuse_trainer(trainer, fuse_loss=True)
    trainer.train()
    policy.model.eval()
    after = accuracy(policy, task, task.held_out)
    return {"before": before, "after": after, "step_times": times, "rewards": rewards}


def preset(steps: int):
    from reference.training.command_line import PRESETS

    return replace(PRESETS["smollm2-135m"], steps=steps)


def trl_reward(name: str, reward):
    """Return a reward of ours with the signature that TRL calls."""

    def function(prompts, completions, answer, **_):
        texts = [prompt[-1]["content"] for prompt in prompts]
        values = reward.function(
            texts, [completion[0]["content"] for completion in completions], answer
        )
        return [reward.weight * value for value in values]

    function.__name__ = name
    return function


def child(trainer: str, steps: int, out: Path) -> None:
    """Run one trainer in this process and write its measurements as JSON."""
    import resource

    with tempfile.TemporaryDirectory() as directory:
        if trainer == OURS:
            measured = run_ours(steps, Path(directory))
        else:
            measured = run_trl(steps, Path(directory), fused=trainer == IN_TRL)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.write_text(json.dumps({**measured, "peak_bytes": peak}))


def record_of(trainer: str, measured: dict) -> Record:
    """Return the times of a step; extra_bytes is the peak of the process, reason the accuracy."""
    lower, median, upper = statistics.quantiles(measured["step_times"], n=4)
    config, steps = preset(1), len(measured["step_times"])
    tokens = config.prompts * config.group_size * config.max_new_tokens
    return Record(
        *("grpo_training", "both", "SmolLM2 135M", tokens, "fp32", 0.0, 0.0, trainer),
        seconds=median,
        lower_quartile=lower,
        upper_quartile=upper,
        rounds=steps,
        extra_bytes=measured["peak_bytes"],
        reason=f"{measured['before']['lenient']:.1%} → {measured['after']['lenient']:.1%} "
        f"after {steps} steps, mean reward {statistics.mean(measured['rewards']):.3f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path, help="also write the records to this file")
    parser.add_argument("--child", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.steps, arguments.out)
        return
    results = ResultFile(arguments.results, torch.device("cpu"), roofs={})
    print(f"{'':22}{'s a step':>10}{'peak GiB':>10}  held-out accuracy")
    for trainer in TRAINERS:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "benchmarks.trainers", "--child", trainer]
            command += ["--steps", str(arguments.steps), "--out", file.name]
            subprocess.run(command, check=True, stdout=sys.stderr)
            measured = json.load(file)
        record = record_of(trainer, measured)
        results.add(record)
        peak = record.extra_bytes / 2**30
        print(f"{trainer:22}{record.seconds:10.2f}{peak:10.2f}  {record.reason}")
        print(" rewards:", *(f"{reward:.3f}" for reward in measured["rewards"]), flush=True)


if __name__ == "__main__":
    main()
