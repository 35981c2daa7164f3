"""Checks against numbers from plain Python, for the package and its reference implementation."""

import pytest
import torch

import grpo_kernels
from reference import losses

IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation",
    [pytest.param(losses, id="reference"), pytest.param(grpo_kernels, id="package")],
)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(expected):
    return pytest.approx(expected, rel=1e-11, abs=1e-14)


def evaluate(
    implementation, log_ratio, advantages, *, old=-2.0, sampling=None, call=None, **fields
):
    """Return (loss, its derivatives in the log-probs [B][T], metrics) for tokens by log-ratio.

    Unless `fields` say otherwise, the loss is the mean over sequences of the sum of token terms.

    Args:
        log_ratio: [B, T], or [T] for one sequence; the old log-prob, of that shape or one for all,
            is `old`.
        advantages: shape of log_ratio.
        sampling: the logarithms of the importance weights, old - the sampler's log-prob.
        call: more keywords of policy_loss; fields: those of its config.
    """
    log_ratio, advantages = torch.atleast_2d(f64(log_ratio), f64(advantages))
    before = torch.atleast_2d(f64(old)).expand_as(log_ratio)
    logprob = (before + log_ratio).requires_grad_()
    keywords = {"old_logprob": before, **(call or {})}
    if sampling is not None:
        keywords["sampling_logprob"] = before - torch.atleast_2d(f64(sampling))
    config = grpo_kernels.LossConfig(**{"aggregation": "sequence_sum_mean", **fields})
    loss, metrics = implementation.policy_loss(logprob, advantages, config=config, **keywords)
    loss.backward()
    return loss.item(), logprob.grad.tolist(), {name: x.item() for name, x in metrics.items()}
