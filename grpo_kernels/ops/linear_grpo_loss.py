"""`linear_grpo_loss`: the objective from hidden states, with its gradient ready when the loss is.

The operator walks over the chunks once. Of each it makes the logits, their statistics and the
gradient of its tokens' loss, which goes back through the logits at once, while they exist: three
matrix products, nothing computed twice. Backward only scales.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..lm_head.chunk_loop import ChunkedLMHead, LMHeadGrad, LMHeadInputs, RowStats, grad_dtype
from ..lm_head.inputs import check_reference, prepare_inputs
from ..lm_head.token_order import TokenPacking, pack_tokens
from ..objective.kl_estimators import VOCABULARY_KL
from ..objective.policy_loss import LossConfig, LossOutput, compute_loss, prepare_loss_inputs
from ..objective.token_gradients import LossInputs, is_token_level, zero_advantage_has_zero_grad
from .linear_token_stats import (
    _linear_token_stats,
    linear_token_stats,
    stats_outputs,
    token_stats_of,
)
from .precomputed_gradient import attach_gradient
from .token_stats import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.library.custom_op("grpo_kernels::linear_grpo_loss_forward", mutates_args=())
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
    advantage: Tensor,
    token_weight: Tensor,
    entropy_weight: Tensor | None,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    sampling_logprob: Tensor | None,
    config: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = LMHeadInputs(
        hidden, weight, bias, tokens, temperature, ref_hidden, ref_weight, ref_bias,
        softcap, entropy, kl, dtype, vocab_group,
    )  # fmt: skip
    loss_inputs = LossInputs(
        advantage, token_weight, entropy_weight, old_logprob, ref_logprob, sampling_logprob
    )
    live, inert = counts.tolist()
    order = order[: live + inert]
    if vocab_group is None:
        checks.check_token_ids(tokens[order], None, weight.shape[0])
    stats = RowStats.zeros(inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = ChunkedLMHead(inputs, len(order), chunk_tokens, gradient=True)
        attach_gradient = live if skip_inert else len(order)
        gradient = LMHeadGrad(rows, attach_gradient, wanted)
        for at in rows.chunks(order[:attach_gradient]):
            rows.write_logits(at)
            chunk, d_logits = rows.loss_gradient(at, loss_inputs.at(at), LossConfig.decode(config))
            stats.write(at, chunk)
            gradient.add(at, d_logits)
        for at in rows.chunks(order[attach_gradient:]):
            rows.write_logits(at)
            stats.write(at, rows.forward(at))
    found = (stats.logprob, stats.entropy, stats.kl, *gradient.total(vocab_group))
    return tuple(temperature.new_empty(0) if each is None else each for each in found)


@_forward.register_fake
def _(*arguments):
    inputs, wanted = LMHeadInputs(*arguments[: len(LMHeadInputs._fields)]), arguments[-1]
    new, done = inputs.temperature.new_empty, grad_dtype(inputs)
    stats = stats_outputs(inputs.temperature, inputs.entropy, inputs.kl is not None)[:3]
    gradients = (
        new(each.shape if want else (0,), dtype=done if each.dim() == 2 else None)
        for each, want in zip((*inputs[:2], inputs.weight[:, 0]), wanted, strict=True)
    )
    return (*stats, *gradients)


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
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
    vocab_group: "ProcessGroup | None" = None,
) -> LossOutput:
    """`grpo_loss` of logits = hidden @ weight.T + bias, which never exist but for a chunk.

    A token-level objective computes its gradient with the loss: 6·n·V·H floating-point operations
    for n tokens, three matrix products, and a backward that only scales by the gradient that comes
    in. Where a token's loss depends on other tokens (a ratio of the sequence, a filter of the
    batch), the log-probs come before the first gradient, so that the logits are made twice:
    8·n·V·H. Under torch.no_grad it is 2·n·V·H.

    Masked tokens are in no product. Tokens without a learning signal (advantage 0, with neither KL
    nor entropy in the loss: every group whose rewards are all equal) are in that of the statistics,
    for the metrics, and in no other.

    The memory taken beside the results is about 1 GiB of workspace and the gradients in fp32,
    whatever the number of tokens.

    Args:
        hidden: [B, T, H] or packed [N, H]; weight: [V, H]; bias: [V].
        ref_hidden, ref_weight, ref_bias: the reference's, for config.kl_estimator as `ref_logits`
            in `grpo_loss`; a KL over the vocabulary is computed in the same pass.
        packing: `pack_tokens(mask, advantages)`, made in advance, so that nothing waits for the
            device.
        chunk_tokens, temperature, softcap, vocab_group: as in `linear_token_stats`. In shards of
            the vocabulary too a token-level objective takes three products; the statistics of a
            chunk are merged over the ranks before its gradient is made.
        Others: as in `policy_loss`.

    Returns:
        LossOutput(loss, metrics); the loss is 0-dim, fp32 (fp64 for fp64 hidden), differentiable
        in `hidden`, `weight` and `bias`.

    Raises:
        ValueError, TypeError: as `linear_token_stats` and `policy_loss`.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    output, _ = linear_grpo_loss_and_stats(
        hidden,
        weight,
        tokens,
        advantages,
        bias=bias,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        sampling_logprob=sampling_logprob,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        cu_seqlens=cu_seqlens,
        temperature=temperature,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        packing=packing,
        vocab_group=vocab_group,
    )
    return output


def linear_grpo_loss_and_stats(
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
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
    vocab_group: "ProcessGroup | None" = None,
) -> tuple[LossOutput, TokenStats]:
    """`linear_grpo_loss`, and the detached statistics of its tokens, 0 where masked."""
    checks.check_type("config", config, LossConfig)
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    has_reference = any(each is not None for each in reference.values())
    checks.check_linear_kl_input(
        config.kl_estimator, config.beta, over_vocabulary, ref_logprob, has_reference
    )
    checks.check_hidden(hidden)
    checks.expect_tensor("weight", weight, floating=True)
    checks.check_tokens(tokens, hidden, "hidden")
    checks.check_chunk_tokens(chunk_tokens)
    asked = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "mask": mask,
        "entropy": True,
        "kl": config.kl_estimator if over_vocabulary and has_reference else None,
        "vocab_group": vocab_group,
        **(reference if over_vocabulary else dict.fromkeys(reference)),
    }
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    prepared = prepare_loss_inputs(
        tokens.shape,
        acc,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        sampling_logprob=sampling_logprob,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        cu_seqlens=cu_seqlens,
    )
    if packing is None:
        packing = pack_tokens(prepared.sequences.keep, prepared.inputs.advantage)
    checks.check_packing(packing, mask, tokens)
    checks.check_packed_advantages(packing, prepared.inputs.advantage)
    chunking = {"chunk_tokens": chunk_tokens, "packing": packing}
    if has_reference and not over_vocabulary and ref_logprob is None:
        check_reference(hidden, weight, reference)
        with torch.no_grad():
            ref_logprob = linear_token_stats(
                ref_hidden, ref_weight, tokens, bias=ref_bias, temperature=temperature,
                softcap=softcap, entropy=False, mask=mask, vocab_group=vocab_group, **chunking,
            ).logprob  # fmt: skip
        loss_inputs = prepared.inputs._replace(ref_logprob=ref_logprob)
        prepared = prepared._replace(inputs=loss_inputs)

    wanted = [isinstance(each, Tensor) and each.requires_grad for each in (hidden, weight, bias)]
    skip_inert = zero_advantage_has_zero_grad(config, per_sequence=advantages.shape != tokens.shape)
    alone = is_token_level(config, has_sampling=sampling_logprob is not None)
    if not (alone and torch.is_grad_enabled() and any(wanted)):
        stats = _linear_token_stats(
            hidden, weight, tokens, skip_inert=skip_inert, **chunking, **asked
        )
        detached = TokenStats(*(each if each is None else each.detach() for each in stats))
        return compute_loss(prepared, *stats), detached

    inputs = prepare_inputs(hidden, weight, tokens, **asked)
    with torch.no_grad():
        *outputs, d_hidden, d_weight, d_bias = _forward(
            *inputs,
            *packing,
            chunk_tokens,
            skip_inert,
            *(
                each if each is None or each.dim() == 0 else each.flatten()
                for each in prepared.inputs
            ),
            config.encode(),
            wanted,
        )
        d_hidden = d_hidden.view(hidden.shape) if wanted[0] else d_hidden
        stats = token_stats_of(outputs, tokens.shape, True, asked["kl"])
        loss, metrics = compute_loss(prepared, *stats)
    leaves, gradients = (hidden, *inputs[1:3]), (d_hidden, d_weight, d_bias)
    pairs = [pair for *pair, want in zip(leaves, gradients, wanted, strict=True) if want]
    return LossOutput(attach_gradient(loss, *zip(*pairs, strict=True)), metrics), stats
