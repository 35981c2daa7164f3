"""SIGTERM, by which schedulers end a job, as an exception between two training steps.

Several ranks stop together, after a step, since the signal reaches them at different moments.
"""

from __future__ import annotations

import signal
import threading

from reference.training.distributed import SINGLE_PROCESS, Ranks


class Stopped(BaseException):
    """The process received SIGTERM.

    It is no Exception: samplers and rewards turn every Exception into a UserError.
    """


class GracefulShutdown:
    """A context manager in which SIGTERM raises Stopped.

    It raises at once, or in `raise_if_requested` if the signal came after `defer`.
    """

    def __init__(self, ranks: Ranks = SINGLE_PROCESS) -> None:
        self._ranks, self.requested = ranks, False
        self.is_deferred = ranks.size > 1  # a step is under way that has to be completed first

    def __enter__(self) -> GracefulShutdown:
        def receive(*_) -> None:
            if self.requested:  # a second signal must not interrupt the shutdown
                return
            self.requested = True
            if not self.is_deferred:
                raise Stopped

        # Python delivers signals to the main thread only.
        is_main = threading.current_thread() is threading.main_thread()
        self._previous = signal.signal(signal.SIGTERM, receive) if is_main else None
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def defer(self) -> None:
        """Complete what follows, up to `raise_if_requested`, before SIGTERM has an effect."""
        self.is_deferred = True

    def raise_if_requested(self) -> None:
        """Raise Stopped if any rank received SIGTERM in the meantime."""
        self.is_deferred = self._ranks.size > 1
        if any(self._ranks.all_gather(self.requested)):
            self.requested, self.is_deferred = True, False
            raise Stopped
