"""Launch choices as a frozen table, and the pure functions that read it.

A row kernel walks a row in tiles of unroll x lanes x vector entries: a lane is a thread, `vector`
the entries of one 16-byte access, `unroll` the accesses in flight per thread. No entry depends on
the number of tokens, so that new lengths never compile again.
"""

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

ACCESS_BYTES = 16
WARP = 32


@dataclass(frozen=True, kw_only=True)
class RowLaunch:
    """How one program walks its row."""

    unroll: int
    lanes: int
    vector: int

    @property
    def num_warps(self) -> int:
        return max(1, self.lanes // WARP)


class _Entry(NamedTuple):
    kernel: str
    below: float  # serves vocabularies smaller than this
    unroll: int
    warps: int
    reason: str


_FOUR_WARPS = "four warps keep a dozen rows per multiprocessor in flight"

_FEW_TILES = "a row of a few tiles: more lanes would only idle in the merge"

TABLE: tuple[_Entry, ...] = (
    _Entry("token_stats_forward", 2048, 1, 1, _FEW_TILES),
    _Entry(
        "token_stats_forward",
        inf,
        2,
        4,
        _FOUR_WARPS + "; sm_90 code, bf16: 9.6 instructions and 1.06 exponentials per entry, 10.5 "
        "and 1.13 without the unrolling",
    ),
    _Entry("token_stats_backward", 2048, 1, 1, _FEW_TILES),
    _Entry(
        "token_stats_backward",
        inf,
        4,
        4,
        _FOUR_WARPS + "; sm_90 code, bf16: 8.75 instructions per entry with the entropy's "
        "gradient, 9.25 at unroll 2 and 9.75 at 1, in 32 registers at each",
    ),
    _Entry("approximate_kl_forward", inf, 2, 4, "as token_stats_forward; not tuned"),
    _Entry("approximate_kl_backward", inf, 2, 4, "as token_stats_forward; not tuned"),
)

# The interpreter's cost is rows x tiles: small tiles while they keep several to a row, so that
# merging is exercised; large ones beyond.
_INTERPRETED_SMALL = RowLaunch(unroll=2, lanes=4, vector=4)
_INTERPRETED_LARGE = RowLaunch(unroll=2, lanes=512, vector=8)


def pick_row_launch(kernel: str, V: int, itemsize: int, *, interpreted: bool) -> RowLaunch:
    """The launch of `kernel` for rows of V entries of `itemsize` bytes."""
    if interpreted:
        return _INTERPRETED_SMALL if V <= 1024 else _INTERPRETED_LARGE
    entry = next(entry for entry in TABLE if entry.kernel == kernel and V < entry.below)
    return RowLaunch(
        unroll=entry.unroll, lanes=entry.warps * WARP, vector=max(1, ACCESS_BYTES // itemsize)
    )
