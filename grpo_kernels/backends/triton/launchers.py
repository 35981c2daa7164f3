"""The row functions on Triton: allocate the outputs, choose a launch config, launch the kernels."""

import functools
import itertools
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...objective.config import LossConfig
from ...objective.ratios import LossInputs
from ...objective.token_gradients import TokenGrads
from ..availability import INTERPRETED
from ..interface import (
    ApproximateKL,
    RowInputs,
    RowStats,
    StatsRequest,
    accumulation_dtype,
    scalar_tensor,
)
from ..pytorch.softmax import LN2, LOG2E, capped_logits
from .approximate_kl import _approximate_kl_backward_kernel, _approximate_kl_forward_kernel
from .grpo_loss import _grpo_loss_kernel, _scale_kernel
from .jsd import _jsd_backward_kernel, _jsd_forward_kernel
from .launch_configs import (
    ROWS_PER_MULTIPROCESSOR,
    RowLaunch,
    looping_programs,
    pick_row_launch,
)
from .token_stats import (
    _token_stats_backward_kernel,
    _token_stats_forward_kernel,
    _token_stats_merge_kernel,
    _token_stats_part_kernel,
    _top_entries_kernel,
)

# Of the kernel that takes the K largest logits: what it holds in registers.
MAX_TOP = 64
MAX_GROUPS = 8192
SORT_BYTES = 64 << 20
INTERPRETED_MULTIPROCESSORS = 2  # property tests then have rows that are split, and are not


@functools.cache
def _gpu(index: int) -> tuple[int, int, int]:
    """(compute capability, multiprocessors, bytes of the L2) of a GPU."""
    gpu = torch.cuda.get_device_properties(index)
    return 10 * gpu.major + gpu.minor, gpu.multi_processor_count, gpu.L2_cache_size


def _launch_config(kernel: str, logits: Tensor) -> RowLaunch:
    architecture = _gpu(logits.device.index)[0] if logits.is_cuda else None
    V, itemsize = logits.shape[-1], logits.element_size()
    return pick_row_launch(kernel, V, itemsize, architecture=architecture, interpreted=INTERPRETED)


def _parts(logits: Tensor, launch: RowLaunch) -> int:
    """Programs to a row of logits [B, T, V]: 1, unless the rows are too few to fill the device."""
    B, T, V = logits.shape
    few = B * T < ROWS_PER_MULTIPROCESSOR * _multiprocessors(logits)
    return launch.parts(V) if few else 1


def _multiprocessors(logits: Tensor) -> int:
    return _gpu(logits.device.index)[1] if logits.is_cuda else INTERPRETED_MULTIPROCESSORS


def _launch(
    kernel: Any, launch: RowLaunch, logits: Tensor, programs_per_row: int = 1, **arguments: Any
) -> None:
    """Run a kernel over the rows of logits [B, T, V]; without rows nothing is launched."""
    B, T, V = logits.shape
    programs = B * T * programs_per_row
    if launch.programs is not None:  # each loops over rows
        l2_bytes = _gpu(logits.device.index)[2] if logits.is_cuda else 0
        row_bytes = V * logits.element_size()
        looping = looping_programs(row_bytes, _multiprocessors(logits), l2_bytes)
        programs = min(programs, launch.programs * looping)
    if programs == 0:
        return
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        kernel[(programs,)](
            **arguments,
            T=T,
            V=V,
            ACC_DTYPE=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            num_warps=launch.num_warps,
        )


def _alignment(launch: RowLaunch, *tensors: Tensor | None) -> str:
    """ALIGNMENT of row_access.py for the rows of tensors [B, T, V]; None is left out."""
    starts = {
        (
            x.data_ptr() // x.element_size() % launch.vector,
            x.stride(0) % launch.vector,
            x.stride(1) % launch.vector,
        )
        for x in tensors
        if x is not None
    }
    if starts == {(0, 0, 0)}:
        return "vector"
    return "equal" if len(starts) == 1 else "any"


def _row_arguments(rows: RowInputs) -> dict[str, Any]:
    """The arguments that every kernel over RowInputs takes, by name."""
    return {
        "logits_ptr": rows.logits,
        "temperature_ptr": rows.temperature,
        "mask_ptr": rows.mask,
        **_strides(logits=rows.logits),
        "stride_temperature": rows.temperature.stride(-1),
        "SOFTCAP": rows.softcap,
    }


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """The row strides of tensors [B, T, V] as kernel arguments; 0 for None."""
    return {
        f"stride_{name}_{dim}": 0 if x is None else x.stride(axis)
        for name, x in tensors.items()
        for axis, dim in enumerate("bt")
    }


def token_stats_forward(rows: RowInputs, request: StatsRequest) -> RowStats:
    """The statistics of every row."""
    stats = RowStats.allocate(rows.temperature, request, kl=rows.kl is not None)
    launch = _launch_config("token_stats_forward", rows.logits)
    parts = _parts(rows.logits, launch)
    top = plan_top_entries(rows.logits, launch, request, split=parts > 1)
    common = {**_row_arguments(rows), "KL": rows.kl or "none"}
    inputs = {
        "ref_logits_ptr": rows.ref_logits,
        **_strides(ref_logits=rows.ref_logits),
        **launch.tile,
        "ALIGNMENT": _alignment(launch, rows.logits, rows.ref_logits),
        "PART": launch.part,
        "keys_ptr": top.keys,
    }
    outputs = {
        "tokens_ptr": rows.tokens,
        "logprob_ptr": stats.logprob,
        "entropy_ptr": stats.entropy,
        "kl_ptr": stats.kl,
        "row_lse_ptr": stats.row_lse,
        "ref_row_lse_ptr": stats.ref_row_lse,
        "sum_sq_probs_ptr": stats.sum_sq_probs,
        "mean_logit_ptr": stats.mean_logit,
        "num_entries_ptr": stats.num_entries,
    }
    if parts == 1:
        kernel = _token_stats_forward_kernel
        arguments = {**common, **inputs, **outputs, "GROUP_PARTS": top.group_parts}
        _launch(kernel, launch, rows.logits, **arguments)
    else:
        fields = 6 + request.sum_sq_probs + 2 * request.mean_logit
        shape = (rows.tokens.numel(), parts, fields, launch.lanes)
        common["partials_ptr"] = stats.row_lse.new_empty(shape)
        common |= {"parts": parts, "FIELDS": fields}
        arguments = {
            **common,
            **inputs,
            "HAS_ENTROPY": request.entropy,
            "HAS_SQUARES": request.sum_sq_probs,
            "HAS_MEAN": request.mean_logit,
        }
        kernel = _token_stats_part_kernel
        _launch(kernel, launch, rows.logits, programs_per_row=parts, **arguments)
        kernel = _token_stats_merge_kernel
        _launch(kernel, launch, rows.logits, **common, **outputs, LANES=launch.lanes)
    if top.keys is not None:
        _launch(
            _top_entries_kernel,
            _launch_config("top_entries", rows.logits),
            rows.logits,
            **_row_arguments(rows),
            tokens_ptr=rows.tokens,
            row_lse_ptr=stats.row_lse,
            keys_ptr=top.keys,
            is_top1_ptr=stats.is_top1,
            top_logprobs_ptr=stats.top_logprobs,
            top_ids_ptr=stats.top_ids,
            groups=top.keys.shape[1],
            K=top.K,
            K_BLOCK=triton.next_power_of_2(top.K),
            GROUP_BLOCK=triton.next_power_of_2(top.keys.shape[1]),
            SPAN=top.group_parts * launch.part,
            LANES=launch.lanes,
            VEC=launch.vector,
        )
    elif top.K > 0:
        _sort_top_entries(rows, stats, top.K)
    return stats


class TopEntries(NamedTuple):
    """How the K largest logits of rows are found."""

    K: int
    keys: Tensor | None  # [N, groups], int64, scratch of the kernels; None: by sorting
    group_parts: int  # parts of a row whose keys are one group


def plan_top_entries(
    logits: Tensor, launch: RowLaunch, request: StatsRequest, *, split: bool
) -> TopEntries:
    """Choose how to find the K largest logits. The result is the same for every choice.

    A group of several parts makes fewer keys: 4 KiB a row of 128,256 in bf16 with four parts,
    16 with one. The second kernel holds the entries of K groups at once.
    """
    K = max(request.top_logprobs, int(request.is_top1))
    group_parts = 1
    if not split:  # a power of two
        group_parts = next((parts for parts in (4, 2) if parts * K <= MAX_TOP), 1)
    groups = launch.lanes * -(-logits.shape[-1] // (group_parts * launch.part))
    if K == 0 or K > MAX_TOP or groups > MAX_GROUPS or logits.dtype == torch.float64:
        return TopEntries(K, None, group_parts)
    rows = logits.shape[0] * logits.shape[1]
    keys = torch.empty((rows, groups), dtype=torch.int64, device=logits.device)
    return TopEntries(K, keys, group_parts)


def _sort_top_entries(rows: RowInputs, stats: RowStats, K: int) -> None:
    """Find the K largest logits by sorting blocks of rows: a second pass, for any K and dtype.

    It does not wait for the device, and reads the masked rows too, to no effect.
    """
    B, T, V = rows.logits.shape
    size = max(1, SORT_BYTES // (24 * V))  # values and ids, twice
    for b, start in itertools.product(range(B), range(0, T, size)):
        block = b, slice(start, start + size)
        logits = rows.logits[block]
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[..., :K]
        x = logits.gather(-1, ids).to(rows.temperature.dtype)
        pivot, log_sum = stats.row_lse[block].split(1, dim=-1)
        scale = LOG2E / rows.temperature[block].unsqueeze(-1)
        logprobs = ((capped_logits(x, rows.softcap, out=x) - pivot) * scale - log_sum) * LN2
        if rows.mask is not None:
            is_masked = ~rows.mask[block].unsqueeze(-1)
            ids, logprobs = ids.masked_fill(is_masked, 0), logprobs.masked_fill(is_masked, 0.0)
        if stats.is_top1 is not None:
            is_largest = (ids[..., 0] == rows.tokens[block]) & (logprobs[..., 0] > -torch.inf)
            if rows.mask is not None:
                is_largest &= rows.mask[block]
            stats.is_top1[block] = is_largest
        if stats.top_logprobs is not None and stats.top_ids is not None:
            stats.top_logprobs[block], stats.top_ids[block] = logprobs, ids


def token_stats_backward(
    rows: RowInputs, stats: RowStats, grads: TokenGrads, d_logits: Tensor
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be rows.logits itself."""
    launch = _launch_config("token_stats_backward", rows.logits)
    parts = _parts(rows.logits, launch)
    # A kernel that gets no gradient of the KL, or of the entropy, is one that reads neither.
    has_kl, has_entropy = grads.kl is not None, grads.entropy is not None
    ref_logits = rows.ref_logits if has_kl else None
    _launch(
        _token_stats_backward_kernel,
        launch,
        rows.logits,
        programs_per_row=parts,
        **_row_arguments(rows),
        **_strides(ref_logits=ref_logits, d_logits=d_logits),
        parts=parts,
        tokens_ptr=rows.tokens,
        ref_logits_ptr=ref_logits,
        row_lse_ptr=stats.row_lse,
        ref_row_lse_ptr=stats.ref_row_lse if has_kl else None,
        entropy_ptr=stats.entropy if has_entropy else None,
        kl_ptr=stats.kl if has_kl else None,
        sum_sq_probs_ptr=None if grads.sum_sq_probs is None else stats.sum_sq_probs,
        num_entries_ptr=None if grads.mean_logit is None else stats.num_entries,
        d_logprob_ptr=grads.logprob,
        d_entropy_ptr=grads.entropy,
        d_kl_ptr=grads.kl,
        d_sum_sq_probs_ptr=grads.sum_sq_probs,
        d_mean_logit_ptr=grads.mean_logit,
        d_logits_ptr=d_logits,
        KL=rows.kl if has_kl else "none",
        **launch.tile,
        ALIGNMENT=_alignment(launch, rows.logits, ref_logits, d_logits),
        PART=launch.part,
    )


@functools.lru_cache(maxsize=256)  # the copy to the device waits for it
def _settings(config: LossConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of a config that the kernel reads."""
    floor, cap = config.importance_floor, config.importance_cap
    numbers = (
        *config.policy_term.kernel_form()[1:],
        config.beta,
        0.0 if floor is None else floor,
        math.inf if cap is None else cap,
        1.0 if config.importance_mode == "truncate" else 0.0,
    )
    return torch.tensor(numbers, dtype=dtype, device=device)


def grpo_loss(
    rows: RowInputs, loss_inputs: LossInputs, config: LossConfig, d_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of every row; the gradient of its loss goes to d_logits [B, T, V]."""
    logprob = rows.temperature.new_empty(rows.tokens.shape)
    entropy = torch.empty_like(logprob)
    launch = _launch_config("grpo_loss", rows.logits)
    _launch(
        _grpo_loss_kernel,
        launch,
        rows.logits,
        **_row_arguments(rows),
        **_strides(d_logits=d_logits),
        tokens_ptr=rows.tokens,
        advantage_ptr=loss_inputs.advantage,
        weight_ptr=loss_inputs.weight,
        entropy_weight_ptr=loss_inputs.entropy_weight,
        old_logprob_ptr=loss_inputs.old_logprob,
        ref_logprob_ptr=loss_inputs.ref_logprob if config.beta != 0 else None,
        sampling_logprob_ptr=loss_inputs.sampling_logprob,
        nll_weight_ptr=loss_inputs.nll_weight,
        settings_ptr=_settings(config, logprob.dtype, logprob.device),
        logprob_ptr=logprob,
        entropy_ptr=entropy,
        d_logits_ptr=d_logits,
        rows=rows.tokens.numel(),
        **launch.tile,
        ALIGNMENT=_alignment(launch, rows.logits, d_logits),
        SURROGATE=config.policy_term.kernel_form().name,
        ESTIMATOR=config.kl_estimator,
    )
    return logprob, entropy


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x [B, T, V] by a number on its device, without reading it on the host."""
    launch = _launch_config("scale", x)
    _launch(
        _scale_kernel,
        launch,
        x,
        x_ptr=x,
        factor_ptr=factor,
        **_strides(x=x),
        **launch.tile,
        ALIGNMENT=_alignment(launch, x),
    )


def approximate_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float
) -> ApproximateKL:
    """The approximate KL of every row of [B, T, V]; mask [B, T]."""
    total = logits.new_empty(mask.shape, dtype=accumulation_dtype(logits.dtype))
    row_lse = total.new_empty((*mask.shape, 2))
    kl = ApproximateKL(total, torch.empty_like(total), row_lse, torch.empty_like(row_lse))
    launch = _launch_config("approximate_kl_forward", logits)
    _launch(
        _approximate_kl_forward_kernel,
        launch,
        logits,
        logits_ptr=logits,
        ref_logits_ptr=ref_logits,
        mask_ptr=mask,
        **launch.tile,
        ALIGNMENT=_alignment(launch, logits, ref_logits),
        **_strides(logits=logits, ref_logits=ref_logits),
        **{f"{name}_ptr": x for name, x in kl._asdict().items()},
        LOG2_EPS=log2_eps,
    )
    return kl


def approximate_kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    kl: ApproximateKL,
    d_total: Tensor,
    log2_eps: float,
    d_logits: Tensor,
) -> None:
    """Write the gradient of every row to d_logits [B, T, V]."""
    launch = _launch_config("approximate_kl_backward", logits)
    _launch(
        _approximate_kl_backward_kernel,
        launch,
        logits,
        logits_ptr=logits,
        ref_logits_ptr=ref_logits,
        mask_ptr=mask,
        weight_sum_ptr=kl.weight_sum,
        row_lse_ptr=kl.row_lse,
        ref_row_lse_ptr=kl.ref_row_lse,
        d_total_ptr=d_total,
        d_logits_ptr=d_logits,
        **launch.tile,
        ALIGNMENT=_alignment(launch, logits, ref_logits, d_logits),
        **_strides(logits=logits, ref_logits=ref_logits, d_logits=d_logits),
        LOG2_EPS=log2_eps,
    )


def jsd_forward(rows: RowInputs, stats: RowStats, jsd_weight: float) -> tuple[Tensor, Tensor]:
    """(jsd, KL(p‖m)) of every row, [B, T]; stats: row_lse and ref_row_lse of whole rows."""
    jsd = rows.temperature.new_empty(rows.tokens.shape)
    kl_policy = torch.empty_like(jsd)
    launch = _launch_config("jsd_forward", rows.logits)
    _launch(
        _jsd_forward_kernel,
        launch,
        rows.logits,
        **_row_arguments(rows),
        **_strides(ref_logits=rows.ref_logits),
        ref_logits_ptr=rows.ref_logits,
        row_lse_ptr=stats.row_lse,
        ref_row_lse_ptr=stats.ref_row_lse,
        jsd_ptr=jsd,
        kl_policy_ptr=kl_policy,
        weight_ptr=scalar_tensor(jsd_weight, stats.row_lse.dtype, stats.row_lse.device),
        **launch.tile,
        ALIGNMENT=_alignment(launch, rows.logits, rows.ref_logits),
    )
    return jsd, kl_policy


def jsd_backward(
    rows: RowInputs,
    stats: RowStats,
    kl_policy: Tensor,
    d_jsd: Tensor,
    jsd_weight: float,
    d_logits: Tensor,
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be rows.logits itself."""
    launch = _launch_config("jsd_backward", rows.logits)
    _launch(
        _jsd_backward_kernel,
        launch,
        rows.logits,
        **_row_arguments(rows),
        **_strides(ref_logits=rows.ref_logits, d_logits=d_logits),
        ref_logits_ptr=rows.ref_logits,
        row_lse_ptr=stats.row_lse,
        ref_row_lse_ptr=stats.ref_row_lse,
        kl_policy_ptr=kl_policy,
        d_jsd_ptr=d_jsd,
        d_logits_ptr=d_logits,
        weight_ptr=scalar_tensor(jsd_weight, stats.row_lse.dtype, stats.row_lse.device),
        **launch.tile,
        ALIGNMENT=_alignment(launch, rows.logits, rows.ref_logits, d_logits),
    )
