"""Counts read from disassembled kernels: NVIDIA's SASS and AMD's assembly."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from benchmarks.codegen.variants import RowPass


@dataclass(frozen=True)
class Loop:
    """The loop of one pass over whole tiles; counts are per vocabulary entry of one thread."""

    instructions: float
    special: float  # exponentials and reciprocals
    load_bytes: list[int]  # of each load, per thread
    store_bytes: list[int]
    barriers: int


@dataclass(frozen=True)
class MachineCode:
    """The resources that a compiled kernel takes, and its loops."""

    registers: int
    stack_bytes: int
    spills: int
    loops: list[Loop]  # one per pass; empty on AMD
    load_bytes: list[int]  # the widths in use: in the loops, on AMD in the whole kernel


def cuobjdump(cubin: bytes, option: str) -> str:
    """Run the disassembler of Triton's own wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def loop_bodies(sass: str) -> list[list[str]]:
    """Return the instructions of each innermost loop.

    A loop is what lies between a backward branch and its target.
    """
    line = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
    matches = [found for found in map(line.match, sass.split("\n")) if found]
    code = [(int(found[1], 16), found[2]) for found in matches]
    spans = []
    for address, instruction in code:
        branch = re.search(r"\bBRA\S*.*?0x([0-9a-f]+)", instruction)
        if branch and (start := int(branch[1], 16)) < address:
            spans.append((start, address))
    innermost = [
        (start, end)
        for start, end in spans
        if not any(
            start <= other_start and other_end <= end and (other_start, other_end) != (start, end)
            for other_start, other_end in spans
        )
    ]
    return [
        [instruction for address, instruction in code if start <= address <= end]
        for start, end in innermost
    ]


def access_bytes(operation: str) -> int:
    """Return the width of a load or a store per thread."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    width = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", operation)
    return sizes[width[1]] if width else 4


def count_loop(body: list[str], tensors: int, itemsize: int) -> Loop | None:
    """Count the instructions of a loop; None if it loads nothing, because it writes zeros."""
    # The first word, after a predicate such as @!P0, is the operation.
    operations = [re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0] for instruction in body]
    loads = [access_bytes(name) for name in operations if name.startswith("LDG")]
    if not loads:
        return None
    entries = sum(loads) / (tensors * itemsize)
    if itemsize == 2 and set(loads) == {4}:  # not aligned: eight entries are in five words
        entries *= 4 / 5
    return Loop(
        instructions=len(body) / entries,
        special=sum(name.startswith("MUFU") for name in operations) / entries,
        load_bytes=loads,
        store_bytes=[access_bytes(name) for name in operations if name.startswith("STG")],
        barriers=sum(name.startswith("BAR") for name in operations),
    )


def read_sass(cubin: bytes, passes: tuple[RowPass, ...], itemsize: int) -> MachineCode:
    """Read the resources and the loop of each pass, the passes that only read first.

    What is left after whole tiles has a masked loop of its own, with smaller tiles or with more
    instructions: of the loops that read only and of those that write, those that load the most are
    taken, of these the shortest.
    """
    usage = cuobjdump(cubin, "-res-usage")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    bodies, selected = loop_bodies(cuobjdump(cubin, "-sass")), []
    for writes in (False, True):
        kind = [row_pass for row_pass in passes if row_pass.writes is writes]
        if not kind:
            continue
        loops = [count_loop(body, kind[0].tensors, itemsize) for body in bodies]
        loops = [loop for loop in loops if loop and bool(loop.store_bytes) is writes]
        if len(loops) < len(kind):
            raise RuntimeError(f"{len(kind)} passes, but {len(loops)} loops in the machine code")
        loops_by_size = sorted(loops, key=lambda loop: (-sum(loop.load_bytes), loop.instructions))
        selected += [loop for loop in loops if loop in loops_by_size[: len(kind)]]
    widths = {width for loop in selected for width in loop.load_bytes}
    return MachineCode(used["REG"], used["STACK"], used["LOCAL"], selected, sorted(widths))


def read_amd(assembly: str) -> MachineCode:
    """Read the resources and the widths of all loads; the loops are not searched."""
    # A spilled scalar register goes to a lane of a vector register, not to memory: not counted.
    notes = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    usage = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in notes)
    widths = {"dword": 4, "dwordx2": 8, "dwordx4": 16, "ushort": 2, "short_d16": 2}
    loads = re.findall(r"(?:global|buffer)_load_(\w+)", assembly)
    return MachineCode(*usage, [], sorted({widths.get(name, 4) for name in loads}))
