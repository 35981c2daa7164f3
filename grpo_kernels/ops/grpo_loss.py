"""`grpo_loss`: the objective on logits.

A token-level objective computes its gradient in the launch of the statistics, where a gradient is
wanted. Any other objective is `token_stats` followed by `policy_loss`.
"""

import torch
from torch import Tensor

from ..backends import RowInputs, StatsRequest, row_support
from ..backends.row_support import RowSupport
from ..objective.config import LossConfig, expect_config, in_compiled_code
from ..objective.kl_estimators import VOCABULARY_KL
from ..objective.policy_loss import (
    LossOutput,
    PreparedLoss,
    check_kl_input,
    compute_loss,
    prepare_loss_inputs,
    tokens_to_read,
)
from ..objective.ratios import LossInputs
from ..objective.token_gradients import is_token_level
from ..sampling_support import TokenSupport
from ..validation import expect_token_ids, suggest_keywords
from .bundled_op import bundled_op
from .precomputed_gradient import attach_gradient
from .token_stats import (
    check_logits,
    mark_consumed,
    prepare_rows,
    run_token_stats,
    token_stats,
)


# The operator has one argument per field of a bundle. The config reaches it as `decode` takes it.
@bundled_op("grpo_loss_", mutates_args={"d_logits"})
def _forward_(
    rows: RowInputs,
    support: RowSupport,
    loss_inputs: LossInputs,
    config: str,
    coefficients: Tensor,
    d_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    expect_token_ids(rows.tokens, rows.mask, rows.logits.shape[-1])
    loss_config = LossConfig.decode(config, coefficients)
    return row_support.grpo_loss(rows, support, loss_inputs, loss_config, d_logits)


@_forward_.register_fake
def _(rows: RowInputs, *_) -> tuple[Tensor, Tensor]:
    shape = rows.tokens.shape
    return rows.temperature.new_empty(shape), rows.temperature.new_empty(shape)


@suggest_keywords
def grpo_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    ref_logits: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    nll_weight: Tensor | None = None,
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: TokenSupport | None = None,
    inplace: bool = False,
) -> LossOutput:
    """Compute the loss of GRPO and its relatives from logits, without a probability tensor.

        stats = token_stats(logits, tokens)         log-prob, entropy and, if asked for, the KL
        loss, metrics = policy_loss(stats.logprob, advantages, entropy=stats.entropy, ...)

    The KL to the reference policy follows config.kl_estimator. "forward" and "reverse" are sums
    over the vocabulary and need `ref_logits`. The others estimate it on the sampled tokens from
    `ref_logprob` or, where that is None, from the log-probabilities under `ref_logits`. With
    beta = 0 the KL is only a metric, computed when its input is given.

    A token-level loss computes its gradient together with the loss, in one read and one write of
    the logits; backward only scales it. A second read is needed for terms of whole sequences, for
    filters that rank tokens, for a KL over the vocabulary, and for fp16 logits, whose gradient
    needs the loss scale that arrives in backward. Tokens without a gradient (masked, or with
    advantage 0 and no KL, entropy bonus or penalty in the loss) are not read for it.

    Args:
        logits: [B, T, V] or packed [N, V]; logits[:, t] predict tokens[:, t].
        tokens: [B, T] or [N], the sampled ids.
        advantages: [B] or [B, T]; packed: [N], or with `cu_seqlens` [sequences].
        inplace: overwrite the logits with their gradient, in this call or in backward, so that no
            second tensor of their size is made. Nothing else may need them, and a second use
            raises.
        mask, temperature, softcap, ref_logits, support: as in `token_stats`.
        Others: as in `policy_loss`. `old_logprob`, `ref_logprob` and `sampling_logprob` must be
            log-probabilities at the same temperature and over the same support.

    Returns:
        LossOutput(loss, metrics); the loss is 0-dim, fp32 (fp64 for fp64 logits), differentiable
        in `logits`.

    Raises:
        ValueError, TypeError: as `token_stats` and `policy_loss`; or logits that an earlier
            inplace=True has consumed.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    expect_config(config)
    config = in_compiled_code(config)
    check_logits("logits", logits)
    if ref_logits is not None:
        check_logits("ref_logits", ref_logits)
    mask_to_read = tokens_to_read(mask, nll_weight, config, logits[..., 0], cu_seqlens)
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    kl_logits = ref_logits if over_vocabulary else None
    kl = None if kl_logits is None else config.kl_estimator
    if not over_vocabulary and ref_logprob is None and ref_logits is not None:
        with torch.no_grad():
            ref_logprob = token_stats(
                ref_logits, tokens, entropy=False, temperature=temperature, softcap=softcap,
                mask=mask_to_read, support=support,
            ).logprob  # fmt: skip
    check_kl_input(config, ref_logprob, kl_logits)
    rows, prepared_support = prepare_rows(
        logits, tokens, temperature, softcap, kl_logits, kl, mask_to_read, support
    )
    prepared = prepare_loss_inputs(
        tokens,
        rows.temperature.dtype,
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

    # In fp16 the gradient would underflow: a GradScaler's factor arrives in backward only.
    wants_grad = torch.is_grad_enabled() and logits.requires_grad and logits.dtype != torch.float16
    has_sampling = sampling_logprob is not None
    if wants_grad and kl is None and is_token_level(config, has_sampling=has_sampling):
        if inplace:
            mark_consumed(logits)
        return _loss_with_gradient(logits, rows, prepared_support, prepared, inplace)
    stats = run_token_stats(rows, prepared_support, tokens.shape, StatsRequest(), inplace=inplace)
    if inplace:  # not before: a call that raises leaves the logits usable
        mark_consumed(logits)
    return compute_loss(prepared, stats.logprob, stats.entropy, stats.kl)


def _loss_with_gradient(
    logits: Tensor, rows: RowInputs, support: RowSupport, prepared: PreparedLoss, inplace: bool
) -> LossOutput:
    """Compute a token-level loss and, in the same launch, its gradient."""
    rows = rows._replace(logits=rows.logits.detach())
    d_logits = rows.logits if inplace else rows.logits.new_empty(rows.logits.shape)
    loss_inputs = prepared.inputs.map(lambda x: x.contiguous().view(rows.tokens.shape))
    with torch.no_grad():
        config = prepared.config
        stats = _forward_(rows, support, loss_inputs, config.text, config.coefficients, d_logits)
        logprob, entropy = (x.view(logits.shape[:-1]) for x in stats)
        loss, metrics = compute_loss(prepared, logprob, entropy, None)
    return LossOutput(attach_gradient(loss, [logits], [d_logits.view(logits.shape)]), metrics)
