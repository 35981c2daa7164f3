"""Count the floating-point operations of matmuls with the profiler."""

from math import prod

from torch.profiler import ProfilerActivity, profile

FIRST_OPERAND = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0}  # its argument position


def count_flops(call) -> int:
    """Sum of 2·m·k·n over the matmuls that the call issues."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    total = 0
    for event in profiler.events():
        if event.name in FIRST_OPERAND:
            first = FIRST_OPERAND[event.name]
            (*batch, m, k), (*_, k_too, n) = event.input_shapes[first : first + 2]
            assert k == k_too
            total += 2 * prod(batch) * m * k * n
    return total
