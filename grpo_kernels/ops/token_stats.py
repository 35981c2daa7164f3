"""`token_stats`: log-prob, entropy and KL of every token, differentiable in the logits.

Top to bottom: the forward operator, the backward operator and its in-place twin, the autograd
formula that ties them, the public function.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends import RowInputs, RowStats, backend_for
from ..objective.token_gradients import TokenGrads


class TokenStats(NamedTuple):
    """Per-token results in the shape of `tokens`; None where not asked for."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None


@torch.library.custom_op("grpo_kernels::token_stats_forward", mutates_args=())
def _forward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    softcap: float | None,
    entropy: bool,
    kl: str | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.check_token_ids(tokens, mask, logits.shape[-1])
    rows = RowInputs(logits, tokens, temperature, mask, ref_logits, softcap, kl)
    outputs = backend_for(logits).token_stats_forward(rows, entropy=entropy)
    return tuple(temperature.new_empty(0) if each is None else each for each in outputs)


@_forward.register_fake
def _(logits, tokens, temperature, mask, ref_logits, softcap, entropy, kl, inplace):
    def output(wanted: bool, *pair: int) -> Tensor:
        return temperature.new_empty((*tokens.shape, *pair) if wanted else (0,))

    has_kl = kl is not None
    return output(True), output(entropy), output(has_kl), output(True, 2), output(has_kl, 2)


@torch.library.custom_op("grpo_kernels::token_stats_backward", mutates_args=())
def _backward(
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
) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    rows = RowInputs(logits, tokens, temperature, mask, ref_logits, softcap, kl)
    stats = RowStats(row_lse[..., 0], entropy_value, kl_value, row_lse, ref_row_lse)
    grads = TokenGrads(d_logprob, d_entropy, d_kl)
    backend_for(logits).token_stats_backward(rows, stats, grads, d_logits)
    return d_logits


@_backward.register_fake
def _(logits, *args):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("grpo_kernels::token_stats_backward_", mutates_args={"logits"})
def _backward_(
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
) -> None:
    rows = RowInputs(logits, tokens, temperature, mask, ref_logits, softcap, kl)
    stats = RowStats(row_lse[..., 0], entropy_value, kl_value, row_lse, ref_row_lse)
    grads = TokenGrads(d_logprob, d_entropy, d_kl)
    backend_for(logits).token_stats_backward(rows, stats, grads, logits)


@_backward_.register_fake
def _(logits, *args):
    return None


def _setup_context(ctx, inputs, output) -> None:
    logits, tokens, temperature, mask, ref_logits, softcap, entropy, kl, inplace = inputs
    _, entropy_value, kl_value, row_lse, ref_row_lse = output
    ctx.save_for_backward(
        logits, tokens, temperature, mask, ref_logits,
        row_lse, ref_row_lse, entropy_value, kl_value,
    )  # fmt: skip
    ctx.softcap, ctx.entropy, ctx.kl, ctx.inplace = softcap, entropy, kl, inplace
    ctx.set_materialize_grads(False)


def _autograd(ctx, d_logprob, d_entropy, d_kl, d_row_lse, d_ref_row_lse):
    (
        logits, tokens, temperature, mask, ref_logits,
        row_lse, ref_row_lse, entropy_value, kl_value,
    ) = ctx.saved_tensors  # fmt: skip
    # An output that was not asked for is empty, and tracing may hand it an empty gradient.
    d_entropy = d_entropy if ctx.entropy else None
    d_kl = d_kl if ctx.kl is not None else None
    if d_logprob is None and d_entropy is None and d_kl is None:
        return (None,) * 9
    backward = _backward_ if ctx.inplace else _backward
    d_logits = backward(
        logits,
        tokens,
        temperature,
        mask,
        None if d_kl is None else ref_logits,
        row_lse,
        None if d_kl is None else ref_row_lse,
        None if d_entropy is None else entropy_value,
        None if d_kl is None else kl_value,
        *(None if each is None else each.contiguous() for each in (d_logprob, d_entropy, d_kl)),
        ctx.softcap,
        None if d_kl is None else ctx.kl,
    )
    return (logits.detach() if ctx.inplace else d_logits, *(None,) * 8)


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
    """Log-probability of each token, entropy of its distribution, and KL to a reference.

        x = softcap · tanh(logits / softcap) / temperature      p = softmax(x), q of ref_logits
        logprob = ln p[token]                                   entropy = -Σ p ln p
        forward: KL(ref‖policy) = Σ q (ln q - ln p)             reverse: Σ p (ln p - ln q)

    Each row of logits is read once, and once more, with its gradient written, in backward. No
    tensor of the logits' size is made but that gradient, and only per-row scalars are saved.

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
        ValueError, TypeError: a wrong shape, dtype, device or value; an unmasked id outside
            [0, V) is a ValueError on the CPU, and a NaN log-probability on a GPU, where looking
            would wait for the device.

    Entropy and KL accumulate relative to the row's maximum (online softmax, Milakov and
    Gimelshein, arXiv:1805.02867), so that a common offset of the logits costs no precision.
    """
    return _token_stats(
        logits,
        tokens,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
        ref_logits=ref_logits,
        kl=kl,
        mask=mask,
        inplace=False,
    )


def _token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    entropy: bool,
    ref_logits: Tensor | None,
    kl: str | None,
    mask: Tensor | None,
    inplace: bool,
) -> TokenStats:
    """`token_stats`; with inplace, backward overwrites the logits with their gradient."""
    inputs = row_inputs(logits, tokens, temperature, softcap, ref_logits, kl, mask)
    outputs = _forward(*inputs, softcap, entropy, kl, inplace)
    logprob, entropy_value, kl_value = (
        each.view(tokens.shape) if each.dim() == 2 else each for each in outputs[:3]
    )
    return TokenStats(
        logprob, entropy_value if entropy else None, kl_value if kl is not None else None
    )


def row_inputs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ref_logits: Tensor | None,
    kl: str | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(logits, tokens, temperature, mask, ref_logits) checked, as rows [B, T, ...]."""
    checks.check_logits("logits", logits)
    checks.check_tokens(tokens, logits)
    checks.expect_mask(mask, tokens.shape)
    checks.check_temperature(temperature, tokens, mask)
    checks.check_kl_arguments(kl, ref_logits, logits)
    if softcap is not None:
        checks.expect_number("softcap", softcap, above=0)

    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        temperature = temperature.detach().to(acc).expand(tokens.shape).contiguous()
    else:
        if isinstance(temperature, Tensor):
            scalar = temperature.detach().to(acc).reshape(())
        else:
            scalar = scalar_temperature(temperature, acc, logits.device)
        temperature = scalar.expand(tokens.shape)
    return tuple(
        as_rows(each, tokens.dim())
        for each in (
            logits,
            tokens.to(torch.int64).contiguous(),
            temperature,
            None if mask is None else (mask != 0).contiguous(),
            None if kl is None else ref_logits.detach(),
        )
    )


def as_rows(x: Tensor | None, token_dims: int) -> Tensor | None:
    """[B, T, ...], a packed [N, ...] being one long sequence."""
    return x if x is None or token_dims == 2 else x.unsqueeze(0)


def scalar_temperature(temperature: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-dim tensor, by a product: a symbol of torch.compile stays one, so that a new
    temperature compiles nothing, and nothing is copied to the device."""
    return torch.ones((), dtype=dtype, device=device) * temperature
