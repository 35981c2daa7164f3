"""`grpo_loss`: the objective on logits, as token statistics followed by `policy_loss`."""

import torch
from torch import Tensor

from .. import checks
from ..objective import LossConfig, LossOutput, policy_loss
from ..terms import VOCABULARY_KL
from .token_stats import _token_stats, token_stats


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

    Tokens without a gradient (masked, or advantage 0 with neither KL nor entropy in the loss) are
    not read in backward.

    Args:
        logits: [B, T, V] or packed [N, V]; logits[:, t] predict tokens[:, t].
        tokens: [B, T] or [N], the sampled ids.
        advantages: [B] or [B, T]; packed: [N], or with `cu_seqlens` [sequences].
        inplace: backward overwrites the logits with their gradient: no second tensor of their
            size is made. The logits must not be needed by anything else, and a second use raises.
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
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    settings = {"temperature": temperature, "softcap": softcap, "mask": mask}
    kl = config.kl_estimator if over_vocabulary and ref_logits is not None else None
    stats = _token_stats(
        logits,
        tokens,
        entropy=True,
        ref_logits=ref_logits if over_vocabulary else None,
        kl=kl,
        inplace=inplace,
        **settings,
    )
    if inplace:
        checks.mark_consumed(logits)
    if not over_vocabulary and ref_logprob is None and ref_logits is not None:
        with torch.no_grad():
            ref_logprob = token_stats(ref_logits, tokens, entropy=False, **settings).logprob
    return policy_loss(
        stats.logprob,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        entropy=stats.entropy,
        kl=stats.kl,
        sampling_logprob=sampling_logprob,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        cu_seqlens=cu_seqlens,
    )
