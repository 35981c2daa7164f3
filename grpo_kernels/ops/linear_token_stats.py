"""`linear_token_stats`: token statistics from hidden states, the logits of one chunk at a time.

Top to bottom: the forward operator, the backward operator, the autograd formula that ties them, the
public function.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..lm_head.chunk_loop import ChunkedLMHead, LMHeadGrad, LMHeadInputs, RowStats
from ..lm_head.inputs import prepare_inputs, resolve_token_order
from ..lm_head.token_order import TokenPacking
from ..objective.token_gradients import TokenGrads
from .token_stats import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.library.custom_op("grpo_kernels::linear_token_stats_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    entropy: bool,
    kl: str | None,
    dtype: torch.dtype,
    vocab_group: str | None,
    order: Tensor,
    counts: Tensor,
    chunk_tokens: int | None,
    skip_inert: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = LMHeadInputs(
        hidden, weight, bias, tokens, temperature, ref_hidden, ref_weight, ref_bias,
        softcap, entropy, kl, dtype, vocab_group,
    )  # fmt: skip
    order = order[: sum(counts.tolist())]
    if vocab_group is None:
        checks.check_token_ids(tokens[order], None, weight.shape[0])
    stats = RowStats.zeros(inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = ChunkedLMHead(inputs, len(order), chunk_tokens, gradient=False)
        for at in rows.chunks(order):
            rows.write_logits(at)
            stats.write(at, rows.forward(at))
    return tuple(temperature.new_empty(0) if each is None else each for each in stats)


@_forward.register_fake
def _(hidden, weight, bias, tokens, temperature, *others):
    entropy, has_kl = others[4], others[5] is not None
    return stats_outputs(temperature, entropy, has_kl)


def stats_outputs(temperature: Tensor, entropy: bool, has_kl: bool) -> tuple[Tensor, ...]:
    """Empty tensors in the shapes of RowStats."""

    def output(wanted: bool, *pair: int) -> Tensor:
        return temperature.new_empty((*temperature.shape, *pair) if wanted else (0,))

    return output(True), output(entropy), output(has_kl), output(True, 2), output(has_kl, 2)


@torch.library.custom_op("grpo_kernels::linear_token_stats_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    kl: str | None,
    dtype: torch.dtype,
    vocab_group: str | None,
    order: Tensor,
    counts: Tensor,
    chunk_tokens: int | None,
    skip_inert: bool,
    row_lse: Tensor,
    ref_row_lse: Tensor | None,
    entropy_value: Tensor | None,
    kl_value: Tensor | None,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = LMHeadInputs(
        hidden, weight, bias, tokens, temperature, ref_hidden, ref_weight, ref_bias,
        softcap, entropy_value is not None, kl, dtype, None,
    )  # fmt: skip  # the statistics are known: no chunk waits for another rank
    stats = RowStats(row_lse[:, 0], entropy_value, kl_value, row_lse, ref_row_lse)
    upstream = [d_logprob, d_entropy, d_kl]
    order = _with_gradient(order, counts.tolist(), upstream, skip_inert)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = ChunkedLMHead(inputs, len(order), chunk_tokens, gradient=True)
        gradient = LMHeadGrad(rows, len(order), wanted)
        for at in rows.chunks(order):
            rows.write_logits(at)
            incoming = TokenGrads(*(each if each is None else each[at] for each in upstream))
            gradient.add(at, rows.backward(at, stats.at(at), incoming))
    leaves = (hidden, weight, weight if bias is None else bias)
    return tuple(
        leaf.new_empty(0) if each is None else each.to(leaf.dtype)
        for each, leaf in zip(gradient.total(vocab_group), leaves, strict=True)
    )


@_backward.register_fake
def _(hidden, weight, bias, *others):
    wanted = others[-1]
    leaves = (hidden, weight, weight if bias is None else bias)
    return tuple(
        leaf.new_empty(leaf.shape if each else (0,))
        for each, leaf in zip(wanted, leaves, strict=True)
    )


def _with_gradient(
    order: Tensor, counts: list[int], upstream: list[Tensor | None], skip_inert: bool
) -> Tensor:
    """The tokens that a gradient can reach; on the CPU, where looking is free, those it does."""
    order = order[: counts[0] if skip_inert else sum(counts)]
    if order.device.type != "cpu":
        return order
    reached = torch.zeros(len(order), dtype=torch.bool)
    for each in upstream:
        if each is not None:
            reached |= each[order] != 0
    return order[reached]


def _setup_context(ctx, inputs, output) -> None:
    (
        *tensors, softcap, entropy, kl, dtype, vocab_group, order, counts, chunk_tokens, skip_inert,
    ) = inputs  # fmt: skip
    _, entropy_value, kl_value, row_lse, ref_row_lse = output
    ctx.save_for_backward(*tensors, order, counts, row_lse, ref_row_lse, entropy_value, kl_value)
    ctx.settings = softcap, entropy, kl, dtype, vocab_group, chunk_tokens, skip_inert
    ctx.set_materialize_grads(False)


def _autograd(ctx, d_logprob, d_entropy, d_kl, d_row_lse, d_ref_row_lse):
    *tensors, order, counts, row_lse, ref_row_lse, entropy_value, kl_value = ctx.saved_tensors
    softcap, entropy, kl, dtype, vocab_group, chunk_tokens, skip_inert = ctx.settings
    # An output that was not asked for is empty, and tracing may hand it an empty gradient.
    d_entropy = d_entropy if entropy else None
    d_kl = d_kl if kl is not None else None
    wanted = list(ctx.needs_input_grad[:3])
    if (d_logprob is None and d_entropy is None and d_kl is None) or not any(wanted):
        return (None,) * 17
    hidden, weight, bias, tokens, temperature, *reference = tensors
    gradients = _backward(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        *(None if d_kl is None else each for each in reference),
        softcap,
        None if d_kl is None else kl,
        dtype,
        vocab_group,
        order,
        counts,
        chunk_tokens,
        skip_inert,
        row_lse,
        None if d_kl is None else ref_row_lse,
        None if d_entropy is None else entropy_value,
        None if d_kl is None else kl_value,
        *(None if each is None else each.contiguous() for each in (d_logprob, d_entropy, d_kl)),
        wanted,
    )
    found = (each if want else None for each, want in zip(gradients, wanted, strict=True))
    return (*found, *(None,) * 14)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: str | None = None,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
    vocab_group: "ProcessGroup | None" = None,
) -> TokenStats:
    """`token_stats` of logits = hidden @ weight.T + bias, which never exist but for a chunk.

    Forward is one matrix product (two with a KL), backward makes the logits again and then the
    gradients: 8·n·V·H floating-point operations for n unmasked tokens, 2·n·V·H without gradient.
    Logits are not rounded to the dtype of their operands, and gradients are summed in fp32: from
    bf16 the log-probs are right to 1e-5. Beside its results it takes about 1 GiB of workspace and
    the gradient of the weight in fp32, whatever the number of tokens.

    Args:
        hidden: [B, T, H] or packed [N, H]; hidden[:, t] is the last hidden state that predicts
            tokens[:, t]. fp32, bf16, fp16 or fp64; under autocast the products are in its dtype.
        weight: [V, H], that of the head, in the dtype of `hidden` (under autocast, any); bias:
            [V]. Where one of them, or hidden, needs no gradient, its product is left out. A DTensor
            is unshard once, and gets the mean over ranks of its gradient, in its own shards.
        ref_hidden, ref_weight, ref_bias: the reference's, for `kl`, never differentiated; its
            hidden size may be another.
        chunk_tokens: tokens per chunk; None plans for about 1 GiB. With a given size the last chunk
            is filled up, so that the bits of a token's results do not depend on how many tokens
            there are, nor on the others; on a CPU they may on its place in its chunk.
        packing: `pack_tokens` of this very mask, made in advance.
        vocab_group: the ranks of a tensor-parallel head; None: weight has the whole vocabulary.
            `weight`, `bias`, `ref_weight` and `ref_bias` are then this rank's rows, in rank order
            and of any number from 1 (of a DTensor, `weight.to_local()`); everything else is the
            same on all ranks, the token ids being those of the whole vocabulary. So are the
            results and the gradient of `hidden`, bit by bit: it is complete, and must not be
            reduced again. Rows that only pad the vocabulary are left out, as in `weight[:n]`, or
            have a bias of -inf. Every rank calls, and calls backward, in the same order. See
            vocab_shards.py for what the ranks tell each other.
        tokens, temperature, softcap, entropy, kl, mask: as in `token_stats`. Masked tokens are in
            no product.

    Returns:
        TokenStats(logprob, entropy, kl) in nats, shape of `tokens`, fp32 (fp64 for fp64 hidden),
        differentiable in `hidden`, `weight` and `bias` under any upstream gradient.

    Raises:
        ValueError, TypeError: as `token_stats`, for these arguments.
    """
    return _linear_token_stats(
        hidden,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        kl=kl,
        mask=mask,
        chunk_tokens=chunk_tokens,
        packing=packing,
        vocab_group=vocab_group,
        skip_inert=False,
    )


def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None,
    chunk_tokens: int | None,
    packing: TokenPacking | None,
    skip_inert: bool,
    entropy: bool,
    kl: str | None,
    **keywords,
) -> TokenStats:
    """`linear_token_stats`; skip_inert: tokens packed as without a signal get no gradient."""
    inputs = prepare_inputs(hidden, weight, tokens, mask=mask, entropy=entropy, kl=kl, **keywords)
    checks.check_chunk_tokens(chunk_tokens)
    packing = resolve_token_order(packing, mask, tokens)
    outputs = _forward(*inputs, *packing, chunk_tokens, skip_inert)
    return token_stats_of(outputs, tokens.shape, entropy, kl)


def token_stats_of(
    outputs: tuple[Tensor, ...], shape: torch.Size, entropy: bool, kl: str | None
) -> TokenStats:
    """The first three of an operator's outputs, [N], in the shape of the tokens."""
    logprob, entropy_value, kl_value = outputs[:3]
    return TokenStats(
        logprob.view(shape),
        entropy_value.view(shape) if entropy else None,
        kl_value.view(shape) if kl is not None else None,
    )
