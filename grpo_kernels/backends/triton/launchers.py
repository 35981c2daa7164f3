"""Host side of the kernels: outputs, strides and grids, behind the same functions as eager/."""

import functools
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from ...objective.surrogates import two_sided_cap
from .approximate_kl import _approximate_kl_backward_kernel, _approximate_kl_forward_kernel
from .grpo_loss import _grpo_loss_kernel, _scale_kernel
from .launch_configs import RowLaunch, are_few, pick_row_launch
from .token_stats import (
    _token_stats_backward_kernel,
    _token_stats_forward_kernel,
    _token_stats_merge_kernel,
    _token_stats_part_kernel,
)

if TYPE_CHECKING:
    from ...objective.config import LossConfig
    from ...objective.token_gradients import LossInputs

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
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
    kernel, pick: RowLaunch, logits: Tensor, acc: torch.dtype, *arguments, parts=1, **loss_inputs
) -> None:
    """`parts` programs per row of logits [B, T, V], none if there are none."""
    programs = logits.shape[0] * logits.shape[1] * parts
    if programs == 0:
        return
    sizes = {"UNROLL": pick.unroll, "LANES": pick.lanes, "VEC": pick.vector, "PART": pick.part}
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        kernel[(programs,)](
            *arguments,
            **loss_inputs,
            ACC_DTYPE=tl.float64 if acc == torch.float64 else tl.float32,
            **{name: size for name, size in sizes.items() if name in kernel.arg_names},
            num_warps=pick.num_warps,
        )


def _row_strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def token_stats_forward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    softcap: float | None,
    entropy: bool,
    kl: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(logprob, entropy, kl, row_lse, ref_row_lse) of every row of logits [B, T, V].

    temperature is [B, T] in the accumulation dtype; a row_lse [B, T, 2] is (pivot, log_sum).
    """
    logprob = temperature.new_empty(tokens.shape)
    row_lse = temperature.new_empty((*tokens.shape, 2))
    outputs = (
        logprob,
        torch.empty_like(logprob) if entropy else None,
        torch.empty_like(logprob) if kl else None,
        row_lse,
        torch.empty_like(row_lse) if kl else None,
    )
    (_, T, V), pick = logits.shape, _pick("token_stats_forward", logits)
    parts, acc = _parts(logits, pick), temperature.dtype
    model = {"KL": kl or "none", "SOFTCAP": softcap}
    strides, by_temperature = _row_strides(logits), temperature.stride(-1)
    of_rows = (*strides, *_row_strides(ref_logits), by_temperature)
    if parts == 1:
        _launch(
            _token_stats_forward_kernel, pick, logits, acc,
            logits, ref_logits, tokens, temperature, mask, *outputs, T, V, *of_rows, **model,
        )  # fmt: skip
        return outputs
    partials = temperature.new_empty((tokens.numel(), parts, 6, pick.lanes))
    _launch(
        _token_stats_part_kernel, pick, logits, acc,
        logits, ref_logits, temperature, mask, partials, T, V, parts, *of_rows,
        parts=parts, HAS_ENTROPY=entropy, **model,
    )  # fmt: skip
    _launch(
        _token_stats_merge_kernel, pick, logits, acc,
        logits, tokens, temperature, mask, partials, *outputs, T, V, parts, *strides,
        by_temperature, **model,
    )  # fmt: skip
    return outputs


def token_stats_backward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    row_lse: Tensor,
    ref_row_lse: Tensor | None,
    entropy_value: Tensor | None,
    kl_value: Tensor | None,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    softcap: float | None,
    kl: str | None,
    d_logits: Tensor,
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be logits itself."""
    pick = _pick("token_stats_backward", logits)
    parts = _parts(logits, pick)
    _launch(
        _token_stats_backward_kernel,
        pick,
        logits,
        temperature.dtype,
        logits,
        ref_logits,
        tokens,
        temperature,
        mask,
        row_lse,
        ref_row_lse,
        entropy_value,
        kl_value,
        d_logprob,
        d_entropy,
        d_kl,
        d_logits,
        *logits.shape[1:],
        parts,
        *_row_strides(logits),
        *_row_strides(ref_logits),
        *_row_strides(d_logits),
        temperature.stride(-1),
        parts=parts,
        KL=kl or "none",
        SOFTCAP=softcap,
    )


# The kernel's form of each surrogate, and what its two bounds and its cap are.
_KERNEL_FORMS: dict[str, tuple[str, Callable[["LossConfig"], tuple[float, float, float]]]] = {
    "clip": ("clip", lambda c: (1 - c.epsilon_low, 1 + c.epsilon_high, two_sided_cap(c))),
    "ratio": ("clip", lambda c: (-math.inf, math.inf, math.inf)),
    "sapo": ("sapo", lambda c: (c.tau_negative, c.tau_positive, 0.0)),
    "cispo": ("score", lambda c: (0.0, 0.0, c.ratio_cap)),
    "reinforce": ("score", lambda c: (1.0, 0.0, 1.0)),
    "dppo": ("dppo", lambda c: (-c.epsilon_low, c.epsilon_high, c.ratio_cap)),
}


def _settings(config: "LossConfig", like: Tensor) -> Tensor:
    """What the kernel reads of a config, on the device and in the dtype of `like`."""
    floor, cap = config.importance_floor, config.importance_cap
    numbers = (
        *_KERNEL_FORMS[config.surrogate][1](config),
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
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    loss_inputs: "LossInputs",
    config: "LossConfig",
    d_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of every row of logits [B, T, V], and its loss's gradient to d_logits.

    d_logits [B, T, V] may be logits itself; the loss_inputs of a token are [B, T].
    """
    logprob = temperature.new_empty(tokens.shape)
    entropy = torch.empty_like(logprob)
    _launch(
        _grpo_loss_kernel,
        _pick("grpo_loss", logits),
        logits,
        temperature.dtype,
        logits,
        tokens,
        temperature,
        mask,
        loss_inputs.advantage,
        loss_inputs.weight,
        loss_inputs.entropy_weight,
        loss_inputs.old_logprob,
        loss_inputs.ref_logprob if config.beta != 0 else None,
        loss_inputs.sampling_logprob,
        _settings(config, temperature),
        logprob,
        entropy,
        d_logits,
        *logits.shape[1:],
        *_row_strides(logits),
        *_row_strides(d_logits),
        temperature.stride(-1),
        SURROGATE=_KERNEL_FORMS[config.surrogate][0],
        ESTIMATOR=config.kl_estimator,
        SOFTCAP=softcap,
    )
    return logprob, entropy


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x [B, T, V] by a number on its device, without looking at it from the host."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    strides = _row_strides(x)
    _launch(_scale_kernel, _pick("scale", x), x, acc, x, factor, *x.shape[1:], *strides)


def approximate_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, W, row_lse, ref_row_lse) of every row of [B, T, V]; mask [B, T]."""
    total = logits.new_empty(mask.shape, dtype=dtype)
    weight = torch.empty_like(total)
    row_lse = logits.new_empty((*mask.shape, 2), dtype=dtype)
    ref_row_lse = torch.empty_like(row_lse)
    _launch(
        _approximate_kl_forward_kernel,
        _pick("approximate_kl_forward", logits),
        logits,
        dtype,
        logits,
        ref_logits,
        mask,
        total,
        weight,
        row_lse,
        ref_row_lse,
        *logits.shape[1:],
        *_row_strides(logits),
        *_row_strides(ref_logits),
        LOG2_EPS=log2_eps,
    )
    return total, weight, row_lse, ref_row_lse


def approximate_kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    weight: Tensor,
    row_lse: Tensor,
    ref_row_lse: Tensor,
    d_total: Tensor,
    log2_eps: float,
    d_logits: Tensor,
) -> None:
    """Write d_total · (w - p W) of every row to d_logits [B, T, V]."""
    _launch(
        _approximate_kl_backward_kernel,
        _pick("approximate_kl_backward", logits),
        logits,
        weight.dtype,
        logits,
        ref_logits,
        mask,
        weight,
        row_lse,
        ref_row_lse,
        d_total,
        d_logits,
        *logits.shape[1:],
        *_row_strides(logits),
        *_row_strides(ref_logits),
        *_row_strides(d_logits),
        LOG2_EPS=log2_eps,
    )
