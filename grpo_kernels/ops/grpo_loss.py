"""`grpo_loss`: the objective on logits.

A token-level objective, where a gradient is wanted, computes it in the same launch as the
statistics; any other is `token_stats` followed by `policy_loss`.
"""

import torch
from torch import Tensor

from .. import checks
from ..backends import RowInputs, backend_for
from ..objective.kl_estimators import VOCABULARY_KL
from ..objective.policy_loss import (
    LossConfig,
    LossOutput,
    compute_loss,
    policy_loss,
    prepare_loss_inputs,
)
from ..objective.token_gradients import LossInputs, is_token_level
from .precomputed_gradient import attach_gradient
from .token_stats import _token_stats, as_rows, row_inputs, token_stats


@torch.library.custom_op("grpo_kernels::grpo_loss_", mutates_args={"d_logits"})
def _rows_(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    advantage: Tensor,
    weight: Tensor,
    entropy_weight: Tensor | None,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    sampling_logprob: Tensor | None,
    config: str,
    d_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    checks.check_token_ids(tokens, mask, logits.shape[-1])
    loss_inputs = LossInputs(
        advantage, weight, entropy_weight, old_logprob, ref_logprob, sampling_logprob
    )
    rows = RowInputs(logits, tokens, temperature, mask, None, softcap, None)
    return backend_for(logits).grpo_loss(rows, loss_inputs, LossConfig.decode(config), d_logits)


@_rows_.register_fake
def _(logits, tokens, temperature, *others):
    return temperature.new_empty(tokens.shape), temperature.new_empty(tokens.shape)


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
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
) -> LossOutput:
    """The loss of GRPO and its relatives from logits, without a probability tensor.

        stats = token_stats(logits, tokens)         log-prob, entropy and, if asked for, the KL
        loss, metrics = policy_loss(stats.logprob, advantages, entropy=stats.entropy, ...)

    The KL to the reference follows config.kl_estimator: "forward" and "reverse" are summed over
    the vocabulary and need `ref_logits`; the others estimate it on the sampled tokens from
    `ref_logprob` or, where that is None, from the log-probabilities under `ref_logits`. With
    beta = 0 the KL is only a metric, and computed when its input is given.

    Where a token's loss follows from the token alone, its gradient is made together with the loss,
    in one read and one write of the logits, and backward hands it out. Terms of whole sequences,
    filters that look at other tokens, a KL over the vocabulary, and fp16 logits, whose gradient
    needs the scale that comes with backward, take a second read then. Tokens without a
    gradient (masked, or advantage 0 with neither KL nor entropy in the loss) are not read for it.

    Args:
        logits: [B, T, V] or packed [N, V]; logits[:, t] predict tokens[:, t].
        tokens: [B, T] or [N], the sampled ids.
        advantages: [B] or [B, T]; packed: [N], or with `cu_seqlens` [sequences].
        inplace: the logits are overwritten with their gradient, by this call or by backward: no
            second tensor of their size is made. They must not be needed by anything else, and a
            second use raises.
        mask, temperature, softcap, ref_logits: as in `token_stats`.
        Others: as in `policy_loss`. `old_logprob` and `sampling_logprob` must be log-probabilities
            at the same temperature.

    Returns:
        LossOutput(loss, metrics); the loss is 0-dim, fp32 (fp64 for fp64 logits), differentiable
        in `logits`.

    Raises:
        ValueError, TypeError: as `token_stats` and `policy_loss`; or logits that an earlier
            inplace=True has consumed.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    checks.check_type("config", config, LossConfig)
    checks.check_logits("logits", logits)
    if ref_logits is not None:
        checks.check_logits("ref_logits", ref_logits)
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    settings = {"temperature": temperature, "softcap": softcap, "mask": mask}
    kl = config.kl_estimator if over_vocabulary and ref_logits is not None else None
    objective = {
        "mask": mask,
        "old_logprob": old_logprob,
        "sampling_logprob": sampling_logprob,
        "config": config,
        "normalizer": normalizer,
        "entropy_normalizer": entropy_normalizer,
        "cu_seqlens": cu_seqlens,
    }
    if kl is None and ref_logprob is None and ref_logits is not None:
        with torch.no_grad():
            ref_logprob = token_stats(ref_logits, tokens, entropy=False, **settings).logprob
    if kl is None and _gradient_comes_with_the_loss(config, logits, sampling_logprob):
        return _in_one_launch(
            logits, tokens, advantages, ref_logprob, objective, inplace, **settings
        )
    stats = _token_stats(
        logits, tokens, entropy=True, ref_logits=ref_logits if over_vocabulary else None, kl=kl,
        inplace=inplace, **settings,
    )  # fmt: skip
    if inplace:
        checks.mark_consumed(logits)
    return policy_loss(
        stats.logprob,
        advantages,
        ref_logprob=ref_logprob,
        entropy=stats.entropy,
        kl=stats.kl,
        **objective,
    )


def _gradient_comes_with_the_loss(
    config: LossConfig, logits: Tensor, sampling_logprob: Tensor | None
) -> bool:
    """Whether a gradient is wanted, and can be made before backward says how it is scaled.

    In fp16 it would underflow: a GradScaler's factor of 65,536 arrives in backward only.
    """
    wanted = torch.is_grad_enabled() and logits.requires_grad
    alone = is_token_level(config, has_sampling=sampling_logprob is not None)
    return wanted and alone and logits.dtype != torch.float16


def _in_one_launch(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    objective: dict,
    inplace: bool,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    mask: Tensor | None,
) -> LossOutput:
    config = objective["config"]
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    checks.check_kl_input(config.kl_estimator, config.beta, over_vocabulary, ref_logprob, None)
    inputs = row_inputs(logits, tokens, temperature, softcap, None, None, mask)
    rows, row_tokens, row_temperature, row_mask, _ = inputs
    prepared = prepare_loss_inputs(
        tokens.shape, row_temperature.dtype, advantages, ref_logprob=ref_logprob, **objective
    )
    if inplace:
        checks.mark_consumed(logits)
    rows = rows.detach()
    d_logits = rows if inplace else rows.new_empty(rows.shape)
    of_token = (
        each if each is None or each.dim() == 0 else as_rows(each.contiguous(), tokens.dim())
        for each in prepared.inputs
    )
    with torch.no_grad():
        stats = _rows_(
            rows, row_tokens, row_temperature, row_mask, softcap, *of_token,
            config.encode(), d_logits,
        )  # fmt: skip
        logprob, entropy = (each.view(tokens.shape) for each in stats)
        loss, metrics = compute_loss(prepared, logprob, entropy, None)
    d_logits = d_logits if tokens.dim() == 2 else d_logits.squeeze(0)
    return LossOutput(attach_gradient(loss, [logits], [d_logits]), metrics)
