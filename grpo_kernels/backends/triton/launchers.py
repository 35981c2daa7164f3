"""The row functions on Triton: allocate the outputs, choose a launch config, launch the kernels."""

import functools
import math
from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...objective.config import LossConfig
from ...objective.token_gradients import LossInputs, TokenGrads
from ..availability import INTERPRETED
from ..interface import ApproximateKL, RowInputs, RowStats, accumulation_dtype
from .approximate_kl import _approximate_kl_backward_kernel, _approximate_kl_forward_kernel
from .grpo_loss import _grpo_loss_kernel, _scale_kernel
from .launch_configs import RowLaunch, are_few, pick_row_launch
from .token_stats import (
    _token_stats_backward_kernel,
    _token_stats_forward_kernel,
    _token_stats_merge_kernel,
    _token_stats_part_kernel,
)

INTERPRETED_MULTIPROCESSORS = 2  # so that property tests have few rows, and not few


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """(compute capability, multiprocessors) of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _pick(kernel: str, logits: Tensor) -> RowLaunch:
    architecture = _device(logits.device.index)[0] if logits.is_cuda else None
    V, itemsize = logits.shape[-1], logits.element_size()
    return pick_row_launch(kernel, V, itemsize, architecture=architecture, interpreted=INTERPRETED)


def _parts(logits: Tensor, pick: RowLaunch) -> int:
    """Programs to a row of logits [B, T, V]."""
    B, T, V = logits.shape
    available = _device(logits.device.index)[1] if logits.is_cuda else INTERPRETED_MULTIPROCESSORS
    return pick.parts(V) if are_few(B * T, available) else 1


def _launch(
    kernel: Any, pick: RowLaunch, logits: Tensor, programs_per_row: int = 1, **arguments: Any
) -> None:
    """Run a kernel over the rows of logits [B, T, V]; no rows are no launch."""
    programs = logits.shape[0] * logits.shape[1] * programs_per_row
    if programs == 0:
        return
    tile = {"UNROLL": pick.unroll, "LANES": pick.lanes, "VEC": pick.vector}
    if kernel is _token_stats_merge_kernel:
        tile = {"LANES": pick.lanes}
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        kernel[(programs,)](
            **arguments,
            **tile,
            ACC_DTYPE=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            num_warps=pick.num_warps,
        )


def _row_arguments(rows: RowInputs) -> dict[str, Any]:
    """The arguments that every kernel over RowInputs takes, by name."""
    _, T, V = rows.logits.shape
    return {
        "logits_ptr": rows.logits,
        "temperature_ptr": rows.temperature,
        "mask_ptr": rows.mask,
        "T": T,
        "V": V,
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


def token_stats_forward(rows: RowInputs, *, entropy: bool) -> RowStats:
    """The statistics of every row."""
    logprob = rows.temperature.new_empty(rows.tokens.shape)
    row_lse = rows.temperature.new_empty((*rows.tokens.shape, 2))
    stats = RowStats(
        logprob,
        torch.empty_like(logprob) if entropy else None,
        torch.empty_like(logprob) if rows.kl else None,
        row_lse,
        torch.empty_like(row_lse) if rows.kl else None,
    )
    pick = _pick("token_stats_forward", rows.logits)
    parts = _parts(rows.logits, pick)
    common = {**_row_arguments(rows), "KL": rows.kl or "none"}
    reference = {"ref_logits_ptr": rows.ref_logits, **_strides(ref_logits=rows.ref_logits)}
    outputs = {"tokens_ptr": rows.tokens}
    outputs |= {f"{name}_ptr": x for name, x in stats._asdict().items()}
    if parts == 1:
        _launch(
            _token_stats_forward_kernel, pick, rows.logits, **common, **reference, **outputs,
            PART=pick.part,
        )  # fmt: skip
        return stats
    partials = logprob.new_empty((logprob.numel(), parts, 6, pick.lanes))
    common |= {"partials_ptr": partials, "parts": parts}
    _launch(
        _token_stats_part_kernel, pick, rows.logits, programs_per_row=parts, **common, **reference,
        HAS_ENTROPY=entropy, PART=pick.part,
    )  # fmt: skip
    _launch(_token_stats_merge_kernel, pick, rows.logits, **common, **outputs)
    return stats


def token_stats_backward(
    rows: RowInputs, stats: RowStats, grads: TokenGrads, d_logits: Tensor
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be rows.logits itself."""
    pick = _pick("token_stats_backward", rows.logits)
    parts = _parts(rows.logits, pick)
    # A kernel that gets no gradient of the KL, or of the entropy, is one that reads neither.
    has_kl, has_entropy = grads.kl is not None, grads.entropy is not None
    ref_logits = rows.ref_logits if has_kl else None
    _launch(
        _token_stats_backward_kernel,
        pick,
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
        d_logprob_ptr=grads.logprob,
        d_entropy_ptr=grads.entropy,
        d_kl_ptr=grads.kl,
        d_logits_ptr=d_logits,
        KL=rows.kl if has_kl else "none",
        PART=pick.part,
    )


def _settings(config: LossConfig, like: Tensor) -> Tensor:
    """What the kernel reads of a config, on the device and in the dtype of `like`."""
    floor, cap = config.importance_floor, config.importance_cap
    numbers = (
        *config.policy_term.kernel_form()[1:],
        config.beta,
        0.0 if floor is None else floor,
        math.inf if cap is None else cap,
        1.0 if config.importance_mode == "truncate" else 0.0,
    )
    return _on_device(numbers, like.dtype, like.device)


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: the copy waits for the device."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def grpo_loss(
    rows: RowInputs, loss_inputs: LossInputs, config: LossConfig, d_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of every row; the gradient of its loss goes to d_logits [B, T, V]."""
    logprob = rows.temperature.new_empty(rows.tokens.shape)
    entropy = torch.empty_like(logprob)
    _launch(
        _grpo_loss_kernel,
        _pick("grpo_loss", rows.logits),
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
        settings_ptr=_settings(config, rows.temperature),
        logprob_ptr=logprob,
        entropy_ptr=entropy,
        d_logits_ptr=d_logits,
        SURROGATE=config.policy_term.kernel_form().name,
        ESTIMATOR=config.kl_estimator,
    )
    return logprob, entropy


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x [B, T, V] by a number on its device, without reading it on the host."""
    _, T, V = x.shape
    _launch(
        _scale_kernel, _pick("scale", x), x, x_ptr=x, factor_ptr=factor, T=T, V=V, **_strides(x=x)
    )


def approximate_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float
) -> ApproximateKL:
    """The approximate KL of every row of [B, T, V]; mask [B, T]."""
    _, T, V = logits.shape
    total = logits.new_empty(mask.shape, dtype=accumulation_dtype(logits.dtype))
    row_lse = total.new_empty((*mask.shape, 2))
    kl = ApproximateKL(total, torch.empty_like(total), row_lse, torch.empty_like(row_lse))
    _launch(
        _approximate_kl_forward_kernel,
        _pick("approximate_kl_forward", logits),
        logits,
        logits_ptr=logits,
        ref_logits_ptr=ref_logits,
        mask_ptr=mask,
        T=T,
        V=V,
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
    _, T, V = logits.shape
    _launch(
        _approximate_kl_backward_kernel,
        _pick("approximate_kl_backward", logits),
        logits,
        logits_ptr=logits,
        ref_logits_ptr=ref_logits,
        mask_ptr=mask,
        weight_sum_ptr=kl.weight_sum,
        row_lse_ptr=kl.row_lse,
        ref_row_lse_ptr=kl.ref_row_lse,
        d_total_ptr=d_total,
        d_logits_ptr=d_logits,
        T=T,
        V=V,
        **_strides(logits=logits, ref_logits=ref_logits, d_logits=d_logits),
        LOG2_EPS=log2_eps,
    )
