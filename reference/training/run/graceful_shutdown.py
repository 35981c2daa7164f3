"""SIGTERM, by which schedulers end a job, as an exception at a moment that leaves a step whole.

Several ranks stop together, after a step: it reaches them at different moments.
"""

from __future__ import annotations

import signal
import threading

from reference.training.distributed import ALONE, Ranks


class Stopped(BaseException):
    """The process was asked to end. No Exception, which samplers and rewards turn into others."""


class Stop:
    """While entered, SIGTERM raises Stopped: at once, or after `hold` in `release`.

    Attributes:
        asked: whether it came.
        holds: whether a step is under way that has to be done whole.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self.asked = False
        self.holds = ranks.size > 1

    def __enter__(self) -> Stop:
        # Python hands signals to the main thread alone.
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def hold(self) -> None:
        """From here to `release` a step is done whole."""
        self.holds = True

    def release(self) -> None:
        """Raises Stopped where SIGTERM came in the meantime, to any rank."""
        self.holds = self._ranks.size > 1  # they end together, or not at all
        if any(self._ranks.gathered(self.asked)):
            self.asked, self.holds = True, False
            raise Stopped

    def _receive(self, *_) -> None:
        if self.asked:  # the first one is being obeyed
            return
        self.asked = True
        if not self.holds:
            raise Stopped
