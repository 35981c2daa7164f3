"""Peak extra memory of a call on the CPU, as the process grew or as tensors were allocated."""

import gc
import threading
import time
from collections.abc import Callable

import psutil
from torch.profiler import ProfilerActivity, profile

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


def peak_tensor_bytes(call: Callable[[], object]) -> int:
    """The most that tensors made during `call` took at once: exact, but blind to libraries' own."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    events = profiler.profiler.kineto_results.events()
    allocations = [each for each in events if each.name() == "[memory]"]
    current = peak = 0
    for each in sorted(allocations, key=lambda each: each.start_ns()):
        current += each.nbytes()
        peak = max(peak, current)
    return peak
