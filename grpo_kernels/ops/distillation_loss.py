"""`distillation_loss`: the divergence of a student's distributions from a teacher's, from logits.

Top to bottom: the Jensen-Shannon divergence as an operator, the public function, and the sum of the
tokens' divergences that it shares with `linear_distillation_loss`. A KL is that of `token_stats`.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import RowInputs, RowStats, StatsRequest, backend_for
from ..objective import aggregation
from ..objective.config import LossConfig
from ..objective.policy_loss import LossOutput
from ..objective.sequences import Sequences
from ..validation import (
    expect_choice,
    expect_finite,
    expect_mask,
    expect_number,
    expect_tensor,
    suggest_keywords,
)
from .bundled_op import bundled_op
from .token_stats import check_logits, prepare_rows, token_stats
from .top_k_divergence import prepare_top_k, top_k_rows

DIVERGENCES = ("reverse", "forward", "jsd")
JSD_WEIGHTS = (1e-6, 1 - 1e-6)  # the bounds: beyond them w or 1 - w is lost in fp32
RESULTS = ("divergence", "entropy", "teacher_entropy", "top1_agreement")
TOP_K_RESULTS = (*RESULTS, "top_k_mass", "teacher_top_k_mass")
_MEAN = LossConfig(aggregation="token_mean")


@bundled_op("jsd_forward")
def _jsd_forward(
    rows: RowInputs, jsd_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, request = backend_for(rows.logits), StatsRequest(entropy=True, top_logprobs=1)
    policy = rows._replace(ref_logits=None, kl=None)
    student = backend.token_stats_forward(policy, request)
    teacher = backend.token_stats_forward(policy._replace(logits=rows.ref_logits), request)
    stats = student._replace(ref_row_lse=teacher.row_lse)
    jsd, kl_policy = backend.jsd_forward(rows, stats, jsd_weight)
    agrees = (student.top_ids == teacher.top_ids).squeeze(-1)
    if rows.mask is not None:
        agrees = agrees & rows.mask
    saved = (kl_policy, stats.row_lse, stats.ref_row_lse)
    return jsd, student.entropy, teacher.entropy, agrees, *saved


@_jsd_forward.register_fake
def _(rows: RowInputs, jsd_weight: float) -> tuple[Tensor, ...]:
    new, shape = rows.temperature.new_empty, rows.tokens.shape
    jsd, entropy, teacher_entropy, kl_policy = (new(shape) for _ in range(4))
    agrees, row_lse = new(shape, dtype=torch.bool), new((*shape, 2))
    return jsd, entropy, teacher_entropy, agrees, kl_policy, row_lse, torch.empty_like(row_lse)


@bundled_op("jsd_backward")
def _jsd_backward(
    rows: RowInputs,
    kl_policy: Tensor,
    row_lse: Tensor,
    ref_row_lse: Tensor,
    d_jsd: Tensor,
    jsd_weight: float,
) -> Tensor:
    d_logits = rows.logits.new_empty(rows.logits.shape)
    stats = RowStats(None, None, None, row_lse, ref_row_lse)
    backend = backend_for(rows.logits)
    backend.jsd_backward(rows, stats, kl_policy, d_jsd, jsd_weight, d_logits)
    return d_logits


@_jsd_backward.register_fake
def _(rows: RowInputs, *_: Any) -> Tensor:
    return rows.logits.new_empty(rows.logits.shape)


def _setup_context(ctx: Any, bundles: list, output: tuple[Tensor, ...]) -> None:
    rows, ctx.jsd_weight = bundles
    *tensors, ctx.softcap, ctx.kl = rows
    _, *others = output
    ctx.save_for_backward(*tensors, *others[-3:])
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_jsd: Tensor | None, *_: Any) -> tuple[Tensor | None]:
    if d_jsd is None:
        return (None,)
    *tensors, kl_policy, row_lse, ref_row_lse = ctx.saved_tensors
    rows = RowInputs._make((*tensors, ctx.softcap, ctx.kl))
    saved = (kl_policy, row_lse, ref_row_lse)
    return (_jsd_backward(rows, *saved, d_jsd.contiguous(), ctx.jsd_weight),)


_jsd_forward.register_autograd(_autograd, setup_context=_setup_context)


@suggest_keywords
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    teacher_top_logprobs: tuple[Tensor, Tensor] | None = None,
    divergence: str = "reverse",
    jsd_weight: float = 0.5,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LossOutput:
    """Compute the mean divergence of a student from a teacher, over the whole vocabulary.

        p = softmax(softcap · tanh(logits / softcap) / temperature), q of teacher_logits likewise
        reverse: KL(p‖q) = Σ p (ln p - ln q)        forward: KL(q‖p) = Σ q (ln q - ln p)
        jsd: (1 - w) KL(p‖m) + w KL(q‖m) with m = (1 - w) p + w q and w = jsd_weight
        loss = Σ token_weights · divergence / normalizer

    Args:
        logits: [B, T, V] or packed [N, V], of the student.
        teacher_logits: shape of `logits`, never differentiated.
        teacher_top_logprobs: in place of teacher_logits, (ids, logprobs), each [..., K] after the
            shape of the tokens: different ids and their log-probs, as an inference server returns
            those of the K most likely tokens. They are normalised over the whole vocabulary, at the
            teacher's own temperature; temperature and softcap are the student's alone. The sums go
            over K + 1 outcomes: the listed tokens, and the rest of the vocabulary with the rest of
            either model's probability, through which every logit has a gradient. Where a list is
            shorter, an id of -1 or a log-prob of -inf is no entry. If the list's probabilities sum
            to 1, or by rounding to more, the teacher's rest has one unit of rounding, 1.2e-7. A
            student without a token in the rest (K = V, or logits of -inf) has K outcomes, and q is
            renormalised over them.
        divergence: "reverse" seeks a mode of the teacher, "forward" covers all of them, "jsd" lies
            between them and is finite where one model excludes what the other does not.
        jsd_weight: from 1e-6 to 1 - 1e-6; the weight of the teacher in the mixture, TRL's `beta`.
        mask: loss mask [B, T] or [N], bool or 0/1. Masked rows are not read.
        token_weights: shape of the tokens, finite; each token's weight in the loss. The metrics,
            and the default of `normalizer`, are without them.
        normalizer: > 0, replaces the denominator, the number of unmasked tokens.
        temperature, softcap: as in `token_stats`, for both models. The gradient is that of the
            divergence at this temperature; it is not multiplied by temperature².

    Returns:
        LossOutput(loss, metrics); the loss is 0-dim, fp32 (fp64 for fp64 logits), differentiable in
        `logits`. The metrics are means over the unmasked tokens, in nats: divergence; entropy, the
        student's; teacher_entropy; top1_agreement, the fraction of tokens whose argmax is the same
        in both models; and num_tokens. With teacher_top_logprobs, teacher_entropy is that of the
        K + 1 outcomes, and there are top_k_mass and teacher_top_k_mass, the probabilities that the
        student and the teacher give to the listed tokens.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value. Lists with an id twice or
            outside [0, V), or with probabilities that sum to more than 1.01, raise on the CPU and
            give a NaN on a GPU.

    Hinton et al., 2015 (arXiv:1503.02531); Agarwal et al., 2023 (arXiv:2306.13649).
    """
    check_divergence(divergence, jsd_weight)
    check_logits("logits", logits)
    check_one_teacher({"teacher_logits": teacher_logits}, teacher_top_logprobs)
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    check_token_weights(token_weights, tokens, mask)
    if teacher_logits is not None:
        check_logits("teacher_logits", teacher_logits)
        expect_tensor("teacher_logits", teacher_logits, shape=logits.shape, device_of=logits)
        teacher_logits = teacher_logits.detach()
    if teacher_logits is None:
        rows, _ = prepare_rows(logits, tokens, temperature, softcap, None, None, mask, None)
        top_k = prepare_top_k(
            teacher_top_logprobs, tokens, mask, logits.shape[-1], rows.temperature.dtype
        )
        per_token, metrics, *_ = top_k_rows(rows, top_k, divergence, jsd_weight)
        others = [x.view(tokens.shape) for x in metrics.unbind(-1)]
        per_token = per_token.view(tokens.shape)
    elif divergence == "jsd":
        rows, _ = prepare_rows(
            logits, tokens, temperature, softcap, teacher_logits, "reverse", mask, None
        )
        results = _jsd_forward(rows, jsd_weight)[:4]
        per_token, *others = (x.view(tokens.shape) for x in results)
    else:
        settings: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "mask": mask}
        teacher = token_stats(teacher_logits, tokens, top_logprobs=1, **settings)
        assert teacher.top_ids is not None
        top_id = teacher.top_ids[..., 0]
        stats = token_stats(
            logits, top_id, kl=divergence, ref_logits=teacher_logits, is_top1=True, **settings
        )
        assert stats.kl is not None
        per_token, others = stats.kl, [stats.entropy, teacher.entropy, stats.is_top1]
    weight = divergence_weights(tokens, mask, token_weights, normalizer, per_token.dtype)
    return distillation_output(weight, mask, per_token, others)


def check_divergence(divergence: str, jsd_weight: float) -> None:
    expect_choice("divergence", divergence, DIVERGENCES)
    least, most = JSD_WEIGHTS
    expect_number("jsd_weight", jsd_weight, at_least=least, at_most=most)


def check_one_teacher(whole: dict[str, Tensor | None], top_logprobs: object) -> None:
    """Expect one form of the teacher: tensors by name, or its most likely tokens."""
    given = [name for name, tensor in whole.items() if tensor is not None]
    names = " and ".join(list(whole)[:2])
    if top_logprobs is None and not given:
        raise ValueError(f"{names}, or teacher_top_logprobs, must be given, got none of them")
    if top_logprobs is not None and given:
        raise ValueError(
            f"teacher_top_logprobs replaces {names}, got it together with {' and '.join(given)}"
        )


def check_token_weights(token_weights: Tensor | None, tokens: Tensor, mask: Tensor | None) -> None:
    """Check the weights of the tokens; those of masked ones may be anything."""
    if token_weights is None:
        return
    expect_tensor(
        "token_weights", token_weights, floating=True, shape=tokens.shape, device_of=tokens
    )
    expect_mask(mask, tokens)
    kept = token_weights if mask is None else torch.where(mask != 0, token_weights, 0)
    expect_finite("token_weights", kept)


def divergence_weights(
    tokens: Tensor,
    mask: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the factor of each token's divergence in the loss, 0 where masked."""
    aggregation.check_normalizers(_MEAN, normalizer, None, None, tokens.device)
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    factor = aggregation.token_weights(Sequences(keep, None), _MEAN, normalizer, dtype)
    if token_weights is None:
        return factor
    return torch.where(keep, factor * token_weights.detach().to(dtype), 0.0)


def distillation_output(
    weight: Tensor, mask: Tensor | None, per_token: Tensor, others: list[Any]
) -> LossOutput:
    """Sum the divergences of tokens; average all results, 0 where masked, over the unmasked ones.

    others: in the order of RESULTS, or TOP_K_RESULTS, after the divergence.
    """
    count = per_token.new_full((), per_token.numel()) if mask is None else mask.bool().sum()
    count, names = count.to(per_token.dtype), TOP_K_RESULTS[: 1 + len(others)]
    metrics = {
        name: x.detach().to(per_token.dtype).sum() / count.clamp(min=1)
        for name, x in zip(names, (per_token, *others), strict=True)
    }
    terms = torch.where(weight == 0, 0.0, weight * per_token)
    return LossOutput(terms.sum(), metrics | {"num_tokens": count})
