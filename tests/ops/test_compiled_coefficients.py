"""Coefficients of the loss under torch.compile: a new value compiles nothing again."""

from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss, policy_loss

B, T, V, H = 2, 4, 11, 6
# An objective, and coefficients that are changed.
CASES = {
    "clip": (
        "grpo",
        {"beta": 0.1, "entropy_coef": 0.01, "epsilon_low": 0.01, "epsilon_high": 0.02},
    ),
    "bounds": (
        "grpo",
        {"delta": 1.1, "dual_clip": 1.15, "epsilon_high": 0.01, "nll_coef": 0.2}
        | {"importance_floor": 0.9, "importance_cap": 1.01},
    ),
    "cispo": ("cispo", {"ratio_cap": 1.01, "ratio_floor": 0.7, "beta": 0.1}),
    "dppo": ("dppo", {"ratio_cap": 0.6, "epsilon_low": 0.001}),
    "sapo": ("sapo", {"tau_positive": 1.1, "tau_negative": 1.3}),
    "ipo": ("ipo", {"sampler_penalty": 0.01}),
    "dro": ("dro", {"proximal_coef": 0.2}),
    "vespo": ("vespo", {"k_positive": 1.1, "lambda_negative": 1.2}),
    "gmpo": ("gmpo", {"epsilon_low": 0.01, "epsilon_high": 0.01}),
    "gspo": ("gspo", {"beta": 0.1, "epsilon_low": 0.01}),
    "filters": ("grpo", {"off_policy_threshold": 9.0, "top_entropy": 0.3, "second_moment": 0.1}),
    "kl_cov": ("grpo", {"kl_cov": 0.2, "kl_cov_coef": 0.3}),
    "clip_cov": ("grpo", {"clip_cov": 0.3, "clip_cov_low": -9.0, "clip_cov_high": 9.0}),
    "icepop": ("icepop", {"importance_floor": 0.8, "importance_cap": 0.9}),
}


generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


LOGITS, HIDDEN, WEIGHT, ADVANTAGES = normal(B, T, V), normal(B, T, H), normal(V, H), normal(B)
TOKENS = torch.randint(V, (B, T), generator=generator)
LOGPROB = LOGITS.log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]
OLD, REF, SAMPLING = (LOGPROB + 0.2 * normal(B, T) for _ in range(3))


def arguments(config):
    given = {"config": config, "old_logprob": OLD, "sampling_logprob": SAMPLING}
    if config.has_kl:
        given["ref_logprob"] = REF
    if config.has_nll:
        given["nll_weight"] = torch.ones(B, T)
    return given


def on_logits(x, config):
    return grpo_loss(x, TOKENS, ADVANTAGES, **arguments(config)).loss


def on_hidden(x, config):
    return linear_grpo_loss(x, WEIGHT, TOKENS, ADVANTAGES, **arguments(config)).loss


def on_logprobs(x, config):
    entropy = x.detach().square()
    return policy_loss(x, ADVANTAGES, entropy=entropy, **arguments(config)).loss


LEVELS = {
    "logits": (on_logits, LOGITS),
    "hidden": (on_hidden, HIDDEN),
    "logprobs": (on_logprobs, LOGPROB),
}


def value_and_gradient(function, x, config):
    x = x.clone().requires_grad_()
    torch.manual_seed(7)  # clip_cov draws tokens
    loss = function(x, config)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize(
    ("level", "case"),
    [*product(["logprobs"], CASES), ("logits", "clip"), ("logits", "gspo"), ("hidden", "clip")],
)
def test_new_coefficients_compile_nothing(level, case):
    (function, x), counter = LEVELS[level], CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    objective, coefficients = CASES[case]
    losses = set()
    for factor in (1.0, 1.5, 2.0):
        config = getattr(LossConfig, objective)(
            **{name: factor * value for name, value in coefficients.items()}
        )
        found = value_and_gradient(compiled, x, config)
        torch.testing.assert_close(found, value_and_gradient(function, x, config))
        losses.add(found[0].item())
    assert counter.frame_count == 1
    assert len(losses) > 1


def test_config_built_in_the_compiled_function():
    def function(x, beta):
        return policy_loss(x, ADVANTAGES, ref_logprob=REF, config=LossConfig.dapo(beta=beta)).loss

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for beta in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(LOGPROB, beta), function(LOGPROB, beta))
