"""Compare mathematics with math-verify, in bounded time and memory, from any thread.

math-verify bounds its time by a signal handler, which works in the main thread only and cannot stop
one long multiplication. Here a worker process imports it once and forks for each comparison; the
kernel kills a fork that uses too much time or memory. This file is also the program of the worker,
so it imports nothing of this package.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading

SECONDS = 0.9  # a usual answer takes 0.02
MEMORY = 2 << 30  # bytes of address space; the worker alone has about 0.3 GB
LONGEST = 1000  # characters: parsing takes about a millisecond for each

_lock = threading.Lock()
_worker: subprocess.Popen[str] | None = None


def is_equal(candidates: list[str], answer: str) -> bool:
    """Test if a candidate equals the answer; all are LaTeX without delimiters.

    Raises:
        OSError: the worker cannot be started.
    """
    candidates = [text for text in candidates if len(text) <= LONGEST]
    if not candidates or len(answer) > LONGEST:
        return False
    request = json.dumps({"candidates": candidates, "answer": answer}) + "\n"
    with _lock:
        for _ in range(2):  # a worker that was killed since the last answer is replaced
            try:
                worker = _started()
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write(request)
                worker.stdin.flush()
                if reply := worker.stdout.readline():
                    return reply == "equal\n"
            except BrokenPipeError:
                pass
            _stop()
    return False


def _started() -> subprocess.Popen[str]:
    global _worker
    if _worker is None:
        # Its own session: Ctrl-C in the terminal reaches the training process alone.
        _worker = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,
        )
        assert _worker.stdout is not None
        if _worker.stdout.readline() != "ready\n":
            _stop()
            raise OSError(f"{sys.executable} cannot import math_verify, or cannot fork")
    return _worker


def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
        _worker = None


def _forget() -> None:
    """Leave the worker to the parent process: its pipes serve one conversation."""
    global _lock, _worker
    _lock, _worker = threading.Lock(), None


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _serve() -> None:
    """Answer requests, one a line, until the pipe is closed."""
    import resource
    import signal

    import math_verify

    logging.disable()  # it warns that its own time limit is off
    reads = [math_verify.LatexExtractionConfig(boxed_match_priority=-1)]

    def parse(text: str) -> list:
        return math_verify.parse(f"${text}$", reads, parsing_timeout=None)  # pyright: ignore

    def verify(answer: str, candidates: list[str]) -> bool:
        gold = parse(answer)
        for candidate in candidates:
            with contextlib.suppress(Exception):
                if math_verify.verify(gold, parse(candidate), timeout_seconds=None):
                    return True
        return False

    # Fill the caches of parser and simplification before the first fork.
    verify("(x+1)^2", [r"x^{2} + 2x + 1", r"\frac{\sqrt{3}}{2}", r"\sin(\pi) > [1, 2)"])
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            is_right = False
            try:
                with contextlib.suppress(ValueError, OSError):  # macOS may refuse
                    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                # The default action of SIGALRM ends the process, whatever it computes.
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                is_right = verify(**json.loads(line))
            finally:
                os._exit(0 if is_right else 1)
        _, status = os.waitpid(child, 0)
        print("equal" if status == 0 else "different", flush=True)


if __name__ == "__main__":
    _serve()
