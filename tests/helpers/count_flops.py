"""The matrix products that a call issues, as the profiler sees them."""

from math import prod

from torch.profiler import ProfilerActivity, profile

OPERANDS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0}  # where the first of the two stands


def issued(call) -> int:
    """2·m·k·n of every matrix product that the call issues."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    total = 0
    for event in profiler.events():
        if event.name in OPERANDS:
            first = OPERANDS[event.name]
            (*batch, m, k), (*_, k_too, n) = event.input_shapes[first : first + 2]
            assert k == k_too
            total += 2 * prod(batch) * m * k * n
    return total
