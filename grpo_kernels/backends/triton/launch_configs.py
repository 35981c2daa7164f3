"""The launch configs of the row kernels, as a frozen table, and the function that reads it.

A kernel processes a row in tiles of unroll x lanes x vector entries. A lane is a thread, `vector`
the entries of one 16-byte access, `unroll` the accesses in flight per thread. No entry depends on
the number of tokens, so new lengths never compile again.

Each entry has its reason. Numbers in a reason are predicted from the machine code of sm_90 in bf16
by `python -m benchmarks.codegen`, unless it names another device. None is timed yet.
"""

from dataclasses import dataclass, replace
from math import inf

ACCESS_BYTES = 16
WARP = 32
# A part of a row is what one program takes where rows are few. Merging it costs a lane two
# exponentials: 1/32 of one per entry at 64 entries per lane.
PART_TILES = 4
# With fewer rows than this per multiprocessor, a row is split: one or two programs of four warps
# have too few loads in flight to fill the memory's bandwidth. Not timed.
ROWS_PER_MULTIPROCESSOR = 2
# The part of the L2 that rows may fill and still be there in a second pass. Assumed.
L2_SHARE = 0.7
# The least part of the multiprocessors that has enough loads in flight: with 1,024 threads that
# load 32 bytes each, 44 of the H100's 132 cover 0.7 us at 2.1 TB/s.
LEAST_MULTIPROCESSORS = 1 / 3


@dataclass(frozen=True, kw_only=True)
class RowLaunch:
    """Launch config of a row kernel: the tiles in which a program processes its row."""

    unroll: int
    lanes: int
    vector: int
    part_tiles: int = PART_TILES
    # Programs per multiprocessor, each of which loops over rows; None: a program for each row.
    programs: int | None = None

    @property
    def num_warps(self) -> int:
        return max(1, self.lanes // WARP)

    @property
    def tile(self) -> dict[str, int]:
        """The constexpr parameters of a kernel that processes tiles."""
        return {"UNROLL": self.unroll, "LANES": self.lanes, "VEC": self.vector}

    @property
    def part(self) -> int:
        """Entries of a part."""
        return self.part_tiles * self.unroll * self.lanes * self.vector

    def parts(self, V: int) -> int:
        """Parts of a row of V entries."""
        return max(1, -(-V // self.part))


@dataclass(frozen=True)
class TableEntry:
    kernel: str
    unroll: int
    warps: int
    reason: str
    below: float = inf  # for vocabularies smaller than this
    itemsize: int | None = None  # of the logits, in bytes; None: any
    architecture: int | None = None  # compute capability, 90 for sm_90; None: any
    programs: int | None = None  # per multiprocessor, as in RowLaunch


FOUR_WARPS = "Four warps keep a dozen rows per multiprocessor in flight. "
FEW_TILES = "The row has a few tiles only; more lanes would idle in the merge."
ONE_ROW = "The second pass finds the row in the L2 as each multiprocessor runs one program. "

# The first entry that fits is taken.
TABLE: tuple[TableEntry, ...] = (
    TableEntry("token_stats_forward", 1, 1, FEW_TILES, below=2048),
    TableEntry(
        "token_stats_forward",
        unroll=2,
        warps=4,
        reason=FOUR_WARPS + "An entry takes 9.6 instructions and 1.06 exponentials, against 10.5 "
        "and 1.13 at unroll 1.",
    ),
    TableEntry("token_stats_backward", 1, 1, FEW_TILES, below=2048),
    TableEntry(
        "token_stats_backward",
        unroll=2,
        warps=4,
        reason=FOUR_WARPS + "At unroll 4 the gradient through the softcap spills 8 bytes to the "
        "stack on sm_100. Without a softcap memory is the limit at unroll 2 and at 4.",
        itemsize=2,
        architecture=100,
    ),
    TableEntry(
        "token_stats_backward",
        unroll=4,
        warps=4,
        reason=FOUR_WARPS + "With the entropy's gradient an entry takes 8.7 instructions in 47 "
        "registers, against 9.1 at unroll 2 and 9.6 at unroll 1 in 32.",
    ),
    TableEntry("grpo_loss", 1, 1, FEW_TILES, below=2048),
    TableEntry(
        "grpo_loss",
        unroll=4,
        warps=32,
        reason=ONE_ROW + "148 rows of 128,256 in fp32 are 76 of the B200's 126 MB. An entry takes "
        "7.6 instructions, against 11.2 at unroll 2. In bf16 the one with a softcap would spill.",
        itemsize=4,
        architecture=100,
        programs=1,
    ),
    TableEntry(
        "grpo_loss",
        unroll=2,
        warps=32,
        reason=ONE_ROW + "132 rows of 128,256 in bf16 are 34 of the H100's 50 MB. An entry takes "
        "10.0 and 9.4 instructions, against 10.8 and 9.6 at unroll 1. At unroll 4 the kernel with "
        "a softcap spills.",
        programs=1,
    ),
    TableEntry("top_entries", 1, 4, "A row's keys are few, and four warps hold them. Not tuned."),
    TableEntry("scale", 4, 4, "The same accesses as token_stats_backward."),
    TableEntry("approximate_kl_forward", 2, 4, "As token_stats_forward. Not tuned."),
    TableEntry("approximate_kl_backward", 2, 4, "As token_stats_forward. Not tuned."),
    TableEntry("jsd_forward", 2, 4, "As token_stats_forward. Not tuned."),
    TableEntry("jsd_backward", 2, 4, "As token_stats_forward. Not tuned."),
)

# The interpreter's cost is rows x tiles. Small rows get small tiles, so that they have several and
# tests exercise the merge.
INTERPRETED_SMALL = RowLaunch(unroll=2, lanes=8, vector=4, part_tiles=2)
INTERPRETED_LARGE = RowLaunch(unroll=2, lanes=512, vector=8)


def looping_programs(row_bytes: int, multiprocessors: int, l2_bytes: int) -> int:
    """Return how many programs may loop over rows that each of them reads twice.

    It is one to a multiprocessor, or as many as have their rows in the L2 together. 71 fp32 rows of
    128,256 fit into an H100's, and 132 would be read twice from memory: 10 bytes per entry, not 6.
    """
    fitting = int(L2_SHARE * l2_bytes) // row_bytes
    is_enough = fitting >= LEAST_MULTIPROCESSORS * multiprocessors
    return min(multiprocessors, fitting) if is_enough else multiprocessors


def pick_row_launch(
    kernel: str, V: int, itemsize: int, *, architecture: int | None, interpreted: bool
) -> RowLaunch:
    """The launch config of `kernel` for rows of V entries of `itemsize` bytes.

    architecture: the device's compute capability, as 90; None where there is none.
    """
    if interpreted:
        launch = INTERPRETED_SMALL if V <= 1024 else INTERPRETED_LARGE
        programs = next((x.programs for x in TABLE if x.kernel == kernel and x.programs), None)
        return replace(launch, programs=programs)
    entry = next(
        entry
        for entry in TABLE
        if entry.kernel == kernel
        and V < entry.below
        and entry.itemsize in (None, itemsize)
        and entry.architecture in (None, architecture)
    )
    vector = max(1, ACCESS_BYTES // itemsize)
    return RowLaunch(
        unroll=entry.unroll, lanes=entry.warps * WARP, vector=vector, programs=entry.programs
    )
