"""`token_stats`: log-prob, entropy and KL of every token, differentiable in the logits.

Top to bottom: the forward operator, the backward operator and its in-place form, the autograd
formula, the public function.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import RowInputs, RowStats, backend_for
from ..backends.interface import accumulation_dtype, scalar_tensor
from ..objective.token_gradients import TokenGrads
from ..validation import (
    expect_choice,
    expect_mask,
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


@bundled_op("grpo_kernels::token_stats_forward")
def _forward(
    rows: RowInputs, entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    expect_token_ids(rows.tokens, rows.mask, rows.logits.shape[-1])
    return backend_for(rows.logits).token_stats_forward(rows, entropy=entropy).as_outputs()


@_forward.register_fake
def _(rows: RowInputs, entropy: bool, inplace: bool) -> tuple[Tensor, ...]:
    has_kl = rows.kl is not None
    return RowStats.allocate(rows.temperature, entropy=entropy, kl=has_kl).as_outputs()


def stats_for_backward(
    grads: TokenGrads, entropy: Tensor, kl: Tensor, row_lse: Tensor, ref_row_lse: Tensor
) -> tuple[RowStats, TokenGrads]:
    """Select the saved statistics that backward reads; make the gradients contiguous."""
    has_entropy, has_kl = grads.entropy is not None, grads.kl is not None
    stats = RowStats(
        None,
        entropy if has_entropy else None,
        kl if has_kl else None,
        row_lse,
        ref_row_lse if has_kl else None,
    )
    return stats, TokenGrads(*(x if x is None else x.contiguous() for x in grads))


@bundled_op("grpo_kernels::token_stats_backward")
def _backward(rows: RowInputs, stats: RowStats, grads: TokenGrads) -> Tensor:
    d_logits = rows.logits.new_empty(rows.logits.shape)
    backend_for(rows.logits).token_stats_backward(rows, stats, grads, d_logits)
    return d_logits


@_backward.register_fake
def _(rows: RowInputs, stats: RowStats, grads: TokenGrads) -> Tensor:
    return rows.logits.new_empty(rows.logits.shape)


@bundled_op("grpo_kernels::token_stats_backward_", mutates_args={"rows_logits"})
def _backward_(rows: RowInputs, stats: RowStats, grads: TokenGrads) -> None:
    backend_for(rows.logits).token_stats_backward(rows, stats, grads, rows.logits)


@_backward_.register_fake
def _(rows: RowInputs, stats: RowStats, grads: TokenGrads) -> None:
    return None


def _setup_context(ctx: Any, bundles: list, output: tuple[Tensor, ...]) -> None:
    rows, ctx.has_entropy, ctx.inplace = bundles
    _, *saved = output  # backward does not read the log-probs
    ctx.save_for_backward(
        rows.logits, rows.tokens, rows.temperature, rows.mask, rows.ref_logits, *saved
    )
    ctx.softcap, ctx.kl = rows.softcap, rows.kl
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_logprob, d_entropy, d_kl, *_) -> tuple[Tensor | None]:
    *tensors, entropy, kl, row_lse, ref_row_lse = ctx.saved_tensors
    # An output that was not asked for is empty, and tracing may pass an empty gradient for it.
    grads = TokenGrads(
        d_logprob, d_entropy if ctx.has_entropy else None, None if ctx.kl is None else d_kl
    )
    if all(grad is None for grad in grads):
        return (None,)
    stats, grads = stats_for_backward(grads, entropy, kl, row_lse, ref_row_lse)
    rows = RowInputs._make((*tensors, ctx.softcap, ctx.kl))
    if grads.kl is None:  # the reference policy is not read
        rows = rows._replace(ref_logits=None, kl=None)
    if ctx.inplace:
        _backward_(rows, stats, grads)
        return (rows.logits.detach(),)
    return (_backward(rows, stats, grads),)


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
) -> TokenStats:
    """Compute each token's log-probability, its distribution's entropy, and the KL to a reference.

        x = softcap · tanh(logits / softcap) / temperature      p = softmax(x), q of ref_logits
        logprob = ln p[token]                                   entropy = -Σ p ln p
        forward: KL(ref‖policy) = Σ q (ln q - ln p)             reverse: Σ p (ln p - ln q)

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

    Returns:
        TokenStats(logprob, entropy, kl) in nats, shape of `tokens`, fp32 (fp64 for fp64 logits),
        differentiable in `logits` under any upstream gradient of any of them.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value. An unmasked id outside [0, V)
            is a ValueError on the CPU. On a GPU, where reading ids would wait for the device, it
            gives a NaN log-probability.

    Entropy and KL accumulate relative to the row's maximum (online softmax, Milakov and
    Gimelshein, arXiv:1805.02867), so that a common offset of the logits costs no precision.
    """
    rows = prepare_rows(logits, tokens, temperature, softcap, ref_logits, kl, mask)
    return run_token_stats(rows, tokens.shape, entropy=entropy)


def prepare_rows(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ref_logits: Tensor | None,
    kl: str | None,
    mask: Tensor | None,
) -> RowInputs:
    """Check the arguments of `token_stats` and lay them out as rows [B, T, ...]."""
    check_logits("logits", logits)
    expect_tokens(tokens, logits)
    expect_mask(mask, tokens.shape)
    expect_temperature(temperature, tokens, mask)
    _check_kl(kl, ref_logits, logits)
    if softcap is not None:
        expect_number("softcap", softcap, above=0)

    dtype = accumulation_dtype(logits.dtype)
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        temperature = temperature.detach().to(dtype).expand(tokens.shape).contiguous()
    else:
        temperature = scalar_tensor(temperature, dtype, logits.device).expand(tokens.shape)
    packed = tokens.dim() == 1  # one long sequence

    def as_rows(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if packed else x

    return RowInputs(
        as_rows(logits),
        as_rows(tokens.to(torch.int64).contiguous()),
        as_rows(temperature),
        None if mask is None else as_rows((mask != 0).contiguous()),
        None if kl is None or ref_logits is None else as_rows(ref_logits.detach()),
        softcap,
        kl,
    )


def run_token_stats(
    rows: RowInputs, shape: torch.Size, *, entropy: bool, inplace: bool = False
) -> TokenStats:
    """Run the operator; with inplace, backward overwrites the logits with their gradient."""
    outputs = _forward(rows, entropy, inplace)
    return as_token_stats(outputs, shape, entropy=entropy, kl=rows.kl is not None)


def as_token_stats(
    outputs: Sequence[Tensor], shape: torch.Size, *, entropy: bool, kl: bool
) -> TokenStats:
    """Give the leading outputs of an operator the shape of the tokens; drop the empty ones."""
    logprob, entropy_value, kl_value, *_ = outputs
    return TokenStats(
        logprob.view(shape),
        entropy_value.view(shape) if entropy else None,
        kl_value.view(shape) if kl else None,
    )


def check_logits(name: str, logits: Tensor) -> None:
    expect_tensor(name, logits, floating=True, dims=(2, 3), layout="[B, T, V] or packed [N, V]")
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
