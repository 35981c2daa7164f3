"""The learner under every loss: denominators, groups, metrics, entropy control."""

from dataclasses import replace

import pytest
import torch

from grpo_kernels import LossConfig
from reference.training.errors import UserError
from reference.training.model.scorers import FusedScorer
from reference.training.update.learner import combine_metrics
from reference.training.update.micro_batches import MicroBatch
from tests.helpers.learner import (
    ADVANTAGES,
    PLAIN,
    REWARDS,
    advantages,
    gradient,
    make_learner,
)

FUSED = FusedScorer()
# The kernels would be interpreted on the CPU, which is slow.
EAGER = pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
LOSSES = list(LossConfig.objectives())
# Losses that do not compare the tokens of a micro-batch with each other.
SPLITTABLE = [name for name in LOSSES if name not in ("clip_covariance", "kl_covariance", "m2po")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", SPLITTABLE)
@pytest.mark.parametrize(
    "extra", [{}, {"beta": 0.1, "entropy_coef": 0.01, "aggregation": "prompt_mean"}]
)
def test_micro_batch_gradients_add_up(loss, extra):
    changes = {"loss": loss, "max_grad_norm": 1e6, **extra}
    whole = gradient(*make_learner(**changes), REWARDS)
    pieces = gradient(*make_learner(**changes, micro_batch=1), REWARDS)
    assert whole.norm() > 1e-3
    assert torch.allclose(pieces, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", SPLITTABLE)
def test_micro_batch_metrics_match_the_whole_batch(loss):
    changes = {"loss": loss, "learning_rate": 1e-2, "warmup_steps": 0, "inner_iterations": 3}
    learner, samples = make_learner(**changes)
    whole = learner.step(samples, ADVANTAGES)
    learner, samples = make_learner(**changes, micro_batch=1)
    assert learner.step(samples, ADVANTAGES) == pytest.approx(whole, rel=1e-5, abs=1e-7)


@EAGER
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"beta": 0.1, "entropy_coef": 0.01, "inner_iterations": 2},
        {"top_entropy": 0.3, "entropy_coef": 0.1, "inner_iterations": 2},
    ],
)
def test_fused_scorer_trains_like_the_plain_scorer(backend, loss, extra):
    changes = {"loss": loss, "learning_rate": 1e-3, "micro_batch": 2, **extra}
    if loss == "clip_covariance":  # all of them: which ones is otherwise left to chance
        changes |= {"clip_cov": 1.0, "clip_cov_low": 0.01}
    learner, samples = make_learner(**changes)
    expected = learner.step(samples, ADVANTAGES)
    fused, samples = make_learner(FUSED, **changes)
    metrics = fused.step(samples, ADVANTAGES)
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for ours, plain in zip(
        fused.policy.model.parameters(), learner.policy.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [*SPLITTABLE, "kl_covariance"])
def test_skipping_groups_keeps_the_gradient(loss):
    learner, samples = make_learner(loss=loss, max_grad_norm=1e6)
    ours = gradient(learner, samples, REWARDS)
    learner, samples = make_learner(loss=loss)
    done = samples.completions
    everything = MicroBatch(
        samples.prompts, done.tokens, done.mask, done.mask, advantages(REWARDS, loss), done.logprob
    )
    PLAIN.loss(learner.policy, everything, learner.loss_config).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in learner.policy.model.parameters()])
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1},
        {"entropy_coef": 0.01},
        {"entropy_target": 0.5},
        {"kl_cov": 0.1},
        {"clip_cov": 0.1},
        {"top_entropy": 0.5},
        {"second_moment": 0.1},
        {"loss": "ipo"},
    ],
    ids=str,
)
def test_groups_stay_if_another_loss_term_needs_them(settings):
    learner, samples = make_learner(**settings)
    assert len(next(learner.minibatches(samples, ADVANTAGES)).micro_batches[0].tokens) == 16


CORRECT = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, torch.nan, 1])


@EAGER
def test_nll_term_learns_from_correct_completions(backend):
    """Also from a group in which all are correct, whose advantages are 0."""
    equal = torch.zeros(16)
    nll = {"nll_coef": 0.5, "max_grad_norm": 1e6}
    whole, samples = make_learner(**nll)
    metrics = whole.step(samples, equal, CORRECT)
    logprob = samples.completions.logprob[CORRECT == 1][samples.completions.mask[CORRECT == 1]]
    assert metrics["nll_loss"] == pytest.approx(-0.5 * logprob.mean().item(), rel=1e-5)
    expected = [p.grad for p in whole.policy.model.parameters()]
    for scorer, changes in ((PLAIN, {"micro_batch": 1}), (FUSED, {"micro_batch": 3})):
        learner, samples = make_learner(scorer, **nll, **changes)
        assert learner.step(samples, equal, CORRECT) == pytest.approx(metrics, rel=1e-5, abs=1e-9)
        for ours, grad in zip(learner.policy.model.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.grad, grad, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="--nll-coef learns from correct completions"):
        whole.step(samples, equal)


@EAGER
@pytest.mark.parametrize("scorer", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "luspo", "prompt_mean"])
@pytest.mark.parametrize("top_entropy", [None, 0.3])
def test_denominators_match_the_defaults_of_the_loss(backend, scorer, loss, top_entropy):
    named = {"aggregation": loss} if loss == "prompt_mean" else {"loss": loss}
    learner, samples = make_learner(
        scorer, **named, entropy_coef=0.1, top_entropy=top_entropy, mask_truncated=True
    )
    (minibatch,) = learner.minibatches(samples, ADVANTAGES)
    (batch,) = minibatch.micro_batches
    assert len(batch.tokens) == 16
    given, own = (learner.loss(batch, x).loss for x in (minibatch.denominators, {}))
    assert given.item() == pytest.approx(own.item(), rel=1e-9)


def test_entropy_coef_adapts_within_its_bounds():
    settings = {"entropy_coef_step": 0.1, "entropy_coef_max": 0.25, "loss": "one_shot"}
    learner, samples = make_learner(entropy_target=100.0, **settings)
    found = [learner.step(samples, ADVANTAGES)["entropy_coef"] for _ in range(4)]
    assert found == pytest.approx([0.001, 0.101, 0.201, 0.25])
    learner, samples = make_learner(entropy_target=0.0, entropy_coef=0.2, **settings)
    found = [learner.step(samples, ADVANTAGES)["entropy_coef"] for _ in range(3)]
    assert found == pytest.approx([0.2, 0.0, 0.0])


def test_adaptive_entropy_coef_is_in_the_gradient():
    learner, samples = make_learner(entropy_target=100.0, entropy_coef=0.3, max_grad_norm=1e6)
    ours = gradient(learner, samples, REWARDS)
    expected = gradient(*make_learner(entropy_coef=0.3, max_grad_norm=1e6), REWARDS)
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)
    without = gradient(*make_learner(max_grad_norm=1e6), REWARDS)
    assert (ours - without).norm() > 1e-3


def test_step_without_tokens_keeps_the_entropy_coef():
    learner, samples = make_learner(entropy_target=100.0, entropy_coef=0.2, mask_truncated=True)
    cut = replace(samples.completions, finished=torch.zeros(16, dtype=torch.bool))
    for _ in range(2):
        metrics = learner.step(replace(samples, completions=cut), ADVANTAGES)
        assert metrics["entropy_coef"] == 0.2 and "entropy" not in metrics


def test_combine_metrics():
    first = {"a": 1.0, "b": 1.0, "policy_loss": 1.0, "num_tokens": 3.0, "num_sequences": 1.0}
    second = {"a": 5.0, "b": 5.0, "policy_loss": 2.0, "num_tokens": 1.0, "num_sequences": 3.0}
    for name in ("clip_ratio/low_min", "x/min", "ratio_max", "x/max"):
        first[name], second[name] = 1.0, 2.0
    first, second = ({n: torch.tensor(x) for n, x in values.items()} for values in (first, second))
    assert combine_metrics([[first, second], [first]], {"b"}) == pytest.approx(
        {
            "a": (3 * 1 + 1 * 5 + 3 * 1) / 7,
            "b": (1 * 1 + 3 * 5 + 1 * 1) / 5,
            "policy_loss": (1 + 2 + 1) / 2,
            "clip_ratio/low_min": 1.0,
            "x/min": 1.0,
            "ratio_max": 2.0,
            "x/max": 2.0,
        }
    )
