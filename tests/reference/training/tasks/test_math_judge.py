"""Comparison by math-verify in a worker process: values, limits, threads and processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from reference.training.tasks import math_judge

HARD = ["9^{9^{9^{9}}}", "10^{1000000000}+x", "(10!)!!+x", "{" * 500 + "}" * 500, "(" * 400]
HARD += ["x" * 10**6, "\\begin{pmatrix}" * 50, "99999999!", "\ud800\0"]


def test_equal_expressions_are_equal():
    assert math_judge.is_equal(["1+x"], "x+1")
    assert math_judge.is_equal(["y", r"\sqrt{8}"], r"2\sqrt{2}")
    assert not math_judge.is_equal(["x-1", "x+2"], "x+1")
    assert not math_judge.is_equal([], "x+1")


@pytest.mark.parametrize("formula", HARD, ids=range(len(HARD)))
def test_hard_formulas_are_not_equal_and_do_not_stop_the_next(formula):
    assert not math_judge.is_equal([formula], "x")
    assert not math_judge.is_equal(["x"], formula)
    assert math_judge.is_equal(["1+x"], "x+1")


@pytest.mark.clock
def test_a_comparison_takes_at_most_a_second():
    math_judge.is_equal(["x"], "x")
    for formula in HARD:
        start = time.perf_counter()
        math_judge.is_equal([formula, formula + "+1"], "x")
        assert time.perf_counter() - start < 1.2


def test_threads_share_the_worker():
    results = {}

    def compare(i):
        results[i] = math_judge.is_equal([f"{i}+x"], "x+3")

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i == 3 for i in range(6)}


def test_a_killed_worker_is_replaced():
    assert math_judge.is_equal(["1+x"], "x+1")
    os.kill(math_judge._worker.pid, signal.SIGKILL)
    math_judge._worker.wait()
    assert math_judge.is_equal(["1+x"], "x+1")


def test_a_forked_process_has_a_worker_of_its_own():
    code = (
        "import os\n"
        "from reference.training.tasks.math_judge import is_equal\n"
        "assert is_equal(['1+x'], 'x+1')\n"
        "child = os.fork()\n"
        "for i in range(10):\n"
        "    assert is_equal([f'{i}+x'], 'x+3') == (i == 3)\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_worker_ends_with_its_process():
    code = (
        "import os\n"
        "from reference.training.tasks import math_judge\n"
        "math_judge.is_equal(['x'], 'x')\n"
        "print(math_judge._worker.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{int(run.stdout)}/cwd") and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.stdout), 0)
        # A zombie that nobody has waited for has ended as well.
        with open(f"/proc/{int(run.stdout)}/stat") as stat:
            assert stat.read().split()[2] == "Z"
        raise ProcessLookupError


def test_missing_math_verify_raises_os_error(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    math_judge._stop()
    with pytest.raises(OSError, match="cannot import math_verify"):
        math_judge.is_equal(["x"], "x+1")


def test_a_system_that_refuses_the_memory_limit_compares_without(monkeypatch, tmp_path):
    (tmp_path / "resource.py").write_text(
        "RLIMIT_AS, RLIMIT_CORE = 5, 4\n\n"
        "def setrlimit(*_):\n    raise ValueError('current limit exceeds maximum limit')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    math_judge._stop()
    assert math_judge.is_equal(["1+x"], "x+1")
    math_judge._stop()
