"""The kernel variants that are launched in practice, and their offline compilation."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.codegen.chips import CHIPS
from grpo_kernels.backends.triton import approximate_kl, jsd, token_stats
from grpo_kernels.backends.triton import grpo_loss as grpo
from grpo_kernels.backends.triton.launch_configs import RowLaunch, pick_row_launch

N, V = 8192, 128_256  # rows, and the vocabulary of Llama 3
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
# "fp32>bf16": fp32 logits with a bf16 gradient, as the chunk loop of the LM head uses them.
LAYOUTS = ("bf16", "fp16", "fp32", "fp32>bf16")


class RowPass(NamedTuple):
    """One pass of a kernel over the rows."""

    tensors: int  # tensors of the size of the logits that it reads
    writes: bool
    again: bool = False  # an earlier pass of the same kernel read the same tensors


@dataclass(frozen=True)
class Variant:
    """One way to launch a kernel."""

    name: str
    kernel: Any
    launch: str  # name of its launch config
    passes: tuple[RowPass, ...]
    absent: tuple[str, ...] = ()  # pointer arguments that are None
    constexprs: dict[str, Any] = field(default_factory=dict)

    def launch_config(self, target: str, dtype: str) -> RowLaunch:
        """Return the launch config for V = 128,256."""
        return pick_row_launch(
            self.launch,
            V,
            DTYPES[dtype.split(">")[0]].itemsize,
            architecture=int(target[3:]) if target in CHIPS else None,
            interpreted=False,
        )


def variants() -> Iterator[Variant]:
    no_kl = ("ref_logits_ptr", "kl_ptr", "ref_row_lse_ptr", "d_kl_ptr")
    no_entropy = ("entropy_ptr", "d_entropy_ptr")
    no_sums = (
        "sum_sq_probs_ptr", "mean_logit_ptr", "num_entries_ptr",
        "d_sum_sq_probs_ptr", "d_mean_logit_ptr",
    )  # fmt: skip
    no_more = (*no_sums, "keys_ptr")
    for name, absent, kl, softcap in (
        ("log-prob", (*no_kl, *no_entropy, *no_more), "none", None),
        ("log-prob, entropy", (*no_kl, *no_more), "none", None),
        ("log-prob, entropy, softcap", (*no_kl, *no_more), "none", 30.0),
        ("log-prob, entropy, forward KL", no_more, "forward", None),
        ("log-prob, entropy, reverse KL", no_more, "reverse", None),
        ("log-prob, entropy, sums", (*no_kl, "keys_ptr"), "none", None),
        ("log-prob, entropy, top", (*no_kl, *no_sums), "none", None),
    ):
        tensors = 1 if kl == "none" else 2
        for kernel_name, launch in (
            ("token_stats_forward", "token_stats_forward"),
            ("token_stats_backward", "token_stats_backward"),
            ("token_stats_part", "token_stats_forward"),
        ):
            kernel = getattr(token_stats, f"_{kernel_name}_kernel")
            if name.endswith("top") and kernel_name == "token_stats_backward":
                continue  # no gradient
            constexprs = {"KL": kl, "SOFTCAP": softcap}
            if kernel_name == "token_stats_forward":
                constexprs["GROUP_PARTS"] = 4
            if kernel_name == "token_stats_part":
                constexprs["HAS_ENTROPY"] = "entropy_ptr" not in absent
                has_sums = name.endswith("sums")
                constexprs["HAS_SQUARES"] = constexprs["HAS_MEAN"] = has_sums
                constexprs["FIELDS"] = 9 if has_sums else 6
            yield Variant(
                f"{kernel_name}: {name}",
                kernel,
                launch,
                (RowPass(tensors, writes=launch == "token_stats_backward"),),
                tuple(pointer for pointer in absent if pointer in kernel.arg_names),
                constexprs,
            )

    for K, group_parts in ((8, 4), (64, 1)):
        yield Variant(
            f"top_entries: K = {K}",
            token_stats._top_entries_kernel,
            "top_entries",
            (),
            (),
            {"K": K, "K_BLOCK": K, "group_parts": group_parts, "SOFTCAP": None},
        )

    for name, absent, changes in (
        ("clip", ("entropy_weight_ptr", "ref_logprob_ptr", "sampling_logprob_ptr"), {}),
        ("k3, entropy, importance", (), {}),
        ("k3_corrected, entropy, softcap", (), {"ESTIMATOR": "k3_corrected", "SOFTCAP": 30.0}),
        ("SAPO, k3, entropy, importance", (), {"SURROGATE": "sapo"}),
        ("DPPO, k3, entropy, importance", (), {"SURROGATE": "dppo"}),
        ("CISPO, k3, entropy, importance", (), {"SURROGATE": "score"}),
        ("IPO, k3, entropy", ("sampling_logprob_ptr",), {"SURROGATE": "ipo"}),
        ("TOPR, k3, entropy, importance, nll", (), {"SURROGATE": "topr"}),
        ("DPPO-KL, k3, entropy, importance", (), {"SURROGATE": "dppo_kl"}),
        ("DRO, k3, entropy, importance", (), {"SURROGATE": "dro"}),
        ("rollout_is, k3, entropy, importance", (), {"SURROGATE": "rollout_is"}),
    ):
        yield Variant(
            f"grpo_loss: {name}",
            grpo._grpo_loss_kernel,
            "grpo_loss",
            (RowPass(1, writes=False), RowPass(1, writes=True, again=True)),
            absent if name.endswith("nll") else ("nll_weight_ptr", *absent),
            {"SURROGATE": "clip", "ESTIMATOR": "k3", "SOFTCAP": None, **changes},
        )
    yield Variant("scale", grpo._scale_kernel, "scale", (RowPass(1, writes=True),))

    for name, kernel, passes in (
        (
            "approximate_kl_forward",
            approximate_kl._approximate_kl_forward_kernel,
            (RowPass(2, writes=False), RowPass(2, writes=False, again=True)),
        ),
        (
            "approximate_kl_backward",
            approximate_kl._approximate_kl_backward_kernel,
            (RowPass(2, writes=True),),
        ),
    ):
        yield Variant(name, kernel, name, passes, (), {"LOG2_EPS": -19.93})

    for name, softcap in (("", None), (": softcap", 30.0)):
        for kernel, function, writes in (
            ("jsd_forward", jsd._jsd_forward_kernel, False),
            ("jsd_backward", jsd._jsd_backward_kernel, True),
        ):
            passes = (RowPass(2, writes=writes),)
            yield Variant(kernel + name, function, kernel, passes, (), {"SOFTCAP": softcap})


def argument_type(name: str, dtype: str) -> str:
    """Return Triton's type of a kernel argument that is not a constexpr."""
    logits_dtype, *_, grad_dtype = dtype.split(">") * 2
    if name in ("logits_ptr", "ref_logits_ptr", "x_ptr"):
        return f"*{logits_dtype}"
    if name == "d_logits_ptr":
        return f"*{grad_dtype}"
    if name in ("tokens_ptr", "keys_ptr", "top_ids_ptr"):
        return "*i64"
    if name in ("mask_ptr", "is_top1_ptr"):
        return "*i1"
    if name.endswith("_ptr"):
        return "*fp64" if dtype == "fp64" else "*fp32"
    return "i64" if name.endswith("_b") else "i32"


def compile_variant(variant: Variant, target: str, dtype: str, alignment: str = "vector"):
    """Compile a variant with its launch config for V = 128,256; needs no GPU.

    alignment: of the rows, as in backends/triton/row_access.py; V is odd for another than "vector".
    """
    config = variant.launch_config(target, dtype)
    lanes = config.num_warps * TARGETS[target].warp_size
    constexprs = {
        **variant.constexprs,
        **dict.fromkeys(variant.absent),
        "ACC_DTYPE": tl.float64 if dtype == "fp64" else tl.float32,
        "UNROLL": config.unroll,
        "LANES": lanes,
        "VEC": config.vector,
        "PART": config.part_tiles * config.unroll * lanes * config.vector,
        "ALIGNMENT": alignment,
    }
    if "group_parts" in constexprs:  # a kernel that reads what another has stored
        stored = pick_row_launch(
            "token_stats_forward", V, DTYPES[dtype.split(">")[0]].itemsize, architecture=None,
            interpreted=False,
        )  # fmt: skip
        span = constexprs.pop("group_parts") * stored.part
        groups = -(-V // span) * stored.lanes
        constexprs |= {
            "SPAN": span, "LANES": stored.lanes, "GROUP_BLOCK": triton.next_power_of_2(groups)
        }  # fmt: skip
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in constexprs:
            signature[name], values[(position,)] = "constexpr", constexprs[name]
            continue
        signature[name] = argument_type(name, dtype)
        # Triton specialises a launch on pointers and on a V that are multiples of 16.
        if name.endswith("_ptr") or (name == "V" and alignment == "vector"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, values, attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": config.num_warps})
