"""`linear_token_stats`: token statistics from hidden states, with logits of one chunk at a time.

Top to bottom: the forward operator, the backward operator, the autograd formula, the public
function.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import RowStats, StatsRequest
from ..lm_head.backward_plan import Trained, plan_backward
from ..lm_head.chunk_loop import ChunkedLMHead, Logits
from ..lm_head.head_gradient import LMHeadGrad, sum_parts
from ..lm_head.inputs import HeadAdapter, LMHeadInputs, prepare_inputs
from ..lm_head.row_groups import RowGroups
from ..lm_head.support import split_by_support
from ..lm_head.token_order import TokenPacking, resolve_token_order
from ..objective.token_gradients import TokenGrads
from ..sampling_support import TokenSupport
from ..validation import expect_flag, expect_number, expect_token_ids, suggest_keywords
from .bundled_op import bundled_op
from .token_stats import TokenStats, as_token_stats, load_stats, save_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HIDDEN_ONLY = [True, False, False, False, False]  # of LMHeadInputs.leaves


@bundled_op("linear_token_stats_forward")
def _forward(
    inputs: LMHeadInputs,
    packing: TokenPacking,
    chunk_tokens: int | None,
    skip_zero_grad: bool,
    trained: Trained,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor,
]:  # fmt: skip
    token_idx = counted_tokens(inputs, packing)
    stats = new_stats(inputs)
    plan = plan_backward(inputs, chunk_tokens, trained)
    logits, ref_logits, hidden_grads = plan.allocate(inputs)
    num_with_grad = 0
    if plan.statistics:
        num_with_grad = len(gradient_order(packing, skip_zero_grad))
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        if plan.statistics:
            groups = RowGroups.of(token_idx[:num_with_grad], None)
            _write_hidden_grads(hidden_grads, stats, inputs, groups, chunk_tokens, plan.statistics)
        for part in split_by_support(inputs, token_idx[num_with_grad:], 0, chunk_tokens):
            groups, kept = RowGroups.of(part.token_idx, inputs.token_rows), None
            if plan.logits is not None:
                kept = Logits(logits, None if inputs.kl is None else ref_logits)
                logits[len(groups) :].zero_()  # rows of masked tokens
                ref_logits[len(groups) :].zero_()
            if len(groups) > 0:  # a head may copy the weight
                head = ChunkedLMHead(part.inputs, len(groups), chunk_tokens, logits=kept)
                for chunk in head.chunks(groups):
                    write_stats(stats, chunk.token_idx, chunk.stats())
    return *stats.as_outputs(), logits, ref_logits, hidden_grads


@_forward.register_fake
def _(
    inputs: LMHeadInputs, packing: TokenPacking, chunk_tokens: int | None, _: bool, trained: Trained
) -> tuple[Tensor, ...]:
    left = plan_backward(inputs, chunk_tokens, trained).allocate(inputs)
    return *new_stats(inputs).as_outputs(), *left


def _write_hidden_grads(
    hidden_grads: Tensor,
    stats: RowStats,
    inputs: LMHeadInputs,
    groups: RowGroups,
    chunk_tokens: int | None,
    statistics: tuple[str, ...],
) -> None:
    """Compute the statistics and their gradients in the hidden states [statistics, N, H]."""
    head = ChunkedLMHead(
        inputs, len(groups), chunk_tokens, wanted=HIDDEN_ONLY, overwrite=len(statistics) == 1
    )
    head_grads = [
        LMHeadGrad(head, len(groups), HIDDEN_ONLY, d_hidden) for d_hidden in hidden_grads.zero_()
    ]
    for chunk in head.chunks(groups):
        chunk_stats = chunk.stats()
        write_stats(stats, chunk.token_idx, chunk_stats)
        ones = torch.ones_like(chunk_stats.row_lse[..., 0])
        for head_grad, name in zip(head_grads, statistics, strict=True):
            unit = TokenGrads(None, None, None)._replace(**{name: ones})
            head_grad.add(chunk, chunk.grad(chunk_stats, unit))
    for head_grad in head_grads:
        sum_parts(inputs, [(head_grad.finish(), None)])


def counted_tokens(inputs: LMHeadInputs, packing: TokenPacking) -> Tensor:
    """Return the indices [n] of the tokens that count; check their ids."""
    token_idx = packing.order[: sum(packing.counts.tolist())]
    if inputs.vocab_group is None:
        expect_token_ids(inputs.tokens[token_idx], None, inputs.weight.shape[0])
    return token_idx


def new_stats(inputs: LMHeadInputs) -> RowStats:
    """Allocate statistics [N] filled with 0, the result of a masked token."""
    has_kl = inputs.kl is not None
    return RowStats.allocate(inputs.temperature, inputs.request, kl=has_kl).map(Tensor.zero_)


def write_stats(
    stats: Sequence[Tensor | None], token_idx: Tensor, chunk_stats: Sequence[Tensor | None]
) -> None:
    """Copy the statistics [n] of a chunk into the statistics [N] of all tokens."""
    for whole, part in zip(stats, chunk_stats, strict=True):
        if whole is not None and part is not None:
            whole.index_copy_(0, token_idx, part)


@bundled_op("linear_token_stats_backward")
def _backward(
    inputs: LMHeadInputs,
    packing: TokenPacking,
    chunk_tokens: int | None,
    skip_zero_grad: bool,
    stats: RowStats,
    grads: TokenGrads,
    logits: Tensor | None,
    ref_logits: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    local = inputs._replace(vocab_group=None)  # the statistics are known: no chunk waits for ranks
    candidates = gradient_order(packing, skip_zero_grad)
    token_idx = _tokens_with_grad(candidates, grads)
    if logits is not None and 2 * len(token_idx) > len(candidates):
        token_idx = candidates  # not worth a copy of the others' logits
    d_hidden = None
    if wanted[0]:
        d_hidden = inputs.temperature.new_zeros(inputs.hidden.shape, dtype=inputs.grad_dtype)
    head_grads = []
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        parts = split_by_support(local, token_idx, 0, chunk_tokens)
        for part in parts:
            groups, kept = RowGroups.of(part.token_idx, inputs.token_rows), None
            if logits is not None:
                kept = _select_logits(Logits(logits, ref_logits), inputs, packing, groups)
            head = ChunkedLMHead(
                part.inputs,
                len(groups),
                chunk_tokens,
                wanted=wanted,
                logits=kept,
                is_made=kept is not None,
            )
            head_grad = LMHeadGrad(
                head, len(groups), wanted, d_hidden, is_only_part=len(parts) == 1
            )
            for chunk in head.chunks(groups):
                chunk_stats = stats.map(lambda x, idx=chunk.token_idx: x[idx])
                chunk_grads = TokenGrads(*(x if x is None else x[chunk.token_idx] for x in grads))
                head_grad.add(chunk, chunk.grad(chunk_stats, chunk_grads))
            head_grads.append((head_grad.finish(), part.inputs.vocab_ids))
    d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b = (
        inputs.hidden.new_empty(0) if grad is None or leaf is None else grad.to(leaf.dtype)
        for grad, leaf in zip(sum_parts(inputs, head_grads), inputs.leaves, strict=True)
    )
    return d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b


@_backward.register_fake
def _(inputs: LMHeadInputs, *others: Any) -> tuple[Tensor, ...]:
    return tuple(
        leaf.new_empty(leaf.shape) if wanted and leaf is not None else inputs.hidden.new_empty(0)
        for wanted, leaf in zip(others[-1], inputs.leaves, strict=True)
    )


def gradient_order(packing: TokenPacking, skip_zero_grad: bool) -> Tensor:
    """Return the tokens that may have a gradient, in the order of the packing."""
    num_active, num_zero_grad = packing.counts.tolist()
    return packing.order[: num_active + (0 if skip_zero_grad else num_zero_grad)]


def _tokens_with_grad(token_idx: Tensor, grads: TokenGrads) -> Tensor:
    """Leave out the tokens whose gradient is 0; on a GPU none, which would wait for it."""
    if token_idx.device.type != "cpu":
        return token_idx
    has_grad = torch.zeros(len(token_idx), dtype=torch.bool)
    for grad in grads:
        if grad is not None:
            has_grad |= grad[token_idx] != 0
    return token_idx[has_grad]


def _select_logits(
    logits: Logits, inputs: LMHeadInputs, packing: TokenPacking, groups: RowGroups
) -> Logits:
    """Select the rows of these groups among the logits that forward left, in its order."""
    num_counted = sum(packing.counts.tolist())
    left = RowGroups.of(packing.order[:num_counted], inputs.token_rows).row_idx
    # On a GPU `_tokens_with_grad` leaves no token out, and the comparison would wait.
    is_prefix = inputs.token_rows is None and left.device.type != "cpu"
    if is_prefix or torch.equal(left[: len(groups)], groups.row_idx):
        return logits
    place = torch.empty(len(inputs.hidden), dtype=torch.int64, device=left.device)
    place[left] = torch.arange(len(left), device=left.device)
    return logits.select(place[groups.row_idx])


@bundled_op("linear_token_stats_scaled_backward")
def _scaled_backward(
    packing: TokenPacking,
    skip_zero_grad: bool,
    hidden_grads: Tensor,
    rows: list[int],
    upstream: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Sum hidden_grads[row] [N, H], a frozen head's, times its upstream gradient [N]."""
    token_idx = gradient_order(packing, skip_zero_grad)
    d_hidden = None
    for row, grad in zip(rows, upstream, strict=True):
        # A masked token, or one without an upstream gradient, gets 0, whatever its row holds.
        factor = torch.zeros_like(grad).index_copy_(0, token_idx, grad[token_idx]).unsqueeze(-1)
        product = (hidden_grads[row] * factor).masked_fill_(factor == 0, 0.0)
        d_hidden = product if d_hidden is None else d_hidden.add_(product)
    assert d_hidden is not None
    return d_hidden.to(dtype)


@_scaled_backward.register_fake
def _(packing, skip_zero_grad, hidden_grads, rows, upstream, dtype) -> Tensor:
    return hidden_grads.new_empty(hidden_grads.shape[1:], dtype=dtype)


def _setup_context(ctx: Any, bundles: list, output: tuple[Tensor, ...]) -> None:
    inputs, packing, *ctx.settings, trained = bundles
    *stats, logits, ref_logits, hidden_grads = output
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.values = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.plan = plan_backward(inputs, ctx.settings[0], trained)
    left = (logits, ref_logits, hidden_grads)
    save_stats(ctx, inputs.request, stats, *tensors, *packing, *left)


def _autograd(ctx: Any, *grads_of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    has_kl = ctx.values[LMHeadInputs._fields.index("kl")] is not None
    saved, stats, grads = load_stats(ctx, grads_of_outputs, kl=has_kl)
    *tensors, order, counts, logits, ref_logits, hidden_grads = saved
    inputs = LMHeadInputs(
        *(v if t is None else t for t, v in zip(tensors, ctx.values, strict=True))
    )
    packing, (chunk_tokens, skip_zero_grad) = TokenPacking(order, counts), ctx.settings
    wanted = list(ctx.needs_input_grad[: len(inputs.leaves)])
    upstream = {name: grad for name, grad in grads._asdict().items() if grad is not None}
    if not upstream or not any(wanted):
        return ()
    statistics = ctx.plan.statistics
    if statistics and upstream.keys() <= set(statistics):
        rows, dtype = [statistics.index(name) for name in upstream], inputs.hidden.dtype
        parts = list(upstream.values())
        return (_scaled_backward(packing, skip_zero_grad, hidden_grads, rows, parts, dtype),)
    has_logits = ctx.plan.logits is not None
    if grads.kl is None:  # the reference policy is not read
        inputs = inputs._replace(ref_hidden=None, ref_weight=None, ref_bias=None, kl=None)
    head_grads = _backward(
        inputs,
        packing,
        chunk_tokens,
        skip_zero_grad,
        stats,
        grads,
        logits if has_logits else None,
        ref_logits if has_logits and has_kl else None,
        wanted,
    )
    return tuple(grad if want else None for grad, want in zip(head_grads, wanted, strict=True))


_forward.register_autograd(_autograd, setup_context=_setup_context)


@suggest_keywords
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
    adapter: HeadAdapter | None = None,
    sum_sq_probs: bool = False,
    mean_logit: bool = False,
    is_top1: bool = False,
    top_logprobs: int = 0,
    token_rows: Tensor | None = None,
    support: TokenSupport | None = None,
    entropy_grad: bool = False,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
    vocab_group: "ProcessGroup | None" = None,
) -> TokenStats:
    """Compute `token_stats` of logits = hidden @ weight.T + bias, one chunk of logits at a time.

    Forward is one matrix product, 2·n·V·H floating-point operations for n unmasked tokens (two
    products with a KL). With the gradient it is

        4 products     trained head: backward makes the logits again
        3              trained head, and all tokens fit one chunk: the logits are kept until
                       backward
        2              frozen head, as in LoRA training: forward computes d logprob / d hidden,
                       which backward multiplies by the upstream gradient; one more with a KL
        3              frozen head and `entropy_grad`

    Logits are not rounded to the dtype of their operands, and gradients are summed in fp32: from
    bf16 the log-probs are right to 1e-5. The memory taken beside the results is about 1 GiB of
    workspace (on a GPU with 40 GB or more up to 4, where lm_head/chunk_size.py predicts that it
    saves time) and the gradient of the weight in fp32, whatever the number of tokens; with a frozen
    head [N, H] numbers per statistic that has a gradient.

    Args:
        hidden: [B, T, H] or packed [N, H]; hidden[:, t] is the last hidden state that predicts
            tokens[:, t]. fp32, bf16, fp16 or fp64; under autocast the products are in its dtype.
            In fp16 the gradient of each token is brought into the range of fp16 by a power of two,
            so that it does not underflow, and no bf16 is needed.
        weight: [V, H], that of the LM head; bias: [V]. Where one of them, or hidden, needs no
            gradient, its product is left out. A weight in another dtype than `hidden` is cast to
            that of `hidden` for the products, as TRL does: with bf16 hidden states, an fp32 weight
            is rounded to bf16, in a copy that exists during the call. To keep its digits, pass
            hidden.float(). Gradients have the dtype of their leaf. A DTensor is gathered once, and
            gets the mean over ranks of its gradient, in its own shards.
        ref_hidden, ref_weight, ref_bias: the reference policy's, for `kl`, never differentiated;
            its hidden size may differ.
        adapter: `HeadAdapter(a, b, scale)`, a LoRA on the head: logits += scale · (hidden aᵀ) bᵀ,
            before the softcap and the temperature, with a [r, H] and b [V, r] in any dtype. `a` and
            `b` get gradients, and may be DTensors. Where only they and `hidden` are trained, it is
            2 products if all tokens fit one chunk, else 3.
        token_rows: [M], integer; the tokens are then [M] and tokens[i] is predicted by row
            token_rows[i] of hidden, flattened to [N, H]. For batches packed as a tree, where the
            row at a branch predicts the first token of every branch: the products are of the rows
            that any token reads, not of the tokens. Everything that is given per token is [M] too;
            the tokens of a row must have the same temperature and support. Finding the rows waits
            for the device.
        support: as in `token_stats`. Tokens with at most 1,024 ids then need a row of `weight` for
            each id that any of them has, U rows in all. Where U is at most a quarter of V and
            `chunk_tokens` is None, the products are with these rows: 2·n·U·H operations each, four
            of them with the gradient, and as much memory less. Else the products are those of the
            whole head, four with the gradient if `chunk_tokens` is None.
        entropy_grad: a hint for a frozen head whose tokens take several chunks: True if the entropy
            will have an upstream gradient. The results are the same. Without the hint such a
            gradient costs four products, as backward makes the logits again.
        chunk_tokens: tokens per chunk; None plans for the workspace above. With a given size the
            last chunk is padded, so that the bits of a token's results do not depend on how many
            tokens there are, nor on the others; on a CPU they may depend on its place in its chunk.
        packing: `pack_tokens` of this very mask, made in advance.
        vocab_group: the ranks of a tensor-parallel head; None: weight has the whole vocabulary.
            `weight`, `bias`, `ref_weight`, `ref_bias` and `adapter.b` are then this rank's rows, in
            rank order and of any number from 1 (of a DTensor, `weight.to_local()`). Everything else
            is the same on all ranks, and token ids are those of the whole vocabulary. Results and
            the gradients of `hidden` and `adapter.a` are the same on all ranks, bit by bit: those
            gradients are complete, and must not be reduced again. Leave out rows that only pad the
            vocabulary, as in `weight[:n]`, or give them a bias of -inf. Every rank calls, and calls
            backward, in the same order. lm_head/vocab_parallel.py says what the ranks exchange.
        tokens, temperature, softcap, entropy, kl, mask, sum_sq_probs, mean_logit, is_top1,
            top_logprobs: as in `token_stats`. Masked tokens are in no product. A gradient of
            `sum_sq_probs` or `mean_logit` with a frozen head in several chunks costs four products.

    Returns:
        TokenStats as in `token_stats`, fp32 (fp64 for fp64 hidden), differentiable in `hidden`,
        `weight`, `bias` and the adapter's `a` and `b` under any upstream gradient.

    Raises:
        ValueError, TypeError: as `token_stats`, for these arguments.
    """
    inputs = prepare_inputs(
        hidden,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        request=StatsRequest(entropy, sum_sq_probs, mean_logit, is_top1, top_logprobs),
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        kl=kl,
        mask=mask,
        adapter=adapter,
        token_rows=token_rows,
        support=support,
        vocab_group=vocab_group,
    )
    check_chunk_tokens(chunk_tokens)
    expect_flag("entropy_grad", entropy_grad)
    packing = resolve_token_order(packing, mask, tokens)
    return run_linear_token_stats(
        inputs, packing, tokens.shape, chunk_tokens, entropy_grad=entropy_grad
    )


def run_linear_token_stats(
    inputs: LMHeadInputs,
    packing: TokenPacking,
    shape: torch.Size,
    chunk_tokens: int | None,
    *,
    skip_zero_grad: bool = False,
    entropy_grad: bool = False,
) -> TokenStats:
    """Run the operator.

    Args:
        skip_zero_grad: no gradient for tokens that the packing says have none.
        entropy_grad: as in `linear_token_stats`.
    """
    is_trained = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad
        for leaf in inputs.leaves
    ]
    trained = Trained(*is_trained, entropy=entropy_grad and inputs.entropy)
    *outputs, _, _, _ = _forward(inputs, packing, chunk_tokens, skip_zero_grad, trained)
    has_kl = inputs.kl is not None
    return as_token_stats(RowStats._make(outputs), shape, inputs.request, kl=has_kl)


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    if chunk_tokens is not None:
        expect_number("chunk_tokens", chunk_tokens, integer=True, at_least=1)
