"""Compile a variant, count its machine code and predict its time."""

from dataclasses import asdict, dataclass

from benchmarks.codegen import machine_code
from benchmarks.codegen.chips import CHIPS, PassCost, predict
from benchmarks.codegen.machine_code import Loop
from benchmarks.codegen.variants import DTYPES, N, V, Variant, compile_variant, variants


@dataclass(frozen=True)
class KernelReport:
    kernel: str
    target: str
    dtype: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    resident_programs: int | None  # per multiprocessor; None on AMD: not known
    loops: list[Loop]  # one per pass; empty on AMD
    load_bytes: list[int]  # the widths in use: in the loops, on AMD in the whole kernel
    prediction: dict | None  # for N = 8192 rows of V = 128,256


def report(variant: Variant, target: str, dtype: str) -> KernelReport:
    compiled = compile_variant(variant, target, dtype)
    shared_bytes = compiled.metadata.shared
    key = {"kernel": variant.name, "target": target, "dtype": dtype, "shared_bytes": shared_bytes}
    if target not in CHIPS:
        assembly = compiled.asm["amdgcn"]
        return KernelReport(
            **key,
            **asdict(machine_code.amd_usage(assembly)),
            resident_programs=None,
            loops=[],
            load_bytes=machine_code.amd_load_bytes(assembly),
            prediction=None,
        )

    cubin, config = compiled.asm["cubin"], variant.launch_config(target, dtype)
    logits_size, *_, grad_size = [DTYPES[name].itemsize for name in dtype.split(">")] * 2
    usage = machine_code.cuda_usage(cubin)
    loops = machine_code.cuda_loops(cubin, variant.passes, logits_size)
    resident = CHIPS[target].resident_programs(usage.registers, shared_bytes, config.num_warps)
    costs = [
        PassCost(
            loop.instructions,
            loop.special,
            read_bytes=row_pass.tensors * logits_size,
            written_bytes=grad_size if row_pass.writes else 0,
            loads_in_flight=sum(loop.load_bytes),
            again=row_pass.again,
        )
        for loop, row_pass in zip(loops, variant.passes, strict=True)
    ]
    prediction = predict(CHIPS[target], costs, resident, config.lanes, N, V)
    return KernelReport(
        **key,
        **asdict(usage),
        resident_programs=resident,
        loops=loops,
        load_bytes=sorted({width for loop in loops for width in loop.load_bytes}),
        prediction={**prediction._asdict(), "of_floor": prediction.of_floor},
    )


def report_by_name(case: tuple[str, str, str]) -> KernelReport:
    """Report on a (variant name, target, dtype); kernels themselves cannot be pickled."""
    name, target, dtype = case
    return report({variant.name: variant for variant in variants()}[name], target, dtype)
