"""Ctrl-C and SIGTERM end a run where nothing is lost, and a second Ctrl-C ends it at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reference.training.distributed import SINGLE_PROCESS
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
        time.sleep(1)  # until the thread has printed its line
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


def test_signal_during_the_deletion_of_an_object_is_sent_again():
    class Deleted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    hook = sys.unraisablehook
    with GracefulShutdown(), pytest.raises(Stopped):
        deleted = Deleted()
        del deleted
        time.sleep(10)
    assert sys.unraisablehook is hook


def test_dropped_signal_is_raised_once():
    with GracefulShutdown() as shutdown:
        shutdown.requested, shutdown._is_dropped = signal.SIGINT, True
        with pytest.raises(Stopped):
            shutdown.defer()
        shutdown._resend()
        time.sleep(0.05)


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
