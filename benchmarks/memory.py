"""Peak extra memory of a call on the CPU: what the process grew by, sampled while it ran."""

import gc
import threading
import time
from collections.abc import Callable

import psutil

_PERIOD = 0.002  # seconds; an allocation shorter than this can be missed


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Largest growth of the resident set over `call`, which should run long beside 2 ms."""
    process = psutil.Process()
    gc.collect()
    base = process.memory_info().rss
    peak, done = base, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(_PERIOD)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        peak = max(peak, process.memory_info().rss)
        del result
    finally:
        done.set()
        watcher.join()
    return peak - base
