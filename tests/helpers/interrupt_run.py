"""Interrupt the training script with Ctrl-C and SIGTERM at random moments, and resume it.

    python -m tests.helpers.interrupt_run DIRECTORY COUNT SEED

For `--preset tiny` and for a run on a JSONL file it makes an uninterrupted run, COUNT runs that get
Ctrl-C and COUNT that get SIGTERM, half of them twice. Half of the signals come at any moment, the
others in the training loop. Each run goes on with the command that it printed and has to leave the
files of the uninterrupted run. A line is printed for each run.

Each run is a forked child, since importing takes longer than training.
"""

import json
import math
import os
import random
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from reference import train
from reference.training import warm_start
from reference.training.model.load import from_scratch
from reference.training.run import training_state
from reference.training.run.graceful_shutdown import NOTHING_TRAINED, exit_on_signals
from tests.helpers.training_runs import left_by, write_parity_reward

TINY = ["--preset", "tiny", "--minibatches", "2", "--beta", "0.05", "--entropy-target", "1"]
JSONL = ["--task", "jsonl", "--prompts", "4", "--max-new-tokens", "6", "--learning-rate", "1e-3"]
COMMON = ["--steps", "8", "--loss-impl", "reference", "--eval-questions", "16", "--threads", "1"]
COMMON += ["--eval-every", "3", "--print-every", "2", "--dashboard-every", "5"]
STARTS = ("", "A note on the loss")  # of the process, and of the training loop
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0}
GO_ON = r"(to go on after step \d+|no step is saved; to start it again): (python .*)"


def main(directory: Path, count: int, seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, flags in (("tiny", TINY), ("jsonl", [*JSONL, *write_inputs(directory)])):
        rng = random.Random(f"{name} {seed}")
        command = [*flags, "--reward", write_parity_reward(directory), *COMMON, "--output-dir"]
        whole, all_moments = directory / f"{name}-whole", []
        code, said, times = run([*command, str(whole)])
        assert code == 0, said
        for number in range(2 * count):
            signals = [(signal.SIGINT, signal.SIGTERM)[number % 2]] * rng.randint(1, 2)
            stopped = directory / f"{name}-{number}"
            moments = interrupt([*command, str(stopped)], signals, rng, times)
            assert left_by(stopped) == left_by(whole), stopped
            print(name, number, signals[0].name, ", ".join(moments), flush=True)
            all_moments += moments
        saved = sum("go on after" in moment for moment in all_moments)
        print(
            f"{name}: {2 * count} runs equal the uninterrupted one of {times['']:.0f} s; "
            f"{saved} of {len(all_moments)} signals left a checkpoint",
            flush=True,
        )


def write_inputs(directory: Path) -> list[str]:
    """Write a model and questions, and return their flags."""
    torch.manual_seed(0)
    model, tokenizer = from_scratch()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = template
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    assert AutoTokenizer.from_pretrained(directory / "model").chat_template == template
    rows = [{"prompt": f"{17 * n}=", "answer": str(n % 10)} for n in range(100)]
    (directory / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"--model": "model", "--data": "mine.jsonl"}
    return [word for flag, name in flags.items() for word in (flag, str(directory / name))]


def interrupt(
    command: list[str], signals: list[signal.Signals], rng: random.Random, times: dict[str, float]
) -> list[str]:
    """Run a command until it ends, and interrupt it with each signal at a moment of `times`.

    After a signal it goes on as it said. Return what the interrupted runs said about that.
    """
    moments = []
    for number in [*signals, None]:
        after = rng.choice(list(times))
        code, said, _ = run(command, number, after, rng.uniform(0, times[after]))
        assert "Traceback" not in said and "Exception ignored" not in said, said
        if "stopped by" not in said or "the run is complete" in said:
            assert code == (EXIT_CODES[number] if number and "stopped by" in said else 0), said
            return [*moments, "the end"] if number else moments
        assert number is not None and code == EXIT_CODES[number], (code, said)
        go_on = re.search(GO_ON, said)
        if go_on is None:
            assert NOTHING_TRAINED in said or said.strip().startswith("stopped by"), said
        else:
            command = shlex.split(go_on[2])[2:]  # the flags
        moments.append("start again" if go_on is None else go_on[1])
    raise AssertionError(moments)


def run(
    arguments: list[str],
    number: signal.Signals | None = None,
    after: str = "",
    seconds: float = 0.0,
) -> tuple[int, str, dict[str, float]]:
    """Run the script in a child, which gets the signal so many seconds after it has printed a text.

    Return its exit code, what it printed and how long it ran after having printed each of STARTS.
    """
    read, write = os.pipe()
    starts = {"": time.monotonic()}
    child = os.fork()
    if child == 0:
        exit_on_signals()
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        warm_start.TARGET = 0.0  # four steps: the reward is for what a random model writes
        training_state.MAX_LOSS = 0.5  # seconds: several checkpoints in a run
        os._exit(train.main(arguments))
    os.close(write)
    said = b""
    os.set_blocking(read, False)
    while True:
        for text in STARTS:
            if text.encode() in said:
                starts.setdefault(text, time.monotonic())
        if number is not None and time.monotonic() >= starts.get(after, math.inf) + seconds:
            os.kill(child, number)
            number = None
        try:
            data = os.read(read, 1 << 16)
        except BlockingIOError:
            time.sleep(0.005)
            continue
        if not data:
            break
        said += data
    os.close(read)
    status = os.waitpid(child, 0)[1]
    times = {text: time.monotonic() - start for text, start in starts.items()}
    return os.waitstatus_to_exitcode(status), said.decode(), times


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
