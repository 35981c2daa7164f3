"""What a chip can do, and the time that a kernel's machine code must take on it.

A prediction, not a measurement: each walk over a row takes as long as the slowest of

    memory       bytes per entry from and to the HBM, at MEMORY_EFFICIENCY of the peak, or fewer if
                 the resident threads have too few loads in flight to cover its latency
    issue        instructions per entry, at one per scheduler and cycle
    special      exponentials and reciprocals per entry, at 16 per multiprocessor and cycle

and walks do not overlap. What a row costs beside its walks is left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

# Assumed of every kernel: what quack publishes of its cross-entropy on an H100. A kernel that
# memory binds is predicted at 90% of its floor by this number, and not by its code.
MEMORY_EFFICIENCY = 0.9
# Assumed of a load that misses the L2 of a busy device, in seconds.
MEMORY_LATENCY = 0.7e-6
WARP = 32
# Assumed: the part of the L2 that rows may fill and still be found there in a second walk.
L2_SHARE = 0.7


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

    @property
    def issue_rate(self) -> float:
        """Instructions of one thread, per second."""
        return self.multiprocessors * self.schedulers * WARP * self.clock

    @property
    def special_rate(self) -> float:
        return self.multiprocessors * self.special_units * self.clock

    def resident_programs(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Programs that a multiprocessor holds at once."""
        of_warp = -(-registers // 8) * 8 * WARP
        limits = [self.programs, self.warps // num_warps, self.registers // (of_warp * num_warps)]
        if shared_bytes:
            limits.append(self.shared_bytes // (shared_bytes + 1024))  # 1 KiB is the system's
        return min(limits)


CHIPS = {
    "sm_80": Chip("A100 80 GB", 2.039e12, 108, 1.41e9, 40 << 20, 164 << 10),
    "sm_90": Chip("H100 SXM", 3.35e12, 132, 1.755e9, 50 << 20, 228 << 10),
    "sm_100": Chip("B200", 8.0e12, 148, 1.85e9, 126 << 20, 228 << 10),
}


class Walk(NamedTuple):
    """One walk over the row, per vocabulary entry."""

    instructions: float
    special: float
    read_bytes: float  # from the HBM or the L2
    written_bytes: float
    loads_in_flight: int  # bytes per thread
    again: bool  # what it reads was read by this program before


class Prediction(NamedTuple):
    """Seconds for all rows, and what takes them."""

    seconds: float
    floor: float  # the bytes that must move, at the peak bandwidth
    binds: str  # "memory", "issue" or "special": of the walk that takes longest

    @property
    def of_floor(self) -> float:
        return self.floor / self.seconds


def predict(
    chip: Chip, walks: list[Walk], resident: int, threads: int, rows: int, V: int
) -> Prediction:
    """For rows of V entries, `resident` programs of so many threads to a multiprocessor."""
    seconds, slowest, moved = 0.0, (0.0, ""), 0.0
    row_bytes = max(walk.read_bytes for walk in walks) * V
    fits = row_bytes * resident * chip.multiprocessors <= L2_SHARE * chip.l2_bytes
    for walk in walks:
        from_memory = walk.written_bytes + (0 if walk.again and fits else walk.read_bytes)
        in_flight = walk.loads_in_flight * threads * resident * chip.multiprocessors
        bandwidth = min(MEMORY_EFFICIENCY * chip.bandwidth, in_flight / MEMORY_LATENCY)
        times = {
            "memory": from_memory / bandwidth,
            "issue": walk.instructions / chip.issue_rate,
            "special": walk.special / chip.special_rate,
        }
        binds = max(times, key=times.get)
        slowest = max(slowest, (times[binds], binds))
        seconds += times[binds] * rows * V
        moved += walk.written_bytes + (0 if walk.again else walk.read_bytes)
    return Prediction(seconds, moved * rows * V / chip.bandwidth, slowest[1])
