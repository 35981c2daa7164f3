"""`distillation_loss`: the divergence of a student's distributions from a teacher's, from logits.

Top to bottom: the Jensen-Shannon divergence as an operator, the public function, and the sum of the
tokens' divergences that it shares with `linear_distillation_loss`. A KL is that of `token_stats`.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import RowInputs, RowStats, StatsRequest, backend_for
from ..objective.aggregation import check_normalizers, token_weights
from ..objective.config import LossConfig
from ..objective.policy_loss import LossOutput
from ..objective.sequences import Sequences
from ..validation import expect_choice, expect_number, expect_tensor, suggest_keywords
from .bundled_op import bundled_op
from .token_stats import check_logits, prepare_rows, token_stats

DIVERGENCES = ("reverse", "forward", "jsd")
_MEAN = LossConfig(aggregation="token_mean")


@bundled_op("grpo_kernels::jsd_forward")
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
    saved = (kl_policy, stats.row_lse, stats.ref_row_lse)
    return jsd, student.entropy, teacher.entropy, agrees, *saved


@_jsd_forward.register_fake
def _(rows: RowInputs, jsd_weight: float) -> tuple[Tensor, ...]:
    new, shape = rows.temperature.new_empty, rows.tokens.shape
    jsd, entropy, teacher_entropy, kl_policy = (new(shape) for _ in range(4))
    agrees, row_lse = new(shape, dtype=torch.bool), new((*shape, 2))
    return jsd, entropy, teacher_entropy, agrees, kl_policy, row_lse, torch.empty_like(row_lse)


@bundled_op("grpo_kernels::jsd_backward")
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
    teacher_logits: Tensor,
    *,
    divergence: str = "reverse",
    jsd_weight: float = 0.5,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LossOutput:
    """Compute the mean divergence of a student from a teacher, over the whole vocabulary.

        p = softmax(softcap · tanh(logits / softcap) / temperature), q of teacher_logits likewise
        reverse: KL(p‖q) = Σ p (ln p - ln q)        forward: KL(q‖p) = Σ q (ln q - ln p)
        jsd: (1 - w) KL(p‖m) + w KL(q‖m) with m = (1 - w) p + w q and w = jsd_weight
        loss = Σ divergence / normalizer

    Args:
        logits: [B, T, V] or packed [N, V], of the student.
        teacher_logits: shape of `logits`, never differentiated.
        divergence: "reverse" seeks a mode of the teacher, "forward" covers all of them, "jsd" lies
            between them and is finite where one model excludes what the other does not.
        jsd_weight: between 0 and 1; the weight of the teacher in the mixture, TRL's `beta`.
        mask: loss mask [B, T] or [N], bool or 0/1. Masked rows are not read.
        normalizer: > 0, replaces the denominator, the number of unmasked tokens.
        temperature, softcap: as in `token_stats`, for both models. The gradient is that of the
            divergence at this temperature; it is not multiplied by temperature².

    Returns:
        LossOutput(loss, metrics); the loss is 0-dim, fp32 (fp64 for fp64 logits), differentiable in
        `logits`. The metrics are means over the unmasked tokens, in nats: divergence; entropy, the
        student's; teacher_entropy; top1_agreement, the fraction of tokens whose argmax is the same
        in both models; and num_tokens.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value.

    Hinton et al., 2015 (arXiv:1503.02531); Agarwal et al., 2023 (arXiv:2306.13649).
    """
    check_divergence(divergence, jsd_weight)
    check_logits("logits", logits)
    check_logits("teacher_logits", teacher_logits)
    expect_tensor("teacher_logits", teacher_logits, shape=logits.shape, device_of=logits)
    teacher_logits = teacher_logits.detach()
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if divergence == "jsd":
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
        per_token, others = stats.kl, [stats.entropy, teacher.entropy, stats.is_top1]
    weight = divergence_weights(tokens, mask, normalizer, per_token.dtype)
    metrics = distillation_metrics(tokens, mask, per_token, *others)
    return LossOutput((weight * per_token).sum(), metrics)


def check_divergence(divergence: str, jsd_weight: float) -> None:
    expect_choice("divergence", divergence, DIVERGENCES)
    expect_number("jsd_weight", jsd_weight, above=0, below=1)


def divergence_weights(
    tokens: Tensor, mask: Tensor | None, normalizer: float | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute the weight of each token's divergence in the loss, 0 where masked."""
    check_normalizers(_MEAN, normalizer, None, None)
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    return token_weights(Sequences(keep, None), _MEAN, normalizer, dtype)


def distillation_metrics(
    tokens: Tensor,
    mask: Tensor | None,
    divergence: Tensor,
    entropy: Tensor,
    teacher_entropy: Tensor,
    agrees: Tensor,
) -> dict[str, Tensor]:
    """Average per-token results, which are 0 where masked, over the unmasked tokens."""
    dtype = divergence.dtype
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    count = keep.sum().to(dtype)
    named = {
        "divergence": divergence,
        "entropy": entropy,
        "teacher_entropy": teacher_entropy,
        "top1_agreement": agrees.to(dtype),
    }
    means = {name: x.detach().sum() / count.clamp(min=1) for name, x in named.items()}
    return means | {"num_tokens": count}
