"""`token_stats`: log-prob, entropy and KL of every token, differentiable in the logits.

Top to bottom: the forward operator, the backward operator and its in-place form, the autograd
formula, the public function.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import RowInputs, RowStats, StatsRequest, row_support
from ..backends.interface import StatsOutputs, accumulation_dtype, scalar_tensor
from ..backends.row_support import RowSupport, check_support, prepare_support
from ..objective.token_gradients import TokenGrads
from ..sampling_support import TokenSupport
from ..validation import (
    expect_choice,
    expect_mask,
    expect_no_tangent,
    expect_number,
    expect_temperature,
    expect_tensor,
    expect_token_ids,
    expect_tokens,
    shape_of,
    suggest_keywords,
)
from .bundled_op import bundled_op

_CONSUMED = "_grpo_kernels_consumed"


class TokenStats(NamedTuple):
    """Per-token results in the shape of `tokens`; None where not asked for."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None


@bundled_op("token_stats_forward")
def _forward(
    rows: RowInputs, support: RowSupport, request: StatsRequest, inplace: bool
) -> StatsOutputs:
    expect_token_ids(rows.tokens, rows.mask, rows.logits.shape[-1])
    return row_support.token_stats_forward(rows, support, request).as_outputs()


@_forward.register_fake
def _(rows: RowInputs, support: RowSupport, request: StatsRequest, inplace: bool) -> StatsOutputs:
    return RowStats.allocate(rows.temperature, request, kl=rows.kl is not None).as_outputs()


def save_stats(ctx: Any, request: StatsRequest, output: Sequence[Tensor], *inputs: Any) -> None:
    """Save the inputs of an operator and, of its RowStats, what backward may read."""
    stats = RowStats._make(output)
    ctx.request = request
    ctx.save_for_backward(
        *inputs,
        stats.entropy,
        stats.kl,
        stats.row_lse,
        stats.ref_row_lse,
        stats.sum_sq_probs,
        stats.num_entries,
    )
    ctx.mark_non_differentiable(stats.is_top1, stats.top_logprobs, stats.top_ids)
    ctx.set_materialize_grads(False)


def load_stats(
    ctx: Any, grads: Sequence[Tensor | None], *, kl: bool
) -> tuple[list[Any], RowStats, TokenGrads]:
    """Load what `save_stats` saved: the inputs, the statistics, and the contiguous gradients.

    grads: of every output. An output that was not asked for is empty, and tracing may pass an empty
    gradient for it.
    """
    *inputs, entropy, kl_value, row_lse, ref_row_lse, sum_sq_probs, num_entries = ctx.saved_tensors
    d_logprob, d_entropy, d_kl, _, _, d_sum_sq_probs, d_mean_logit, *_ = grads
    request = ctx.request
    present = TokenGrads(
        d_logprob,
        d_entropy if request.entropy else None,
        d_kl if kl else None,
        d_sum_sq_probs if request.sum_sq_probs else None,
        d_mean_logit if request.mean_logit else None,
    )
    saved = RowStats(
        None, entropy, kl_value, row_lse, ref_row_lse, sum_sq_probs, num_entries=num_entries
    )
    contiguous = TokenGrads(*(x if x is None else x.contiguous() for x in present))
    return inputs, saved.keep_for_backward(contiguous), contiguous


@bundled_op("token_stats_backward")
def _backward(rows: RowInputs, support: RowSupport, stats: RowStats, grads: TokenGrads) -> Tensor:
    d_logits = rows.logits.new_empty(rows.logits.shape)
    row_support.token_stats_backward(rows, support, stats, grads, d_logits)
    return d_logits


@_backward.register_fake
def _(rows: RowInputs, support: RowSupport, stats: RowStats, grads: TokenGrads) -> Tensor:
    return rows.logits.new_empty(rows.logits.shape)


@bundled_op("token_stats_backward_", mutates_args={"rows_logits"})
def _backward_(rows: RowInputs, support: RowSupport, stats: RowStats, grads: TokenGrads) -> None:
    row_support.token_stats_backward(rows, support, stats, grads, rows.logits)


@_backward_.register_fake
def _(rows: RowInputs, support: RowSupport, stats: RowStats, grads: TokenGrads) -> None:
    return None


def _setup_context(ctx: Any, bundles: list, output: tuple[Tensor, ...]) -> None:
    rows, support, request, ctx.inplace = bundles
    *tensors, ctx.softcap, ctx.kl = rows
    save_stats(ctx, request, output, *support, *tensors)


def _autograd(ctx: Any, *grads_of_outputs: Tensor | None) -> tuple[Tensor | None]:
    saved, stats, grads = load_stats(ctx, grads_of_outputs, kl=ctx.kl is not None)
    ids, ranges, sizes, *tensors = saved
    support = RowSupport(ids, ranges, sizes)
    if all(grad is None for grad in grads):
        return (None,)
    rows = RowInputs._make((*tensors, ctx.softcap, ctx.kl))
    if grads.kl is None:  # the reference policy is not read
        rows = rows._replace(ref_logits=None, kl=None)
    if ctx.inplace:
        _backward_(rows, support, stats, grads)
        return (rows.logits.detach(),)
    return (_backward(rows, support, stats, grads),)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@suggest_keywords
def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    ref_logits: Tensor | None = None,
    kl: str | None = None,
    mask: Tensor | None = None,
    sum_sq_probs: bool = False,
    mean_logit: bool = False,
    is_top1: bool = False,
    top_logprobs: int = 0,
    support: TokenSupport | None = None,
) -> TokenStats:
    """Compute each token's log-probability, its distribution's entropy, and the KL to a reference.

        x = softcap · tanh(logits / softcap) / temperature      p = softmax(x), q of ref_logits
        logprob = ln p[token]                                   entropy = -Σ p ln p
        forward: KL(ref‖policy) = Σ q (ln q - ln p)             reverse: Σ p (ln p - ln q)
        sum_sq_probs = ln Σ p²                                  mean_logit = mean of x over x > -inf

    Forward reads each row of logits once. Backward reads it once more and writes its gradient. The
    gradient is the only tensor of the logits' size; only per-row scalars are saved.

    Args:
        logits: [B, T, V] or packed [N, V]; fp32, bf16, fp16, or fp64. Rows may be strided, as in
            logits[:, :-1]; the last dimension must be contiguous. A logit of -inf is an entry
            outside the vocabulary: probability 0, gradient 0.
        tokens: [B, T] or [N], integer ids in [0, V).
        temperature: > 0; a number, or a tensor that broadcasts to the shape of `tokens`.
        softcap: > 0; -inf logits stay -inf.
        entropy: False leaves the entropy out.
        ref_logits: shape of `logits`; same softcap and temperature, never differentiated.
        kl: None, "forward" or "reverse".
        mask: bool or 0/1, shape of `tokens`. A masked row is not read: its outputs and its
            gradient are exactly 0, whatever logits and token it holds.
        sum_sq_probs, mean_logit, is_top1: True returns the statistic of this name. `is_top1` tells
            if the token is the argmax: it has the largest logit and no smaller id has it too.
        top_logprobs: K in [0, V]; the log-probs and ids of the K largest logits, in descending
            order, of equal logits the smaller id first. Where fewer than K logits are not -inf, the
            ids of the others follow with log-prob -inf.
        support: the ids that each token was drawn among, `TokenSupport(token_ids, offsets)`. All
            results are then those of the distribution renormalised over them, as if the other
            logits were -inf, in both models. No other logit is read, and their gradient is 0. A
            token without ids has the whole vocabulary; the ids of masked tokens are ignored. Where
            a support has fewer than K ids, the rest of `top_ids` is any. Its sizes must be known
            on the host: offsets on a GPU are waited for, those on the CPU are not.

    Returns:
        TokenStats(logprob, entropy, kl, sum_sq_probs, mean_logit, is_top1, top_logprobs, top_ids),
        None where not asked for: in nats, fp32 (fp64 for fp64 logits), shape of `tokens`. `is_top1`
        is bool; `top_logprobs` and `top_ids`, int64, are [*tokens.shape, K]. In a row that holds a
        NaN, or nothing but -inf, the first is False and the ids are any. Differentiable in `logits`
        under any upstream gradient of any of them, but for `is_top1` and `top_logprobs`, which have
        no gradient.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value. An unmasked id outside [0, V)
            is a ValueError on the CPU. On a GPU, where reading ids would wait for the device, it
            gives a NaN log-probability. So does a support with an id outside [0, V), with an id
            twice, or without its token.

    Entropy and KL accumulate relative to the row's maximum (online softmax, Milakov and
    Gimelshein, arXiv:1805.02867), so that a common offset of the logits costs no precision.
    """
    rows, prepared = prepare_rows(
        logits, tokens, temperature, softcap, ref_logits, kl, mask, support
    )
    request = StatsRequest(entropy, sum_sq_probs, mean_logit, is_top1, top_logprobs)
    request.check(logits.shape[-1])
    return run_token_stats(rows, prepared, tokens.shape, request)


def prepare_rows(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ref_logits: Tensor | None,
    kl: str | None,
    mask: Tensor | None,
    support: TokenSupport | None,
) -> tuple[RowInputs, RowSupport]:
    """Check the arguments of `token_stats` and lay them out as rows [B, T, ...]."""
    check_logits("logits", logits)
    expect_tokens(tokens, logits)
    expect_mask(mask, tokens)
    expect_temperature(temperature, tokens, mask)
    _check_kl(kl, ref_logits, logits)
    if softcap is not None:
        expect_number("softcap", softcap, above=0)

    dtype = accumulation_dtype(logits.dtype)
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        temperature = temperature.detach().to(dtype).expand(tokens.shape).contiguous()
    else:
        temperature = scalar_tensor(temperature, dtype, logits.device).expand(tokens.shape)
    flat_tokens = tokens.to(torch.int64).contiguous().flatten()
    mask = None if mask is None else (mask != 0).contiguous()
    prepared = RowSupport()
    if support is not None:
        check_support(support, tokens)
        V = torch.full((), logits.shape[-1], device=logits.device)
        flat_mask = None if mask is None else mask.flatten()
        prepared, flat_tokens = prepare_support(support, flat_tokens, flat_mask, V)
    packed = tokens.dim() == 1  # one long sequence

    def as_rows(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if packed else x

    rows = RowInputs(
        as_rows(logits),
        as_rows(flat_tokens.view(tokens.shape)),
        as_rows(temperature),
        None if mask is None else as_rows(mask),
        None if kl is None or ref_logits is None else as_rows(ref_logits.detach()),
        softcap,
        kl,
    )
    return rows, prepared


def run_token_stats(
    rows: RowInputs,
    support: RowSupport,
    shape: torch.Size,
    request: StatsRequest,
    *,
    inplace: bool = False,
) -> TokenStats:
    """Run the operator; with inplace, backward overwrites the logits with their gradient."""
    stats = RowStats._make(_forward(rows, support, request, inplace))
    return as_token_stats(stats, shape, request, kl=rows.kl is not None)


def as_token_stats(
    stats: RowStats, shape: torch.Size, request: StatsRequest, *, kl: bool
) -> TokenStats:
    """Give the outputs of an operator the shape of the tokens; drop those not asked for."""

    def result(x: Tensor | None, is_wanted: bool | int, *size: int) -> Any:
        return x.view(*shape, *size) if is_wanted and x is not None else None

    K = request.top_logprobs
    return TokenStats(
        result(stats.logprob, True),
        result(stats.entropy, request.entropy),
        result(stats.kl, kl),
        result(stats.sum_sq_probs, request.sum_sq_probs),
        result(stats.mean_logit, request.mean_logit),
        result(stats.is_top1, request.is_top1),
        result(stats.top_logprobs, K, K),
        result(stats.top_ids, K, K),
    )


def check_logits(name: str, logits: Tensor) -> None:
    expect_tensor(name, logits, floating=True, dims=(2, 3), layout="[B, T, V] or packed [N, V]")
    expect_no_tangent(name, logits)
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} must have a vocabulary of at least 1, got {shape_of(logits)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel() > 0:
        raise ValueError(
            f"{name} must be contiguous in the last dimension, got strides {logits.stride()}"
        )
    if getattr(logits, _CONSUMED, False):
        raise ValueError(f"{name} must not be used again after inplace=True, got them again")


def mark_consumed(logits: Tensor) -> None:
    """Make `check_logits` refuse these logits from now on: their gradient overwrites them."""
    overlaps = any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True))
    if overlaps and logits.numel() > 0:
        raise ValueError(
            f"logits must not be expanded with inplace=True, got strides {logits.stride()}"
        )
    if not torch.compiler.is_compiling():
        setattr(logits, _CONSUMED, True)


def _check_kl(kl: str | None, ref_logits: Tensor | None, logits: Tensor) -> None:
    if kl is None:
        if ref_logits is not None:
            raise ValueError("ref_logits is read with kl='forward' or 'reverse' only, got kl=None")
        return
    expect_choice("kl", kl, ("forward", "reverse"))
    if ref_logits is None:
        raise ValueError(f"kl={kl!r} needs ref_logits, got None")
    check_logits("ref_logits", ref_logits)
    expect_tensor("ref_logits", ref_logits, shape=logits.shape, device_of=logits)
