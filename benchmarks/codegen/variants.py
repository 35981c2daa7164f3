"""The ways in which the kernels are launched, and how one of them is compiled without a GPU."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_kernels.backends.triton import approximate_kl, token_stats
from grpo_kernels.backends.triton import grpo_loss as grpo
from grpo_kernels.backends.triton.launch_configs import RowLaunch, pick_row_launch

from .chips import CHIPS

N, V = 8192, 128_256  # Llama 3
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# Of the logits, and of their gradient where it is another: the last is the hidden level's.
LAYOUTS = ("bf16", "fp16", "fp32", "fp32>bf16")


class Reading(NamedTuple):
    """A walk of the source: how many tensors it reads, and whether it read them before."""

    tensors: int
    writes: bool
    again: bool = False


@dataclass(frozen=True)
class Variant:
    """One way to launch a kernel: the arguments that are None, and its own loss_inputs."""

    name: str
    kernel: object
    launch: str
    walks: tuple[Reading, ...]
    absent: tuple[str, ...] = ()
    loss_inputs: dict = field(default_factory=dict)


def _token_stats_variants() -> Iterator[Variant]:
    no_kl = ("ref_logits_ptr", "kl_ptr", "ref_row_lse_ptr", "d_kl_ptr")
    no_entropy = ("entropy_ptr", "d_entropy_ptr")
    plain = {"KL": "none", "SOFTCAP": None}
    for name, absent, loss_inputs in (
        ("log-prob", (*no_kl, *no_entropy), plain),
        ("log-prob, entropy", no_kl, plain),
        ("log-prob, entropy, softcap", no_kl, {**plain, "SOFTCAP": 30.0}),
        ("log-prob, entropy, forward KL", (), {**plain, "KL": "forward"}),
        ("log-prob, entropy, reverse KL", (), {**plain, "KL": "reverse"}),
    ):
        tensors = 1 if loss_inputs["KL"] == "none" else 2
        for launch in ("token_stats_forward", "token_stats_backward"):
            kernel = getattr(token_stats, f"_{launch}_kernel")
            known = tuple(each for each in absent if each in kernel.arg_names)
            walks = (Reading(tensors, writes=launch.endswith("backward")),)
            yield Variant(f"{launch}: {name}", kernel, launch, walks, known, loss_inputs)
        kernel = token_stats._token_stats_part_kernel
        known = tuple(each for each in absent if each in kernel.arg_names)
        loss_inputs = {**loss_inputs, "HAS_ENTROPY": "entropy_ptr" not in absent}
        walks = (Reading(tensors, writes=False),)
        name = f"token_stats_part: {name}"
        yield Variant(name, kernel, "token_stats_forward", walks, known, loss_inputs)


def _grpo_loss_variants() -> Iterator[Variant]:
    walks = (Reading(1, writes=False), Reading(1, writes=True, again=True))
    for name, absent, loss_inputs in (
        ("clip", ("entropy_weight_ptr", "ref_ptr", "sampling_ptr"), {}),
        ("k3, entropy, importance", (), {}),
        ("k3_corrected, entropy, softcap", (), {"ESTIMATOR": "k3_corrected", "SOFTCAP": 30.0}),
        ("SAPO, k3, entropy, importance", (), {"SURROGATE": "sapo"}),
        ("DPPO, k3, entropy, importance", (), {"SURROGATE": "dppo"}),
        ("CISPO, k3, entropy, importance", (), {"SURROGATE": "score"}),
    ):
        loss_inputs = {"SURROGATE": "clip", "ESTIMATOR": "k3", "SOFTCAP": None, **loss_inputs}
        yield Variant(
            f"grpo_loss: {name}", grpo._grpo_loss_kernel, "grpo_loss", walks, absent, loss_inputs
        )
    yield Variant("scale", grpo._scale_kernel, "scale", (Reading(1, writes=True),))


def variants() -> Iterator[Variant]:
    yield from _token_stats_variants()
    yield from _grpo_loss_variants()
    loss_inputs = {"LOG2_EPS": -19.93}
    walks = {
        "approximate_kl_forward": (Reading(2, writes=False), Reading(2, writes=False, again=True)),
        "approximate_kl_backward": (Reading(2, writes=True),),
    }
    for launch, of_kernel in walks.items():
        kernel = getattr(approximate_kl, f"_{launch}_kernel")
        yield Variant(launch, kernel, launch, of_kernel, (), loss_inputs)


ACC_DTYPE = (tl.float32, tl.float64)  # fp64 is accumulated as such
_VOCABULARY_SIZED = ("logits_ptr", "ref_logits_ptr", "d_logits_ptr", "x_ptr")
_ALIGNED_INTEGERS = re.compile(r"V|stride_.*_[bt]")


def _argument_type(name: str, dtype: str) -> str:
    of_logits, *of_gradient = dtype.split(">")
    if name == "d_logits_ptr" and of_gradient:
        return f"*{of_gradient[0]}"
    if name in _VOCABULARY_SIZED:
        return f"*{of_logits}"
    if name.endswith("_ptr"):
        return {"tokens_ptr": "*i64", "mask_ptr": "*i1"}.get(
            name, "*fp64" if dtype == "fp64" else "*fp32"
        )
    return "i64" if name.endswith("_b") else "i32"


def launch_of(variant: Variant, target: str, dtype: str) -> RowLaunch:
    itemsize = DTYPES[dtype.split(">")[0]].itemsize
    architecture = int(target[3:]) if target in CHIPS else None
    return pick_row_launch(
        variant.launch, V, itemsize, architecture=architecture, interpreted=False
    )


def compile_variant(variant: Variant, target: str, dtype: str):
    """The compiled kernel, with the launch that V = 128,256 gets."""
    pick = launch_of(variant, target, dtype)
    wave = TARGETS[target].warp_size
    sizes = {"UNROLL": pick.unroll, "LANES": pick.num_warps * wave, "VEC": pick.vector}
    sizes["PART"] = pick.part_tiles * pick.unroll * pick.num_warps * wave * pick.vector
    loss_inputs = {
        **variant.loss_inputs,
        **dict.fromkeys(variant.absent),
        "ACC_DTYPE": ACC_DTYPE[dtype == "fp64"],
        **sizes,
    }
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in loss_inputs:
            signature[name], values[(position,)] = "constexpr", loss_inputs[name]
            continue
        signature[name] = _argument_type(name, dtype)
        if name.endswith("_ptr") or _ALIGNED_INTEGERS.fullmatch(name):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, values, attributes)
    options = {"num_warps": pick.num_warps}
    return triton.compile(source, target=TARGETS[target], options=options)
