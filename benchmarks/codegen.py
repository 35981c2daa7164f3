"""What the compiled kernels look like, read from their machine code; needs no GPU.

    python -m benchmarks.codegen                        sm_90, bf16
    python -m benchmarks.codegen --all --json FILE      every target and dtype

Each kernel is compiled offline and disassembled with the tools in Triton's own wheel. For each loop
that loads from memory, a row gives the instructions and the special-function calls (exponentials,
reciprocals) per vocabulary entry, and the widest and narrowest load in bytes per thread. A static
count says what a chip must issue. It is not a time, and predicts none by itself.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_kernels.kernels import approximate_kl, token_stats
from grpo_kernels.launch import pick_row_launch

V = 128_256  # Llama 3
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of the logits, and of their gradient where it is another: the last is the hidden level's.
LAYOUTS = (*DTYPES, "fp32>bf16")


@dataclass(frozen=True)
class Variant:
    """One way to launch a kernel: the arguments that are None, and its own constants."""

    name: str
    kernel: object
    launch: str
    absent: tuple[str, ...] = ()
    constants: dict = field(default_factory=dict)


def _token_stats_variants() -> Iterator[Variant]:
    no_kl = ("ref_logits_ptr", "kl_ptr", "ref_normaliser_ptr")
    no_entropy = ("entropy_ptr", "d_entropy_ptr")
    plain = {"KL": "none", "SOFTCAP": None}
    forward, backward = (
        token_stats._token_stats_forward_kernel,
        token_stats._token_stats_backward_kernel,
    )
    for name, absent, constants in (
        ("log-prob", (*no_kl, *no_entropy, "d_kl_ptr"), plain),
        ("log-prob, entropy", (*no_kl, "d_kl_ptr"), plain),
        ("log-prob, entropy, softcap", (*no_kl, "d_kl_ptr"), {**plain, "SOFTCAP": 30.0}),
        ("log-prob, entropy, forward KL", (), {**plain, "KL": "forward"}),
        ("log-prob, entropy, reverse KL", (), {**plain, "KL": "reverse"}),
    ):
        for kernel, launch in (
            (forward, "token_stats_forward"),
            (backward, "token_stats_backward"),
        ):
            known = tuple(each for each in absent if each in kernel.arg_names)
            yield Variant(f"{launch}: {name}", kernel, launch, known, constants)


def variants() -> Iterator[Variant]:
    yield from _token_stats_variants()
    constants = {"LOG2_EPS": -19.93}
    for launch in ("approximate_kl_forward", "approximate_kl_backward"):
        kernel = getattr(approximate_kl, f"_{launch}_kernel")
        yield Variant(launch, kernel, launch, (), constants)


_VOCABULARY_SIZED = ("logits_ptr", "ref_logits_ptr", "d_logits_ptr")
_ALIGNED_INTEGERS = re.compile(r"V|stride_.*_[bt]")


def _argument_type(name: str, dtype: str) -> str:
    of_logits, *of_gradient = dtype.split(">")
    if name == "d_logits_ptr" and of_gradient:
        return f"*{of_gradient[0]}"
    if name in _VOCABULARY_SIZED:
        return f"*{of_logits}"
    if name.endswith("_ptr"):
        return {"tokens_ptr": "*i64", "mask_ptr": "*i1"}.get(name, "*fp32")
    return "i64" if name.endswith("_b") else "i32"


def compile_variant(variant: Variant, target: str, dtype: str):
    """The compiled kernel, with the launch that V = 128,256 gets."""
    pick = pick_row_launch(
        variant.launch, V, DTYPES[dtype.split(">")[0]].itemsize, interpreted=False
    )
    constants = {
        **variant.constants,
        **dict.fromkeys(variant.absent),
        "ACC": tl.float32,
        "UNROLL": pick.unroll,
        "LANES": pick.num_warps * TARGETS[target].warp_size,
        "VEC": pick.vector,
    }
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
            continue
        signature[name] = _argument_type(name, dtype)
        if name.endswith("_ptr") or _ALIGNED_INTEGERS.fullmatch(name):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, values, attributes)
    options = {"num_warps": pick.num_warps}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return compiled, pick.unroll * pick.vector


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code that loads from memory, per vocabulary entry of one thread."""

    instructions: float | None  # None: not counted, on AMD
    special: float | None
    narrowest_load: int
    widest_load: int
    barriers: int


@dataclass(frozen=True)
class Report:
    kernel: str
    target: str
    dtype: str
    registers: int
    stack_bytes: int
    spills: int
    loops: list[Loop]

    @property
    def main_loop(self) -> Loop:
        """The loop that walks whole tiles: the leanest; what is left runs once, under a mask."""
        return min(self.loops, key=lambda loop: loop.instructions or 0.0)


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


def _load_bytes(instruction: str) -> int:
    width = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", _operation(instruction))
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return sizes[width.group(1)] if width else 4


def _loops(sass: str, entries: int) -> list[Loop]:
    """Backward branches, and what lies between their target and them."""
    line = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
    code = [
        (int(found.group(1), 16), found.group(2))
        for found in map(line.match, sass.split("\n"))
        if found
    ]
    loops = []
    for address, instruction in code:
        branch = re.search(r"\bBRA\S*.*?0x([0-9a-f]+)", instruction)
        start = int(branch.group(1), 16) if branch else address
        if start >= address:
            continue
        body = [each for at, each in code if start <= at <= address]
        loads = [_load_bytes(each) for each in body if _operation(each).startswith("LDG")]
        if loads:
            loops.append(
                Loop(
                    instructions=len(body) / entries,
                    special=sum(_operation(each).startswith("MUFU") for each in body) / entries,
                    narrowest_load=min(loads),
                    widest_load=max(loads),
                    barriers=sum(_operation(each).startswith("BAR") for each in body),
                )
            )
    return loops


def _cuda_report(compiled, entries: int) -> dict:
    usage = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"],
        "spills": used["LOCAL"],
        "loops": _loops(_cuobjdump(compiled.asm["cubin"], "-sass"), entries),
    }


def _amd_report(compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    widths = {"dword": 4, "dwordx2": 8, "dwordx4": 16, "ushort": 2, "short_d16": 2}
    found = re.findall(r"(?:global|buffer)_load_(\w+)", text)
    loads = [widths.get(each, 4) for each in found]
    return {
        "registers": note("vgpr_count"),
        "stack_bytes": note("private_segment_fixed_size"),
        # A spilled scalar register moves to a lane of a vector register: no memory is touched.
        "spills": note("vgpr_spill_count"),
        "loops": [Loop(None, None, min(loads), max(loads), text.count("s_barrier"))],
    }


def report(variant: Variant, target: str, dtype: str) -> Report:
    compiled, entries = compile_variant(variant, target, dtype)
    found = _amd_report(compiled) if target == "gfx942" else _cuda_report(compiled, entries)
    return Report(kernel=variant.name, target=target, dtype=dtype, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every target and dtype")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    targets, dtypes = (TARGETS, LAYOUTS) if arguments.all else (("sm_90",), ("bf16",))
    reports = []
    print(f"{'kernel':52} {'target':7}{'dtype':6}{'regs':>5}{'spill':>6}  per entry, main loop")
    for variant in variants():
        for target in targets:
            for dtype in dtypes:
                each = report(variant, target, dtype)
                reports.append(each)
                loop = each.main_loop
                counts = "not counted".ljust(34)
                if loop.instructions is not None:
                    counts = f"{loop.instructions:6.2f} instructions {loop.special:5.2f} special "
                print(
                    f"{each.kernel:52} {target:7}{dtype:6}{each.registers:5}{each.spills:6}  "
                    f"{counts}{loop.widest_load:3}-byte loads",
                    flush=True,
                )
    if arguments.json:
        rows = [{**asdict(each), "main_loop": asdict(each.main_loop)} for each in reports]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
