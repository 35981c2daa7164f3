"""What the compiled kernels look like, read from their machine code; needs no GPU.

    python -m benchmarks.codegen                        sm_90, bf16
    python -m benchmarks.codegen --all --json FILE      every target and dtype

Each kernel is compiled offline and disassembled with the tools in Triton's own wheel. Of each walk
over the row a count gives the instructions and the special-function calls (exponentials,
reciprocals) per vocabulary entry, the width of each load and store in bytes per thread, and the
barriers; of the kernel its registers, spills and shared memory. chips.py makes of these a predicted
time, which is not a measurement and is labelled as what it is.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import triton

from .chips import CHIPS, Walk, predict
from .variants import (
    DTYPES,
    LAYOUTS,
    TARGETS,
    N,
    Reading,
    V,
    Variant,
    compile_variant,
    launch_of,
    variants,
)


@dataclass(frozen=True)
class Loop:
    """The machine code of a walk's loop over whole tiles, per vocabulary entry of one thread."""

    instructions: float
    special: float
    load_bytes: list[int]  # of each load, per thread
    store_bytes: list[int]
    barriers: int


@dataclass(frozen=True)
class Report:
    kernel: str
    target: str
    dtype: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    resident_programs: int | None  # per multiprocessor; None: not known, on AMD
    loops: list[Loop]  # in the order of the walks; on AMD not found
    load_bytes: list[int]  # the widths in use: in the loops, on AMD in the whole kernel
    prediction: dict | None  # at N = 8192 rows, V = 128,256


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _access_bytes(instruction: str) -> int:
    width = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", _operation(instruction))
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return sizes[width.group(1)] if width else 4


def _loop_bodies(sass: str) -> list[list[str]]:
    """The instructions from the target of each backward branch to it, of innermost loops."""
    line = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
    code = [
        (int(found.group(1), 16), found.group(2))
        for found in map(line.match, sass.split("\n"))
        if found
    ]
    spans = []
    for address, instruction in code:
        branch = re.search(r"\bBRA\S*.*?0x([0-9a-f]+)", instruction)
        start = int(branch.group(1), 16) if branch else address
        if start < address:
            spans.append((start, address))
    inner = [
        (start, end)
        for start, end in spans
        if not any(start <= other and last <= end and (other, last) != (start, end)
                   for other, last in spans)
    ]  # fmt: skip
    return [[each for at, each in code if start <= at <= end] for start, end in inner]


def _loop(body: list[str], bytes_per_entry: int) -> Loop | None:
    """None for a loop that loads nothing: it writes zeros."""
    loads = [_access_bytes(each) for each in body if _operation(each).startswith("LDG")]
    if not loads:
        return None
    entries = sum(loads) / bytes_per_entry
    return Loop(
        instructions=len(body) / entries,
        special=sum(_operation(each).startswith("MUFU") for each in body) / entries,
        load_bytes=loads,
        store_bytes=[_access_bytes(each) for each in body if _operation(each).startswith("STG")],
        barriers=sum(_operation(each).startswith("BAR") for each in body),
    )


def _loops(sass: str, walks: tuple[Reading, ...], itemsize: int) -> list[Loop]:
    """The loop of each walk. What a walk has left after whole tiles is a loop like it, but under a
    mask, and so with more instructions: the leanest of a kind are taken."""
    bodies, found = _loop_bodies(sass), []
    for writes in (False, True):
        kind = [walk for walk in walks if walk.writes is writes]
        if not kind:
            continue
        loops = [_loop(body, kind[0].tensors * itemsize) for body in bodies]
        loops = [each for each in loops if each and bool(each.store_bytes) is writes]
        leanest = sorted(loops, key=lambda loop: loop.instructions)[: len(kind)]
        if len(leanest) < len(kind):
            raise RuntimeError(f"{len(kind)} walks, but {len(loops)} loops in the machine code")
        found += [loop for loop in loops if loop in leanest]
    return found


def _walk(loop: Loop, reading: Reading, itemsize: int, gradient_itemsize: int) -> Walk:
    written = gradient_itemsize if reading.writes else 0
    loads = sum(loop.load_bytes)
    read = reading.tensors * itemsize
    return Walk(loop.instructions, loop.special, read, written, loads, reading.again)


def _cuda_report(variant: Variant, compiled, target: str, dtype: str) -> dict:
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump(cubin, "-res-usage")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    sass, pick = _cuobjdump(cubin, "-sass"), launch_of(variant, target, dtype)
    of_logits, *_, of_gradient = 2 * dtype.split(">")
    itemsize, gradient_itemsize = DTYPES[of_logits].itemsize, DTYPES[of_gradient].itemsize
    loops, chip = _loops(sass, variant.walks, itemsize), CHIPS[target]
    shared = compiled.metadata.shared
    resident = chip.resident_programs(used["REG"], shared, pick.num_warps)
    walks = [
        _walk(loop, reading, itemsize, gradient_itemsize)
        for loop, reading in zip(loops, variant.walks, strict=True)
    ]
    prediction = predict(chip, walks, resident, pick.lanes, N, V)
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"],
        "spills": used["LOCAL"],
        "shared_bytes": shared,
        "resident_programs": resident,
        "loops": loops,
        "load_bytes": sorted({width for loop in loops for width in loop.load_bytes}),
        "prediction": {**prediction._asdict(), "of_floor": prediction.of_floor},
    }


def _amd_report(compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    widths = {"dword": 4, "dwordx2": 8, "dwordx4": 16, "ushort": 2, "short_d16": 2}
    found = re.findall(r"(?:global|buffer)_load_(\w+)", text)
    return {
        "registers": note("vgpr_count"),
        "stack_bytes": note("private_segment_fixed_size"),
        # A spilled scalar register moves to a lane of a vector register: no memory is touched.
        "spills": note("vgpr_spill_count"),
        "shared_bytes": compiled.metadata.shared,
        "resident_programs": None,
        "loops": [],
        "load_bytes": sorted({widths.get(each, 4) for each in found}),
        "prediction": None,
    }


def report(variant: Variant, target: str, dtype: str) -> Report:
    compiled = compile_variant(variant, target, dtype)
    on_amd = target not in CHIPS
    found = _amd_report(compiled) if on_amd else _cuda_report(variant, compiled, target, dtype)
    return Report(kernel=variant.name, target=target, dtype=dtype, **found)


def _report(case: tuple[str, str, str]) -> Report:
    """`report` of a variant by its name: kernels do not travel between processes."""
    name, target, dtype = case
    return report({each.name: each for each in variants()}[name], target, dtype)


def reports(targets: Iterable[str], dtypes: Iterable[str]) -> Iterator[Report]:
    """In the order of the variants, from as many processes as there are processors."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_report, product((each.name for each in variants()), targets, dtypes))


def _line(report: Report) -> str:
    """One line of the printed table."""
    text = f"{report.kernel:45} {report.target:7}{report.dtype:10}{report.registers:4}"
    text += f"{report.spills:6}{report.shared_bytes:7}"
    if report.prediction is None:
        return text + f"  loads of {report.load_bytes[-1]} bytes"
    walks = " + ".join(f"{loop.instructions:.1f}/{loop.special:.2f}" for loop in report.loops)
    prediction = report.prediction
    text += f"{report.resident_programs:9}  {walks:20} {prediction['binds']:8}"
    return text + f"{1e3 * prediction['seconds']:7.2f} ms{100 * prediction['of_floor']:5.0f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every target and dtype")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    targets, dtypes = (TARGETS, LAYOUTS) if arguments.all else (("sm_90",), ("bf16",))
    print(
        f"Predicted from machine code, for {N} rows of {V:,} entries; nothing here was timed.\n"
        f"{'kernel':45} {'target':7}{'dtype':10}{'regs':>4}{'spill':>6}{'shared':>7}"
        f"{'resident':>9}  {'instr./spec. a walk':20} {'binds':8}{'time':>10}{'floor':>6}"
    )
    rows = []
    for each in reports(targets, dtypes):
        rows.append(asdict(each))
        print(_line(each), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
