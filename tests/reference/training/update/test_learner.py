"""The learner: groups without signal, minibatches, inner iterations, the KL."""

from dataclasses import replace

import pytest
import torch

from reference.training.model.scorers import FusedScorer, PlainScorer
from tests.helpers.learner import ADVANTAGES, REWARDS, advantages, make_learner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batch_without_signal_is_skipped(monkeypatch):
    learner, samples = make_learner()
    before = [p.clone() for p in learner.policy.model.parameters()]
    monkeypatch.setattr(PlainScorer, "_forward", lambda *_: pytest.fail("a forward pass"))
    metrics = learner.step(samples, advantages(REWARDS[[1, 3, 1, 3]]))
    assert metrics["grad_norm"] == 0.0 and "policy_loss" not in metrics
    assert all(map(torch.equal, learner.policy.model.parameters(), before))


def test_groups_without_signal_are_skipped(monkeypatch):
    learner, samples = make_learner()
    (batch,) = next(learner.minibatches(samples, ADVANTAGES)).micro_batches
    assert torch.equal(batch.prompts.ids, samples.prompts.ids[[0, 2]])
    assert torch.equal(batch.advantages.view(2, 4).sum(-1).abs() < 1e-6, torch.tensor([True, True]))
    learner, samples = make_learner(beta=0.1)
    assert len(next(learner.minibatches(samples, ADVANTAGES)).micro_batches[0].tokens) == 16


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_slices_of_wider_tensors_are_accepted(beta):
    """Completions that all end early are slices, as `generate` returns them."""
    learner, samples = make_learner(beta=beta)
    expected = learner.step(samples, ADVANTAGES)
    learner, samples = make_learner(beta=beta)
    columns = {name: getattr(samples.completions, name) for name in ("tokens", "mask", "logprob")}
    wider = {name: torch.cat([x, x], dim=1)[:, : x.shape[1]] for name, x in columns.items()}
    sliced = replace(samples, completions=replace(samples.completions, **wider))
    assert learner.step(sliced, ADVANTAGES) == expected


def test_first_inner_iteration_has_ratio_one_and_a_gradient():
    learner, samples = make_learner()
    metrics = learner.step(samples, ADVANTAGES)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["policy_loss"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["grad_norm"] > 1e-3


PLAIN = PlainScorer()
SCORERS = {"fused": FusedScorer(), "plain": PLAIN}
RULES = {"top_p": 0.8, "temperature": 1.7}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 1, "beta": 0.1}, {"minibatches": 2}])
def test_ratio_to_a_truncated_sampler_is_one_at_the_first_update(scorer, changes, pytorch_backend):
    learner, samples = make_learner(SCORERS[scorer], **RULES, **changes)
    assert (samples.completions.support.lengths > 0).any()
    metrics = learner.step(samples, ADVANTAGES)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics.get("kl", 0.0) == pytest.approx(0.0, abs=1e-12)
    assert "sampling/kept_mass" not in metrics


def test_without_support_the_kept_mass_is_reported_once(capsys):
    learner, samples = make_learner(**RULES, support=False)
    assert samples.completions.support is None
    done, (minibatch,) = samples.completions, learner.minibatches(samples, torch.ones(16))
    with torch.no_grad():
        logprob = PLAIN.token_stats(learner.policy, minibatch.micro_batches[0], 1.7).logprob
    mass = (logprob - done.logprob).exp()[done.mask].mean().item()
    first = learner.step(samples, torch.ones(16))
    assert first["sampling/kept_mass"] == pytest.approx(mass, abs=1e-6) and mass < 0.9
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(mass, abs=1e-6)
    assert 0 < learner.step(samples, torch.ones(16))["sampling/kept_mass"] < 1
    said = capsys.readouterr().err
    assert said.startswith("warning: with --no-support") and said.count("\n") == 1
    assert f"have {mass:.1%} of the probability, the mean of exp(" in said


def test_later_inner_iterations_have_ratios():
    learner, samples = make_learner(inner_iterations=3, learning_rate=1e-2, warmup_steps=0)
    metrics = learner.step(samples, ADVANTAGES)
    assert metrics["ratio_max"] > 1.01
    assert metrics["clip_ratio/region_mean"] > 0


def test_kl_is_to_the_initial_model():
    learner, samples = make_learner(beta=0.1, learning_rate=1e-3, warmup_steps=0)
    assert learner.step(samples, ADVANTAGES)["kl"] == pytest.approx(0.0, abs=1e-12)
    assert learner.step(samples, ADVANTAGES)["kl"] > 1e-6


def test_learning_rate_warms_up():
    learner, samples = make_learner(learning_rate=8e-6, warmup_steps=4)
    rates = [learner.step(samples, ADVANTAGES)["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([2e-6, 4e-6, 6e-6, 8e-6, 8e-6, 8e-6])


def test_each_minibatch_takes_one_optimiser_step():
    learner, samples = make_learner(minibatches=2, learning_rate=1e-2, warmup_steps=0)
    steps = []
    learner.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    metrics = learner.step(samples, ADVANTAGES)
    assert len(steps) == 2
    # The policy changes between them, so that the ratios of the second are not 1.
    assert metrics["ratio_max"] > 1.001


def test_minibatch_denominators_count_its_own_questions():
    half, samples = make_learner(max_grad_norm=1e6)
    found = list(half.minibatches(samples, ADVANTAGES))
    assert [minibatch.denominators["normalizer"] for minibatch in found] == [16]
    half, samples = make_learner(max_grad_norm=1e6, minibatches=2)
    first, second = half.minibatches(samples, ADVANTAGES)
    assert first.denominators["normalizer"] == second.denominators["normalizer"] == 8
    tokens = samples.completions.mask.view(2, -1).sum(-1).tolist()
    assert [x.denominators["entropy_normalizer"] for x in (first, second)] == tokens


@pytest.mark.parametrize("minibatches", [1, 3, 4])
def test_minibatches_have_even_sizes(minibatches):
    learner, samples = make_learner(minibatches=minibatches)
    found = list(learner.minibatches(samples, torch.ones(16)))
    sizes = [minibatch.denominators["normalizer"] // 4 for minibatch in found]
    assert len(sizes) == minibatches and sum(sizes) == 4 and max(sizes) - min(sizes) <= 1


def test_truncated_completions_are_masked():
    learner, samples = make_learner(mask_truncated=True, loss="bnpo")
    finished = torch.arange(16) % 3 > 0
    samples = replace(samples, completions=replace(samples.completions, finished=finished))
    (minibatch,) = learner.minibatches(samples, torch.ones(16))
    counted = samples.completions.mask & finished[:, None]
    assert minibatch.denominators["normalizer"] == counted.sum()
    (batch,) = minibatch.micro_batches
    assert torch.equal(batch.loss_mask, counted[:, : batch.loss_mask.shape[1]])
    assert torch.equal(batch.mask, samples.completions.mask[:, : batch.mask.shape[1]])


def test_token_advantages_are_split_with_micro_batches():
    learner, samples = make_learner(micro_batch=1)
    of_tokens = ADVANTAGES[:, None] * torch.ones(samples.completions.mask.shape)
    whole = learner.step(samples, of_tokens)
    learner, samples = make_learner(micro_batch=1)
    assert whole == pytest.approx(learner.step(samples, ADVANTAGES), rel=1e-6, abs=1e-9)


def test_reference_refresh():
    learner, samples = make_learner(
        beta=0.1, learning_rate=1e-2, warmup_steps=0, reference_refresh=2
    )
    kls = [learner.step(samples, ADVANTAGES)["kl"] for _ in range(5)]
    assert [kls[0], kls[2], kls[4]] == pytest.approx([0.0] * 3, abs=1e-12)
    assert kls[1] > 1e-6 and kls[3] > 1e-6


def test_sampling_logprobs_are_compared_with_the_policy():
    learner, samples = make_learner()
    metrics = learner.step(samples, ADVANTAGES)
    assert 0 < metrics["sampling/sampling_logp_difference/max"] < 1e-4
    shifted = replace(samples.completions, logprob=samples.completions.logprob - 0.5)
    learner, _ = make_learner()
    metrics = learner.step(replace(samples, completions=shifted), ADVANTAGES)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.6487, abs=1e-3)
