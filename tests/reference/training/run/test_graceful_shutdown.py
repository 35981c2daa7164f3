"""Ctrl-C and SIGTERM end a run where nothing is lost, and a second Ctrl-C ends it at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reference import train
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.run.graceful_shutdown import GracefulShutdown, Stopped

ROOT = Path(__file__).parents[4]
SIGNALS = [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 0, "SIGTERM")]


def start(script, **environment):
    """Start a script that prints a line when it may be interrupted, and wait for this line."""
    process = subprocess.Popen(
        [sys.executable, *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.parametrize(("number", "code", "name"), SIGNALS)
def test_signal_raises_at_once_or_after_the_step(number, code, name, capsys):
    with GracefulShutdown() as shutdown:
        shutdown.share(SINGLE_PROCESS)
        shutdown.defer()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=name) as stopped:
            shutdown.raise_if_requested()
    assert stopped.value.exit_code == code
    assert "\nstopping after this step" in capsys.readouterr().err
    with GracefulShutdown(), pytest.raises(Stopped):
        os.kill(os.getpid(), number)
        time.sleep(10)


def test_second_sigterm_is_ignored():
    with GracefulShutdown():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def test_signal_that_a_destructor_drops_is_raised_by_defer(capsys):
    class Deleted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    hook = sys.unraisablehook
    with GracefulShutdown() as shutdown:
        deleted = Deleted()
        del deleted
        with pytest.raises(Stopped):
            shutdown.defer()
    assert sys.unraisablehook is hook
    assert "ignored" not in capsys.readouterr().err


def test_signal_after_the_last_one_that_is_handled_goes_to_the_handler_from_before(monkeypatch):
    """While the error of a run is printed, there is nothing to save."""

    class Error(UserError):
        def __str__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return "a mistake"

    def fails(*_):
        raise Error

    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    monkeypatch.setattr(train, "run", fails)
    try:
        assert train.main(["--preset", "tiny"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


IN_NATIVE_CODE = """
import hashlib, types
from reference.training.run.graceful_shutdown import GracefulShutdown
with GracefulShutdown() as shutdown:
    shutdown.next_step = lambda: "how to go on"
    shutdown.share(types.SimpleNamespace(is_first=True, size=1))
    shutdown.defer("this step")
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # a quarter of an hour
"""


def test_second_ctrl_c_ends_native_code():
    process = start(["-c", IN_NATIVE_CODE], PYTHONPATH=str(ROOT))
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "stopping after this step; Ctrl-C again stops at once\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "\nstopped at once; how to go on\n"
    assert process.returncode == 130


@pytest.mark.parametrize(("number", "code", "name"), SIGNALS)
def test_signal_during_the_imports_is_one_line(tmp_path, number, code, name):
    (tmp_path / "tqdm.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = start([str(ROOT / "reference" / "train.py")], PYTHONPATH=path)
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == f"\nstopped by {name}\n"
    assert process.returncode == code
