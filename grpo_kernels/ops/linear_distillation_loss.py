"""`linear_distillation_loss`: `distillation_loss` from hidden states, in one pass over the chunks.

While the logits of a chunk exist in both models, the operator computes their divergence, its
gradient in the student's logits, and from that d_hidden and d_weight: four matrix products, two of
them for the logits. Backward only scales.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.interface import StatsRequest
from ..lm_head.chunk_loop import Chunk, ChunkedLMHead, LogitGrad
from ..lm_head.head_gradient import LMHeadGrad, sum_parts
from ..lm_head.inputs import (
    HIDDEN_LAYOUT,
    HeadAdapter,
    LMHeadInputs,
    check_head,
    check_reference_head,
    prepare_inputs,
)
from ..lm_head.row_groups import RowGroups
from ..lm_head.token_order import TokenPacking, resolve_token_order
from ..objective.policy_loss import LossOutput
from ..objective.token_gradients import TokenGrads
from ..validation import expect_tensor, suggest_keywords
from .bundled_op import bundled_op
from .distillation_loss import (
    RESULTS,
    TOP_K_RESULTS,
    check_divergence,
    check_one_teacher,
    check_token_weights,
    distillation_output,
    divergence_weights,
)
from .linear_token_stats import check_chunk_tokens, counted_tokens
from .precomputed_gradient import attach_gradient
from .top_k_divergence import TopKTeacher, prepare_top_k

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@bundled_op("linear_distillation_loss_forward")
def _forward(
    inputs: LMHeadInputs,
    packing: TokenPacking,
    chunk_tokens: int | None,
    teacher: TopKTeacher,
    weight: Tensor,
    divergence: str,
    jsd_weight: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    token_idx = counted_tokens(inputs, packing)
    results = inputs.temperature.new_zeros((_num_results(teacher), len(weight)))
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        head = ChunkedLMHead(inputs, len(token_idx), chunk_tokens, wanted=wanted)
        head_grad = LMHeadGrad(head, len(token_idx), wanted)
        for chunk in head.chunks(RowGroups.of(token_idx, None)):
            d_divergence = weight[chunk.token_idx] if any(wanted) else None
            if teacher.columns is not None and teacher.logq is not None:
                top_k = chunk.top_k_divergence(
                    teacher.columns[chunk.token_idx], teacher.logq[chunk.token_idx],
                    divergence, jsd_weight,
                )  # fmt: skip
                chunk_results = top_k.result[: len(results)]
                grad = None
                if d_divergence is not None:
                    grad = chunk.top_k_grad(top_k, d_divergence)
            else:
                chunk_results, grad = _whole_vocabulary(chunk, divergence, jsd_weight, d_divergence)
            for whole, part in zip(results, chunk_results, strict=True):
                assert part is not None
                whole.index_copy_(0, chunk.token_idx, part.to(whole.dtype))
            if grad is not None:
                head_grad.add(chunk, grad)
        grads = sum_parts(inputs, [(head_grad.finish(), None)])
    d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b = (
        inputs.temperature.new_empty(0) if grad is None else grad for grad in grads
    )
    return results, d_hidden, d_weight, d_bias, d_adapter_a, d_adapter_b


def _whole_vocabulary(
    chunk: Chunk, divergence: str, jsd_weight: float, d_divergence: Tensor | None
) -> tuple[tuple[Tensor | None, ...], LogitGrad | None]:
    """Compute the results of a chunk, in the order of RESULTS, and the gradient of its logits."""
    teacher, kl_policy = chunk.reference().stats(), None
    if divergence == "jsd":
        stats = chunk.policy().stats()._replace(ref_row_lse=teacher.row_lse)
        per_token, kl_policy = chunk.jsd(stats, jsd_weight)
    else:
        stats = chunk.stats()
        per_token = stats.kl
    assert stats.top_ids is not None and teacher.top_ids is not None
    agrees = (stats.top_ids == teacher.top_ids).squeeze(-1)
    results = (per_token, stats.entropy, teacher.entropy, agrees)
    if d_divergence is None:
        return results, None
    if kl_policy is None:
        return results, chunk.grad(stats, TokenGrads(None, None, d_divergence))
    return results, chunk.jsd_grad(stats, kl_policy, d_divergence, jsd_weight)


def _num_results(teacher: TopKTeacher) -> int:
    return len(RESULTS) if teacher.columns is None else len(TOP_K_RESULTS)


@_forward.register_fake
def _(
    inputs: LMHeadInputs,
    packing: TokenPacking,
    chunk_tokens: int | None,
    teacher: TopKTeacher,
    weight: Tensor,
    divergence: str,
    jsd_weight: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    new, dtypes = inputs.temperature.new_empty, inputs.grad_dtypes
    grads = (
        new(leaf.shape, dtype=dtype) if want and leaf is not None else new(0)
        for leaf, dtype, want in zip(inputs.leaves, dtypes, wanted, strict=True)
    )
    return new((_num_results(teacher), *weight.shape)), *grads


@suggest_keywords
def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_top_logprobs: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "reverse",
    jsd_weight: float = 0.5,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    adapter: HeadAdapter | None = None,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
    vocab_group: "ProcessGroup | None" = None,
) -> LossOutput:
    """Compute `distillation_loss` of logits = hidden @ weight.T + bias, a chunk at a time.

    The gradient is computed with the loss: four matrix products, 8·n·V·H floating-point operations
    for n unmasked tokens and two models of one width; three with a frozen head, two without a
    gradient. With `teacher_top_logprobs` there is one model, and one product less. Backward only
    scales. Masked tokens cost nothing. The memory taken beside the results is the workspace
    of `linear_token_stats` and the gradients in fp32, whatever the number of tokens.

    Args:
        hidden: [B, T, H] or packed [N, H], of the student; weight: [V, H]; bias: [V].
        teacher_hidden, teacher_weight, teacher_bias: the teacher's, for the same tokens and
            vocabulary, never differentiated. Its hidden size may differ.
        adapter: a LoRA on the student's head.
        chunk_tokens, packing, vocab_group: as in `linear_token_stats`; with a vocab_group,
            `teacher_weight` and `teacher_bias` are this rank's rows too, and the ids of
            `teacher_top_logprobs` are those of the whole vocabulary.
        teacher_top_logprobs, divergence, jsd_weight, mask, token_weights, normalizer,
            temperature, softcap: as in `distillation_loss`.

    Returns:
        LossOutput(loss, metrics) as `distillation_loss`; the loss is differentiable in `hidden`,
        `weight`, `bias` and the adapter's `a` and `b`.

    Raises:
        ValueError, TypeError: as `linear_token_stats` and `distillation_loss`.
    """
    check_divergence(divergence, jsd_weight)
    check_chunk_tokens(chunk_tokens)
    expect_tensor("hidden", hidden, floating=True, dims=(2, 3), layout=HIDDEN_LAYOUT)
    check_head("", hidden, weight, bias)
    named = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    check_one_teacher(named | {"teacher_bias": teacher_bias}, teacher_top_logprobs)
    has_states = teacher_top_logprobs is None
    if has_states:
        check_reference_head(
            hidden, weight, teacher_hidden, teacher_weight, teacher_bias, "teacher_"
        )
    tokens = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    check_token_weights(token_weights, tokens, mask)
    inputs = prepare_inputs(
        hidden,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        request=StatsRequest(entropy=True, top_logprobs=int(has_states)),  # for the metrics
        ref_hidden=teacher_hidden,
        ref_weight=teacher_weight,
        ref_bias=teacher_bias,
        # A JSD reads the teacher's logits too.
        kl=None if not has_states else "reverse" if divergence == "jsd" else divergence,
        mask=mask,
        adapter=adapter,
        vocab_group=vocab_group,
    )
    packing = resolve_token_order(packing, mask, tokens)
    dtype, teacher = inputs.temperature.dtype, TopKTeacher()
    if not has_states:
        teacher = prepare_top_k(
            teacher_top_logprobs, tokens, mask, len(inputs.weight), dtype, vocab_group
        )
    leaves = inputs.leaves._replace(hidden=hidden)
    wanted = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves
    ]
    with torch.no_grad():
        of_tokens = divergence_weights(tokens, mask, token_weights, normalizer, dtype)
        results, *grads = _forward(
            inputs, packing, chunk_tokens, teacher, of_tokens.flatten(), divergence, jsd_weight,
            wanted,
        )  # fmt: skip
        per_token, *others = results.view(len(results), *tokens.shape)
        loss, metrics = distillation_output(of_tokens, mask, per_token, others)
    trained = [
        (leaf, grad.view(leaf.shape))
        for leaf, grad, want in zip(leaves, grads, wanted, strict=True)
        if want and leaf is not None
    ]
    if trained:
        loss = attach_gradient(loss, [leaf for leaf, _ in trained], [grad for _, grad in trained])
    return LossOutput(loss, metrics)
