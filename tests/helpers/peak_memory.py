"""Peak of the memory that a call allocates on the CPU, from the profiler."""

from torch.profiler import ProfilerActivity, profile


def peak_memory(call) -> int:
    """Most bytes that the call holds at a time, beyond those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
        events += event.children
    held = peak = 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        held += change
        peak = max(peak, held)
    return peak
