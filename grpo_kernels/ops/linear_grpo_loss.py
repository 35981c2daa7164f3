"""`linear_grpo_loss`: the objective from hidden states, with its gradient computed beside the loss.

The operator goes over the chunks once. While the logits of a chunk exist, it computes their
statistics, the loss's gradient in them, and from that gradient d_hidden and d_weight: three matrix
products, nothing computed twice. Backward only scales.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.interface import StatsRequest, accumulation_dtype
from ..lm_head.chunk_loop import ChunkedLMHead
from ..lm_head.head_gradient import LMHeadGrad, sum_parts
from ..lm_head.inputs import (
    HIDDEN_LAYOUT,
    HeadAdapter,
    LMHeadInputs,
    check_reference_head,
    check_tokens,
    prepare_inputs,
)
from ..lm_head.row_groups import split_by_gradient
from ..lm_head.support import split_by_support
from ..lm_head.token_order import TokenPacking, check_packing, pack_tokens
from ..objective.config import LossConfig, expect_config, in_compiled_code
from ..objective.kl_estimators import VOCABULARY_KL
from ..objective.policy_loss import (
    LossOutput,
    PreparedLoss,
    compute_loss,
    prepare_loss_inputs,
    tokens_to_read,
    zero_masked,
)
from ..objective.ratios import LossInputs
from ..objective.token_gradients import is_token_level, zero_advantage_has_zero_grad
from ..sampling_support import TokenSupport
from ..validation import expect_tensor, suggest_keywords
from .bundled_op import bundled_op
from .linear_token_stats import (
    check_chunk_tokens,
    counted_tokens,
    linear_token_stats,
    new_stats,
    run_linear_token_stats,
    write_stats,
)
from .precomputed_gradient import attach_gradient
from .token_stats import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@bundled_op("linear_grpo_loss_forward")
def _forward(
    inputs: LMHeadInputs,
    packing: TokenPacking,
    chunk_tokens: int | None,
    skip_zero_grad: bool,
    loss_inputs: LossInputs,
    config: str,
    coefficients: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    token_idx = counted_tokens(inputs, packing)
    num_with_grad = int(packing.counts[0]) if skip_zero_grad else len(token_idx)
    loss_config = LossConfig.decode(config, coefficients)
    stats = new_stats(inputs)
    d_hidden = None
    if wanted[0]:
        d_hidden = inputs.temperature.new_zeros(inputs.hidden.shape, dtype=inputs.grad_dtype)
    grads = []
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        parts = split_by_support(inputs, token_idx, num_with_grad, chunk_tokens)
        for part in parts:
            with_grad, without_grad = split_by_gradient(
                part.token_idx, part.num_with_grad, inputs.token_rows, len(inputs.hidden)
            )
            num_rows = len(with_grad) + len(without_grad)
            head = ChunkedLMHead(part.inputs, num_rows, chunk_tokens, wanted=wanted)
            head_grad = LMHeadGrad(
                head, len(with_grad), wanted, d_hidden, is_only_part=len(parts) == 1
            )
            # Tokens with a gradient: statistics, loss and gradients while their logits exist.
            for chunk in head.chunks(with_grad):
                chunk_inputs = loss_inputs.map(lambda x, idx=chunk.token_idx: x[idx])
                chunk_stats, logit_grad = chunk.loss_and_grad(chunk_inputs, loss_config)
                write_stats(stats[:3], chunk.token_idx, chunk_stats)
                head_grad.add(chunk, logit_grad)
            # Tokens without one: statistics, for the metrics.
            for chunk in head.chunks(without_grad):
                write_stats(stats, chunk.token_idx, chunk.stats())
            grads.append((head_grad.finish(), part.inputs.vocab_ids))
    d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b = (
        inputs.temperature.new_empty(0) if grad is None else grad
        for grad in sum_parts(inputs, grads)
    )
    return *stats.as_outputs()[:3], d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b


@_forward.register_fake
def _(inputs: LMHeadInputs, *others) -> tuple[Tensor, ...]:
    new, dtypes = inputs.temperature.new_empty, inputs.grad_dtypes
    grads = (
        new(leaf.shape, dtype=dtype) if wanted and leaf is not None else new(0)
        for leaf, dtype, wanted in zip(inputs.leaves, dtypes, others[-1], strict=True)
    )
    return *new_stats(inputs).as_outputs()[:3], *grads


@suggest_keywords
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    nll_weight: Tensor | None = None,
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    adapter: HeadAdapter | None = None,
    token_rows: Tensor | None = None,
    support: TokenSupport | None = None,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
    vocab_group: "ProcessGroup | None" = None,
) -> LossOutput:
    """Compute `grpo_loss` of logits = hidden @ weight.T + bias, one chunk of logits at a time.

    A token-level loss computes its gradient with the loss: three matrix products, 6·n·V·H
    floating-point operations for n tokens. Backward only scales by the incoming gradient. Where a
    token's loss depends on other tokens (a ratio of the sequence, a filter of the batch), all
    log-probs are needed before the first gradient, so the logits are made twice: 8·n·V·H. Under
    torch.no_grad it is 2·n·V·H.

    Masked tokens cost nothing. Tokens without a learning signal (advantage 0, and no KL, entropy
    bonus or penalty in the loss: every group with equal rewards) need one product, for the metrics.

    The memory taken beside the results is about 1 GiB of workspace, up to 4 on a large GPU as in
    `linear_token_stats`, and the gradients in fp32, whatever the number of tokens.

    Args:
        hidden: [B, T, H] or packed [N, H]; weight: [V, H]; bias: [V].
        ref_hidden, ref_weight, ref_bias: the reference policy's, for config.kl_estimator as
            `ref_logits` in `grpo_loss`; a KL over the vocabulary is computed in the same pass.
        packing: `pack_tokens(mask, advantages)`, made in advance, so that nothing waits for the
            device. With an nll_weight per token: `pack_tokens(mask | (nll_weight != 0),
            (advantages != 0) | (nll_weight != 0))`.
        token_rows: [M], as in `linear_token_stats`; tokens, advantages and all that is given per
            token are then [M], or per sequence with `cu_seqlens` of the tokens.
        support: as in `linear_token_stats`. `old_logprob`, `ref_logprob` and `sampling_logprob`
            must be over the same support.
        adapter, chunk_tokens, temperature, softcap, vocab_group: as in `linear_token_stats`. A
            token-level loss takes three products in shards of the vocabulary too: the statistics
            of a chunk are merged over the ranks before its gradient.
        Others: as in `policy_loss`.

    Returns:
        LossOutput(loss, metrics); the loss is 0-dim, fp32 (fp64 for fp64 hidden), differentiable
        in `hidden`, `weight`, `bias` and the adapter's `a` and `b`.

    Raises:
        ValueError, TypeError: as `linear_token_stats` and `policy_loss`.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    expect_config(config)
    config = in_compiled_code(config)
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    reference: dict[str, Any] = {
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
        "ref_bias": ref_bias,
    }
    has_reference = any(part is not None for part in reference.values())
    _check_kl_input(config, ref_logprob, has_reference)
    check_chunk_tokens(chunk_tokens)
    expect_tensor("hidden", hidden, floating=True, dims=(2, 3), layout=HIDDEN_LAYOUT)
    check_tokens(tokens, token_rows, hidden)
    expect_tensor("weight", weight, floating=True)
    prepared = prepare_loss_inputs(
        tokens,
        accumulation_dtype(hidden.dtype),
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        sampling_logprob=sampling_logprob,
        nll_weight=nll_weight,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        nll_normalizer=nll_normalizer,
        cu_seqlens=cu_seqlens,
    )
    mask_to_read = tokens_to_read(mask, nll_weight, config, tokens, cu_seqlens)
    with_grad = prepared.inputs.advantage
    if prepared.inputs.nll_weight is not None:
        with_grad = (with_grad != 0) | (prepared.inputs.nll_weight != 0)
    if packing is None:
        counted = prepared.sequences.keep if mask_to_read is None else mask_to_read
        packing = pack_tokens(counted, with_grad)
    else:
        check_packing(packing, mask_to_read, tokens, with_grad)
    # The reference policy comes first, so that only one whole head is gathered at a time.
    if has_reference and not over_vocabulary and ref_logprob is None:
        check_reference_head(hidden, weight, **reference)
        assert ref_hidden is not None and ref_weight is not None
        with torch.no_grad():
            ref_logprob = linear_token_stats(
                ref_hidden, ref_weight, tokens, bias=ref_bias, temperature=temperature,
                softcap=softcap, mask=mask_to_read, entropy=False, token_rows=token_rows,
                support=support, chunk_tokens=chunk_tokens, packing=packing,
                vocab_group=vocab_group,
            ).logprob  # fmt: skip
        ref_logprob = zero_masked(prepared.sequences, ref_logprob, ref_logprob.dtype)
        loss_inputs = prepared.inputs._replace(ref_logprob=ref_logprob)
        prepared = prepared._replace(inputs=loss_inputs)
    inputs = prepare_inputs(
        hidden,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        request=StatsRequest(entropy=True),  # for the metric
        kl=config.kl_estimator if over_vocabulary and has_reference else None,
        mask=mask_to_read,
        adapter=adapter,
        token_rows=token_rows,
        support=support,
        vocab_group=vocab_group,
        **(reference if over_vocabulary else {}),
    )
    per_sequence = advantages.shape != tokens.shape
    return loss_and_stats(
        hidden, inputs, prepared, packing, chunk_tokens, per_sequence=per_sequence
    )[0]


def loss_and_stats(
    hidden: Tensor,
    inputs: LMHeadInputs,
    prepared: PreparedLoss,
    packing: TokenPacking,
    chunk_tokens: int | None = None,
    *,
    per_sequence: bool,
) -> tuple[LossOutput, TokenStats]:
    """Compute the loss, and the detached statistics of its tokens, 0 where masked.

    `linear_grpo_loss` returns the loss; the TRL integration reads the statistics too.

    Args:
        hidden: as the caller passed it, the leaf of its gradient.
        per_sequence: all tokens of a sequence have one advantage.
    """
    config, loss_inputs = prepared.config, prepared.inputs
    shape = loss_inputs.advantage.shape
    leaves = inputs.leaves._replace(hidden=hidden)
    wanted = [leaf is not None and leaf.requires_grad for leaf in leaves]
    has_sampling = loss_inputs.sampling_logprob is not None
    skip_zero_grad = zero_advantage_has_zero_grad(config, per_sequence=per_sequence)
    if not (
        torch.is_grad_enabled()
        and any(wanted)
        and is_token_level(config, has_sampling=has_sampling)
    ):
        stats = run_linear_token_stats(
            inputs, packing, shape, chunk_tokens, skip_zero_grad=skip_zero_grad,
            entropy_grad=config.has_entropy_bonus,
        )  # fmt: skip
        detached = TokenStats._make(x if x is None else x.detach() for x in stats)
        return compute_loss(prepared, stats.logprob, stats.entropy, stats.kl), detached

    with torch.no_grad():
        *outputs, d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b = _forward(
            inputs,
            packing,
            chunk_tokens,
            skip_zero_grad,
            loss_inputs.map(torch.flatten),
            config.text,
            config.coefficients,
            wanted,
        )
        logprob, entropy, kl = outputs
        kl = None if inputs.kl is None else kl.view(shape)
        stats = TokenStats(logprob.view(shape), entropy.view(shape), kl)
        loss, metrics = compute_loss(prepared, stats.logprob, stats.entropy, stats.kl)
    grads = (d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b)
    trained = [
        (leaf, grad.view(leaf.shape))
        for leaf, grad, want in zip(leaves, grads, wanted, strict=True)
        if want and leaf is not None
    ]
    loss = attach_gradient(loss, [leaf for leaf, _ in trained], [grad for _, grad in trained])
    return LossOutput(loss, metrics), stats


def _check_kl_input(config: LossConfig, ref_logprob: Tensor | None, has_reference: bool) -> None:
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    if over_vocabulary and ref_logprob is not None:
        raise ValueError(
            f"kl_estimator={config.kl_estimator!r} reads ref_hidden and ref_weight, got ref_logprob"
        )
    if config.has_kl and not has_reference and ref_logprob is None:
        needed = "ref_hidden and ref_weight" if over_vocabulary else "ref_logprob or ref_hidden"
        raise ValueError(
            f"beta={config.beta} with kl_estimator={config.kl_estimator!r} needs {needed}, got None"
        )
