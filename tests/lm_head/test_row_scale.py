"""Scales of fp16 rows: a bound of the gradient of each statistic, and powers of two."""

import pytest
import torch

from grpo_kernels.backends import RowStats
from grpo_kernels.lm_head.row_scale import gradient_bound, power_of_two_scale
from grpo_kernels.objective.token_gradients import TokenGrads
from tests.helpers.tensors import normal

N, V = 6, 9


def statistics(x, y, kl):
    """Every statistic that has a gradient, and their gradients' inputs, from logits [N, V]."""
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    divergence = p * (log_p - log_q) if kl == "reverse" else q * (log_q - log_p)
    return {
        "logprob": log_p[:, 0],
        "entropy": -(p * log_p).sum(-1),
        "kl": divergence.sum(-1),
        "sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logit": x.mean(-1),
    }


@pytest.mark.parametrize("std", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("name", TokenGrads._fields)
def test_bound_holds_and_is_near(name, kl, std):
    logits = normal(1, N, V, dtype=torch.float64, std=std).requires_grad_()
    found = statistics(logits, normal(2, N, V, dtype=torch.float64, std=std), kl)
    temperature = normal(3, N, dtype=torch.float64).exp()
    upstream = normal(4, N, dtype=torch.float64, std=1e3)
    (grad,) = torch.autograd.grad(found[name], logits, upstream / temperature)
    stats = RowStats(None, found["entropy"], found["kl"], torch.empty(0))
    grads = TokenGrads(None, None, None)._replace(**{name: upstream})
    bound = gradient_bound(stats, grads, temperature)
    assert (grad.abs().amax(-1) <= bound).all()
    assert (bound <= 2 * (found["kl"] + found["entropy"] + 1) * upstream.abs() / temperature).all()


def test_absent_gradient_of_an_infinite_statistic_has_no_bound():
    stats = RowStats(None, None, torch.tensor([torch.inf, 1.0]), torch.empty(0))
    grads = TokenGrads(torch.tensor([2.0, 2.0]), None, torch.tensor([0.0, 1.0]))
    bound = gradient_bound(stats, grads, torch.tensor([1.0, 0.5]))
    assert bound.tolist() == [2.0, (2.0 + 3.0) / 0.5]


def test_scale_is_a_power_of_two_that_brings_the_bound_below_32768():
    bound = torch.tensor([1.0, 3.0, 65536.0, 1e-20, 0.0, torch.inf, torch.nan])
    scale = power_of_two_scale(bound)
    assert scale[:4].tolist() == [2.0**15, 2.0**13, 0.5, 2.0**81]
    assert scale[4:6].tolist() == [2.0**100, 2.0**-100] and scale[6].isnan()
