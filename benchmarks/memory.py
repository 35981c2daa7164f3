"""Peak extra memory of a call: as the allocator of a GPU counts it, or as the process grew."""

import gc
import threading
import time
from collections.abc import Callable

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

_PERIOD = 0.002  # seconds; an allocation shorter than this can be missed


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Largest growth over `call`, which on a CPU should run long beside 2 ms."""
    gc.collect()
    if torch.cuda.is_available():
        return _peak_on_device(call)
    return _peak_of_process(call)


def _peak_on_device(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


def _peak_of_process(call: Callable[[], object]) -> int:
    process = psutil.Process()
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
