"""Peak extra memory of a call: what its tensors took at once, inputs not counted."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """As the allocator counts: a GPU's reports its peak, a CPU's its every step."""
    gc.collect()
    return _peak_on_device(call) if torch.cuda.is_available() else peak_tensor_bytes(call)


def _peak_on_device(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


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
