"""Peak extra memory of a call: the most that its tensors take at once, inputs not counted."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Return the peak that the allocator of this machine's device reports."""
    gc.collect()
    if not torch.cuda.is_available():
        return peak_tensor_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


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
