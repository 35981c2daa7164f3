"""Run the training script, kill it with SIGKILL at random moments, and resume it until it ends.

    python -m tests.helpers.kill_run DIRECTORY KILLS SEED

It writes DIRECTORY/whole, the uninterrupted run, and DIRECTORY/killed-<n>, and prints a line for
each kill. Each run is a forked child, since importing takes longer than training.
"""

import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from reference import train
from reference.training import warm_start
from reference.training.rollout import generate
from reference.training.run import checkpoint, run_log
from tests.helpers.training_runs import write_parity_reward

FLAGS = ["--preset", "tiny", "--loss-impl", "reference", "--eval-questions", "16", "--prompts", "8"]
FLAGS += ["--steps", "7", "--checkpoint-every", "2", "--eval-every", "3", "--print-every", "2"]
FLAGS += ["--no-tensorboard", "--minibatches", "2", "--inner-iterations", "2"]
FLAGS += ["--beta", "0.05", "--reference-refresh", "3", "--entropy-target", "1"]
FLAGS += ["--dynamic-sampling", "1", "--learning-rate", "1e-3"]

# A run is killed before the n-th call of a function of one phase.
PHASES = {
    "generation": [(generate, "_choose")],
    "backward": [(torch.Tensor, "backward")],
    "optimiser": [(torch.optim.AdamW, "step")],
    "save": [
        (checkpoint, "save_file"),
        (checkpoint, "_digest"),
        (checkpoint, "_flush"),
        (checkpoint, "_remove"),
        (Path, "rename"),
    ],
    "log": [(run_log, "_append")],
}


def main(directory: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    reward = ["--reward", write_parity_reward(directory)]
    counts = run(["--output-dir", str(directory / "whole"), *FLAGS, *reward], None)
    for number in range(kills):
        # Each phase in turn, at a random call.
        phase = list(PHASES)[number % len(PHASES)]
        killed = directory / f"killed-{number}"
        call = rng.randint(1, counts[phase])
        run(["--output-dir", str(killed), *FLAGS, *reward], (phase, call))
        found = sorted(path.name for path in (killed / "checkpoints").glob("*"))
        print(f"{phase} {call}/{counts[phase]} {','.join(found)}", flush=True)
        run(["--resume", str(killed), *reward], None)


def run(arguments: list[str], kill: tuple[str, int] | None) -> Counter:
    """Run the script in a child; return the number of calls of each phase, 0 if it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        counts = count_calls(kill)
        warm_start.TARGET = 0.0  # four steps: the reward is for what a random model writes
        train.plot_dashboard = lambda *_: None
        sys.stdout = sys.stderr = open(os.devnull, "w")
        status = train.main(arguments)
        os.write(write, " ".join(f"{name}={n}" for name, n in counts.items()).encode())
        os._exit(status)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(read) as pipe:
        counts = Counter({n: int(c) for n, c in (x.split("=") for x in pipe.read().split())})
    if kill is None:
        assert status == 0, (arguments, status)
    else:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kill, status)
    return counts


def count_calls(kill: tuple[str, int] | None) -> Counter:
    """Count the calls of each phase, and kill the process at one of them."""
    counts = Counter()

    def watch(owner, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments, **more):
            counts[phase] += 1
            if kill == (phase, counts[phase]):
                if phase == "log":  # in the middle of a line
                    path, text = arguments
                    original(path, text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        setattr(owner, name, counted)

    for phase, functions in PHASES.items():
        for owner, name in functions:
            watch(owner, name, phase)
    return counts


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
