"""Compile a variant, read its machine code and predict its time."""

from dataclasses import dataclass

from benchmarks.codegen.chips import CHIPS, PassCost, predict
from benchmarks.codegen.machine_code import Loop, read_amd, read_sass
from benchmarks.codegen.variants import DTYPES, N, V, compile_variant, variants
from grpo_kernels.backends.triton.launch_configs import looping_programs


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
    loops: list[Loop]
    load_bytes: list[int]
    prediction: dict | None  # for N = 8192 rows of V = 128,256; None without a pass over the rows


def make_report(case: tuple[str, str, str]) -> KernelReport:
    """Report on (variant name, target, dtype); a kernel itself cannot be sent to a process."""
    name, target, dtype = case
    variant = {variant.name: variant for variant in variants()}[name]
    compiled = compile_variant(variant, target, dtype)
    shared_bytes = compiled.metadata.shared
    resident = prediction = None
    if target not in CHIPS:
        code = read_amd(compiled.asm["amdgcn"])
    else:
        logits_size, *_, grad_size = [DTYPES[name].itemsize for name in dtype.split(">")] * 2
        code = read_sass(compiled.asm["cubin"], variant.passes, logits_size)
        chip, config = CHIPS[target], variant.launch_config(target, dtype)
        resident = chip.resident_programs(code.registers, shared_bytes, config.num_warps)
        programs = None
        if config.programs is not None:  # no more are launched
            resident = min(resident, config.programs)
            row_bytes = V * logits_size
            programs = resident * looping_programs(row_bytes, chip.multiprocessors, chip.l2_bytes)
        costs = [
            PassCost(
                loop.instructions,
                loop.special,
                read_bytes=row_pass.tensors * logits_size,
                written_bytes=grad_size if row_pass.writes else 0,
                loads_in_flight=sum(loop.load_bytes),
                again=row_pass.again,
            )
            for loop, row_pass in zip(code.loops, variant.passes, strict=True)
        ]
        if costs:
            predicted = predict(chip, costs, resident, config.lanes, N, V, programs)
            prediction = {**predicted._asdict(), "of_floor": predicted.of_floor}
    return KernelReport(
        kernel=name,
        target=target,
        dtype=dtype,
        shared_bytes=shared_bytes,
        resident_programs=resident,
        prediction=prediction,
        **vars(code),
    )
