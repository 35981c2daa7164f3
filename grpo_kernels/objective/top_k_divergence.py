"""The divergence of a student from a teacher of whom only the K most likely tokens are known.

A token has K + 1 outcomes: the K listed ones, and the rest of the vocabulary. With p and q the
probabilities of an outcome, and x a logit of the student after the softcap and the temperature,

    reverse: D = Σ p (ln p - ln q)                  dD / dx = p (ln p - ln q - D)
    forward: D = Σ q (ln q - ln p)                  dD / dx = p - q
    jsd:     D = (1 - w) KL(p‖m) + w KL(q‖m)        dD / dx = (1 - w) p (ln p - ln m - KL(p‖m))

where dD / dx of the rest is the sum over its logits, each of which has its share by probability.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2.0)


class Rest(NamedTuple):
    """The student's distribution over the tokens that are not listed, [n] each."""

    pivot: Tensor  # the largest logit, before the temperature
    log_sum: Tensor  # log2 Σ exp((logit - pivot) / temperature)
    entropy: Tensor | None  # of the distribution within the rest; None in backward
    is_empty: Tensor  # bool: there is no such token, or every one has the logit -inf


class TopKDivergence(NamedTuple):
    """Results of n rows."""

    divergence: Tensor  # [n]
    entropy: Tensor  # [n], of the student over the whole vocabulary
    teacher_entropy: Tensor  # [n], of the teacher's K + 1 outcomes
    agrees: Tensor  # [n], 1 where the teacher's most likely token has the student's largest logit
    mass: Tensor  # [n], the student's probability of the K tokens
    teacher_mass: Tensor  # [n]
    gradient: Tensor  # [n, K + 1], dD / dx
    kl: Tensor  # [n]: |dD / dx| is at most 2 kl + 1


def teacher_outcomes(logprobs: Tensor, dtype: torch.dtype) -> Tensor:
    """Append to ln q [n, K] that of the rest, ln (1 - Σ q): [n, K + 1] in this dtype.

    The rest has at least one unit of rounding of ln q: a list whose probabilities sum to 1, or to
    more by rounding, leaves a divergence that is finite and a gradient towards the list.
    """
    logq, eps = logprobs.double(), torch.finfo(logprobs.dtype).eps
    rest = (1.0 - logq.exp().sum(-1, keepdim=True)).clamp(min=eps).log()
    return torch.cat((logq, rest), dim=-1).to(dtype)


def top_k_divergence(
    logits: Tensor,
    rest: Rest,
    temperature: Tensor,
    logq: Tensor,
    divergence: str,
    jsd_weight: float,
) -> TopKDivergence:
    """Compute the divergence, its gradient and the metrics.

    Args:
        logits: [n, K], of the listed tokens after the softcap; -inf where a list is shorter.
        temperature: [n].
        logq: [n, K + 1], `teacher_outcomes`; -inf where a list is shorter.
    """
    inverse = temperature.reciprocal()
    pivot = torch.where(rest.is_empty, -torch.inf, rest.pivot)
    largest = logits.amax(-1)
    top = torch.maximum(pivot, largest)
    x = (logits - top.unsqueeze(-1)) * inverse.unsqueeze(-1)
    x_rest = torch.where(rest.is_empty, -torch.inf, (pivot - top) * inverse + rest.log_sum * LN2)
    logp = torch.log_softmax(torch.cat((x, x_rest.unsqueeze(-1)), dim=-1), dim=-1)
    # Where the student has no rest, neither has the teacher. The sum of q is then 1 again.
    has_rest = torch.nn.functional.pad(~rest.is_empty.unsqueeze(-1), (logits.shape[-1], 0), value=1)
    logq = torch.log_softmax(torch.where(has_rest.bool(), logq, -torch.inf), dim=-1)
    p, q = logp.exp(), logq.exp()
    if divergence == "forward":
        per_token, gradient = _relative(q, logq, logp).sum(-1), p - q
        kl = torch.zeros_like(per_token)
    else:
        w = jsd_weight if divergence == "jsd" else 1.0
        other = logq
        if divergence == "jsd":
            other = torch.logaddexp(logp + math.log1p(-w), logq + math.log(w))
        parts = _relative(p, logp, other)
        kl = parts.sum(-1)
        gradient = parts - p * kl.unsqueeze(-1)
        per_token = kl
        if divergence == "jsd":
            per_token = (1.0 - w) * kl + w * _relative(q, logq, other).sum(-1)
            gradient = (1.0 - w) * gradient
    place = logq[:, :-1].argmax(-1, keepdim=True)
    first, first_logq = (t.gather(-1, place).squeeze(-1) for t in (logits, logq))
    agrees = (first >= top) & (first > -torch.inf) & (first_logq > -torch.inf)
    p_rest, logp_rest = p[:, -1], logp[:, -1]
    assert rest.entropy is not None
    of_rest = torch.where(p_rest == 0, 0.0, p_rest * (rest.entropy - logp_rest))
    return TopKDivergence(
        per_token,
        _entropy(p, logp)[:, :-1].sum(-1) + of_rest,
        _entropy(q, logq).sum(-1),
        agrees.to(logits.dtype),
        p[:, :-1].sum(-1),
        q[:, :-1].sum(-1),
        gradient,
        kl,
    )


def _relative(p: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """p (ln p - ln q), 0 where p is 0."""
    return torch.where(p == 0, 0.0, p * (logp - logq))


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, -p * logp)
