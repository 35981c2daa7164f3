"""Launch choices as a frozen table, and the pure functions that read it.

A row kernel walks a row in tiles of unroll x lanes x vector entries: a lane is a thread, `vector`
the entries of one 16-byte access, `unroll` the accesses in flight per thread. No entry depends on
the number of tokens, so that new lengths never compile again.

"Predicted" in a reason: from machine code, by `python -m benchmarks.codegen`. An entry that was
timed names the device.
"""

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

ACCESS_BYTES = 16
WARP = 32
# Tiles to a part of a row. A part is what one program takes where rows are few; merging it costs a
# lane two exponentials, 1/32 of one per entry at 64 entries per lane.
PART_TILES = 4
# Below this many rows per multiprocessor a row is split: one or two programs of four warps have too
# few loads in flight to fill the memory's bandwidth. Not timed.
ROWS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True, kw_only=True)
class RowLaunch:
    """How one program walks its row."""

    unroll: int
    lanes: int
    vector: int
    part_tiles: int = PART_TILES

    @property
    def num_warps(self) -> int:
        return max(1, self.lanes // WARP)

    @property
    def part(self) -> int:
        """Entries of a part."""
        return self.part_tiles * self.unroll * self.lanes * self.vector

    def parts(self, V: int) -> int:
        """Parts of a row of V entries."""
        return max(1, -(-V // self.part))


class _Entry(NamedTuple):
    kernel: str
    unroll: int
    warps: int
    reason: str
    below: float = inf  # serves vocabularies smaller than this
    itemsize: int | None = None  # of the logits, in bytes; None: any
    architecture: int | None = None  # compute capability, 90 for sm_90; None: any


_FOUR_WARPS = "four warps keep a dozen rows per multiprocessor in flight"
_FEW_TILES = "a row of a few tiles: more lanes would only idle in the merge"
_ONE_ROW = (
    "one row per multiprocessor, by its threads: 132 rows of 128,256 in bf16 are 34 of the H100's "
    "50 MB of L2"
)

# The first entry that fits is taken.
TABLE: tuple[_Entry, ...] = (
    _Entry("token_stats_forward", 1, 1, _FEW_TILES, below=2048),
    _Entry(
        "token_stats_forward",
        2,
        4,
        _FOUR_WARPS + "; predicted, sm_90, bf16: 10.5 instructions and 1.13 exponentials per entry "
        "without the unrolling, 9.6 and 1.06 with it",
    ),
    _Entry("token_stats_backward", 1, 1, _FEW_TILES, below=2048),
    _Entry(
        "token_stats_backward",
        2,
        4,
        _FOUR_WARPS
        + "; at unroll 4 the softcap's gradient takes 8 bytes of stack on sm_100; memory "
        "is predicted to bind without a softcap at either; not timed",
        itemsize=2,
        architecture=100,
    ),
    _Entry(
        "token_stats_backward",
        4,
        4,
        _FOUR_WARPS + "; predicted, sm_90, bf16: 8.7 instructions per entry with the entropy's "
        "gradient in 45 registers, 9.1 at unroll 2 and 9.6 at 1 in 32",
    ),
    _Entry("grpo_loss", 1, 1, _FEW_TILES, below=2048),
    _Entry(
        "grpo_loss",
        4,
        32,
        "as below: rows of 513 KB fit into the B200's 126 MB, one to a multiprocessor; predicted "
        "1.75 ms at unroll 1 and 2, where two programs get in, and 1.17 at 4; not timed",
        itemsize=4,
        architecture=100,
    ),
    _Entry(
        "grpo_loss",
        2,
        32,
        _ONE_ROW + "; predicted, sm_90, bf16: without the unrolling 32 registers let two in, and "
        "1.39 ms become 2.09; not timed",
    ),
    _Entry("scale", 4, 4, "as token_stats_backward; returns at once where the factor is 1"),
    _Entry("approximate_kl_forward", 2, 4, "as token_stats_forward; not tuned"),
    _Entry("approximate_kl_backward", 2, 4, "as token_stats_forward; not tuned"),
)

# The interpreter's cost is rows x tiles: small tiles while they keep several to a row, so that
# merging is exercised; large ones beyond.
_INTERPRETED_SMALL = RowLaunch(unroll=2, lanes=8, vector=4, part_tiles=2)
_INTERPRETED_LARGE = RowLaunch(unroll=2, lanes=512, vector=8)


def pick_row_launch(
    kernel: str, V: int, itemsize: int, *, architecture: int | None, interpreted: bool
) -> RowLaunch:
    """The launch of `kernel` for rows of V entries of `itemsize` bytes.

    architecture: the device's compute capability, as 90; None where there is none.
    """
    if interpreted:
        return _INTERPRETED_SMALL if V <= 1024 else _INTERPRETED_LARGE
    entry = next(
        each
        for each in TABLE
        if each.kernel == kernel
        and V < each.below
        and each.itemsize in (None, itemsize)
        and each.architecture in (None, architecture)
    )
    return RowLaunch(
        unroll=entry.unroll, lanes=entry.warps * WARP, vector=max(1, ACCESS_BYTES // itemsize)
    )


def are_few(rows: int, multiprocessors: int) -> bool:
    """Whether rows are split over several programs."""
    return rows < ROWS_PER_MULTIPROCESSOR * multiprocessors
