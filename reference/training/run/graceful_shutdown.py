"""Ctrl-C, and SIGTERM by which schedulers end a job, as an exception where nothing is lost.

The first signal drops what can be repeated (loading, sampling, an evaluation) and waits for what
cannot: the update of the weights and its log. A second Ctrl-C ends the process at once. The
checkpoint that is being written is then absent.

Several ranks stop together, after a step, since the signal reaches them at different moments.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is not imported here: `exit_on_signals` comes before that
    from reference.training.distributed import Ranks

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0}
NOTHING_TRAINED = "no step was trained: start with the same command again"


class Stopped(BaseException):
    """The process received Ctrl-C or SIGTERM.

    It is no Exception: samplers and rewards turn every Exception into a UserError.
    """

    def __init__(self, number: int) -> None:
        super().__init__(NAMES[signal.Signals(number)])
        self.exit_code = EXIT_CODES[signal.Signals(number)]


def exit_on_signals() -> None:
    """End the process with one line at Ctrl-C or SIGTERM, while there is nothing to save."""

    def end(number: int, _) -> None:
        _exit(f"stopped by {NAMES[signal.Signals(number)]}", EXIT_CODES[signal.Signals(number)])

    for number in NAMES:
        signal.signal(number, end)


class GracefulShutdown:
    """A context manager in which Ctrl-C and SIGTERM raise Stopped.

    They raise at once, or in `raise_if_requested` if they came after `defer`. Stopped may be lost,
    in a reward that catches everything or in a destructor. The next `defer` then raises it.

    Python calls a signal handler only between two bytecodes, of which a backward pass is one. A
    thread therefore reads the signals too: it prints at once that the run stops, and ends the
    process at the second Ctrl-C.

    Attributes:
        requested: the number of the signal that was received, or None.
        next_step: returns a line for the user on how to go on.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.next_step: Callable[[], str] = lambda: NOTHING_TRAINED
        self._ranks: Ranks | None = None
        self._deferred_to: str | None = None
        self._is_told = threading.Event()  # set when the thread has read the first signal
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(
                self._writer.fileno(), warn_on_full_buffer=False
            )
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._hide_stopped
            self._previous = {number: signal.getsignal(number) for number in NAMES}
            for number in NAMES:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        """Leave signals to the handlers from before: there is nothing to save."""
        if self._previous:
            sys.unraisablehook = self._previous_hook
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            self._writer.close()  # ends the thread
            self._thread.join()
            self._reader.close()
            self._previous = {}

    @property
    def is_first_rank(self) -> bool:
        return self._ranks is None or self._ranks.is_first

    def share(self, ranks: Ranks) -> None:
        """From here on all ranks stop together, in `raise_if_requested`."""
        self._ranks = ranks
        self._allow()

    def defer(self, to: str = "this step") -> None:
        """Complete what follows, up to `raise_if_requested`, before a signal has an effect."""
        self._deferred_to = to
        if self.requested is not None and (self._ranks is None or self._ranks.size == 1):
            raise Stopped(self.requested)

    def raise_if_requested(self) -> None:
        """Raise Stopped if any rank received a signal in the meantime."""
        self._allow()
        requested = (
            [self.requested] if self._ranks is None else self._ranks.all_gather(self.requested)
        )
        for number in requested:
            if number is not None:
                self.requested = number
                raise Stopped(number)

    def _allow(self) -> None:
        several = self._ranks is not None and self._ranks.size > 1
        self._deferred_to = "this step" if several else None

    def _receive(self, number: int, _) -> None:
        if self.requested is None:  # not a second SIGTERM during the shutdown
            self.requested = number
            # The thread says what is deferred now. Not for ever: this thread may hold its lock.
            self._is_told.wait(timeout=1)
            if self._deferred_to is None:
                raise Stopped(number)

    def _hide_stopped(self, dropped: sys.UnraisableHookArgs) -> None:
        """Do not show a Stopped that was lost in a destructor."""
        if not isinstance(dropped.exc_value, Stopped):
            self._previous_hook(dropped)

    def _watch(self) -> None:
        """Print how the run stops; end the process at the second Ctrl-C."""
        received: list[int] = []
        while data := self._reader.recv(1):
            number = data[0]
            if number not in NAMES:  # of another handler
                continue
            received.append(number)
            if received.count(signal.SIGINT) == 2:
                _exit(f"stopped at once; {self.next_step()}", EXIT_CODES[signal.SIGINT])
            in_training = self._ranks is not None and self._ranks.is_first  # else it ends at once
            if in_training and (len(received) == 1 or number == signal.SIGINT):
                when = f" after {self._deferred_to}" if self._deferred_to else ""
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                # One write: the progress bar of the main thread cannot come in between.
                sys.stderr.write(f"\nstopping{when}{again}\n")
                sys.stderr.flush()
            self._is_told.set()


def _exit(line: str, code: int) -> None:
    """End the process without unwinding: whatever hangs or is slow cannot hold it up."""
    os.write(2, f"\n{line}\n".encode(errors="backslashreplace"))  # print may wait for a lock
    os._exit(code)
