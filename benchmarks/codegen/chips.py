"""A GPU's published limits, and the time predicted for a kernel's machine code.

This is a prediction, not a measurement. A pass over a row takes as long as the slowest of

    memory       bytes per entry from and to the HBM, at MEMORY_EFFICIENCY of the peak bandwidth,
                 or less if the loads in flight are too few to cover the latency
    issue        instructions per entry, one per scheduler and cycle
    special      exponentials and reciprocals per entry, 16 per multiprocessor and cycle

and passes do not overlap. What a row costs beside its passes is left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

from grpo_kernels.backends.triton.launch_configs import L2_SHARE

# Assumed for every kernel: what quack publishes for its cross-entropy on an H100. A kernel that is
# bound by memory is predicted at 90% of its floor for this reason, and not because of its code.
MEMORY_EFFICIENCY = 0.9
# Assumed for a load that misses the L2 of a busy device, in seconds.
MEMORY_LATENCY = 0.7e-6
WARP = 32


@dataclass(frozen=True)
class Chip:
    """A GPU's published limits."""

    name: str
    bandwidth: float  # bytes/s
    multiprocessors: int
    clock: float  # Hz, boost
    l2_bytes: int
    shared_bytes: int  # per multiprocessor
    registers: int = 65_536  # per multiprocessor
    warps: int = 64
    programs: int = 32
    schedulers: int = 4
    special_units: int = 16

    def resident_programs(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Return how many programs a multiprocessor runs at once."""
        warp_registers = -(-registers // 8) * 8 * WARP
        limits = [
            self.programs,
            self.warps // num_warps,
            self.registers // (warp_registers * num_warps),
        ]
        if shared_bytes:
            limits.append(self.shared_bytes // (shared_bytes + 1024))  # 1 KiB is the system's
        return min(limits)


CHIPS = {
    "sm_80": Chip("A100 80 GB", 2.039e12, 108, 1.41e9, 40 << 20, 164 << 10),
    "sm_90": Chip("H100 SXM", 3.35e12, 132, 1.755e9, 50 << 20, 228 << 10),
    "sm_100": Chip("B200", 8.0e12, 148, 1.85e9, 126 << 20, 228 << 10),
}


class PassCost(NamedTuple):
    """Cost of one pass over the row, per vocabulary entry."""

    instructions: float
    special: float
    read_bytes: float  # from the HBM or the L2
    written_bytes: float
    loads_in_flight: int  # bytes per thread
    again: bool  # an earlier pass of the same program read the same bytes


class Prediction(NamedTuple):
    """Predicted time of a kernel for all rows."""

    seconds: float
    floor: float  # seconds: the bytes that must move, at the peak bandwidth
    binds: str  # limit of the slowest pass: "memory", "issue" or "special"

    @property
    def of_floor(self) -> float:
        return self.floor / self.seconds


def predict(
    chip: Chip,
    passes: list[PassCost],
    resident: int,
    threads: int,
    rows: int,
    V: int,
    programs: int | None = None,
) -> Prediction:
    """Predict the time for rows of V entries.

    Args:
        resident: programs per multiprocessor at once.
        threads: threads per program.
        programs: on all multiprocessors; None: as many as are resident.
    """
    seconds, slowest, moved = 0.0, (0.0, ""), 0.0
    programs = programs or resident * chip.multiprocessors
    busy = min(programs, chip.multiprocessors)
    lanes = busy * chip.schedulers * WARP  # threads that issue in one cycle
    row_bytes = max(cost.read_bytes for cost in passes) * V
    fits_l2 = row_bytes * programs <= L2_SHARE * chip.l2_bytes
    for cost in passes:
        hbm_bytes = cost.written_bytes + (0 if cost.again and fits_l2 else cost.read_bytes)
        in_flight = cost.loads_in_flight * threads * programs
        bandwidth = min(MEMORY_EFFICIENCY * chip.bandwidth, in_flight / MEMORY_LATENCY)
        times = {
            "memory": hbm_bytes / bandwidth,
            "issue": cost.instructions / (lanes * chip.clock),
            "special": cost.special / (busy * chip.special_units * chip.clock),
        }
        binds = max(times, key=times.__getitem__)
        slowest = max(slowest, (times[binds], binds))
        seconds += times[binds] * rows * V
        moved += cost.written_bytes + (0 if cost.again else cost.read_bytes)
    return Prediction(seconds, moved * rows * V / chip.bandwidth, slowest[1])
