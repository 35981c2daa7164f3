"""Peak extra memory of a call: the most that its tensors take at once, inputs not counted."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Return the peak that the allocator of this machine's device reports.

    Called in a new thread: a workspace belongs to a thread and stays for its next call, and all of
    it has to count.
    """
    gc.collect()
    peak = peak_device_bytes if torch.cuda.is_available() else peak_tensor_bytes
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(peak, call).result()


def peak_device_bytes(call: Callable[[], object]) -> int:
    """Return the peak of the CUDA allocator above what is allocated before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


def limit_memory() -> None:
    """Let a tensor that exceeds the memory raise, before the system kills the process."""
    import resource  # which Windows lacks; a notebook imports this module there too

    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():  # which reserves more addresses than there is memory
        resource.setrlimit(resource.RLIMIT_AS, (physical, physical))


def free_memory(device: torch.device) -> None:
    """Return the memory of dead tensors to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_tensor_bytes(call: Callable[[], object]) -> int:
    """Return the peak of CPU tensors; memory that libraries allocate themselves is not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    events = profiler.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
