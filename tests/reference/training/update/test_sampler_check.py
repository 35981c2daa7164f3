"""The comparison of a sampler with weights of its own with the policy."""

import re
from dataclasses import replace

import pytest
import torch

from reference import train
from reference.training.errors import UserError
from reference.training.model.scorers import FusedScorer, PlainScorer
from tests.helpers.learner import ADVANTAGES, QUESTIONS, make_learner
from tests.helpers.own_weights import CopySampler

pytestmark = pytest.mark.usefixtures("one_thread", "pytorch_backend")
MEAN, MAX = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))


PLAIN = PlainScorer()


def start(*old, scorer=PLAIN, stale=False, **changes):
    """Make a learner and a sampler that leaves some weights old."""
    sampler = CopySampler(*old)
    if stale:
        changes |= {"sampler": "http://server", "stale_sampler": True}
    changes = {"learning_rate": 1e-3, "warmup_steps": 0} | changes
    learner, _ = make_learner(scorer, own_weights=sampler, **changes)
    sampler.start(learner.policy, None)
    return learner, sampler


def rollouts(learner, sampler):
    sampler.sync(learner.policy)
    return learner.policy.sample(QUESTIONS, 4, learner.config.temperature, sampler)


def step(learner, sampler, advantages=ADVANTAGES):
    return learner.step(rollouts(learner, sampler), advantages)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0.8, "temperature": 1.7, "minibatches": 2},
        {"mask_truncated": True, "max_new_tokens": 3, "micro_batch": 1, "inner_iterations": 2},
        {"top_k": 1, "support": False},  # greedy
    ],
    ids=str,
)
def test_sampler_in_step_passes(changes):
    learner, sampler = start(**changes)
    for _ in range(3):
        metrics = step(learner, sampler)
        assert changes.get("support") is False or metrics[MAX] < 1e-5
    # Also if there is nothing to learn from.
    metrics = step(learner, sampler, torch.zeros(16))
    assert {MEAN, MAX} <= metrics.keys() and "policy_loss" not in metrics


OLD = {
    "lm_head": "the tied LM head (lm_head)",
    "embed_tokens": "the embedding (model.embed_tokens)",
    "layers.1.": "model.layers.1",
    "model.norm": "model.norm",
    "": "all weights",
}


@pytest.mark.parametrize("scorer", [PLAIN, FusedScorer()], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "old", ["lm_head", "layers.1.", "embed_tokens model.norm", "lm_head layers.1.", ""]
)
def test_old_weights_are_named(old, scorer):
    old = old.split(" ")
    learner, sampler = start(*old, scorer=scorer)
    step(learner, sampler)
    before = [p.clone() for p in learner.policy.model.parameters()]
    with pytest.raises(UserError, match=r"^step 2: the log-probs of the sampler differ") as error:
        step(learner, sampler)
    named = re.search("look old: (.*); without", str(error.value))[1]
    assert set(named.split(", ")) == {OLD[part] for part in old}
    assert all(map(torch.equal, learner.policy.model.parameters(), before))


def test_old_lora_weights_are_named(tmp_path, scratch):
    for part in scratch:
        part.save_pretrained(tmp_path)
    learner, sampler = start("layers.0.", model=str(tmp_path), lora_rank=2, learning_rate=1e-2)
    with pytest.raises(UserError, match=r"look old: model\.layers\.0;"):
        for _ in range(3):
            step(learner, sampler)


@pytest.mark.parametrize(
    "changes",
    [{}, {"minibatches": 2}, {"inner_iterations": 2}, {"micro_batch": 1, "inner_iterations": 2}],
    ids=str,
)
def test_check_does_not_change_the_update(changes):
    checked, sampler = start(**changes)
    samples = rollouts(checked, sampler)
    unchecked, _ = make_learner(learning_rate=1e-3, warmup_steps=0, **changes)
    ours, expected = (each.step(samples, ADVANTAGES) for each in (checked, unchecked))
    for name in ours.keys() - {MEAN, MAX}:
        assert ours[name] == expected[name], name
    models = (each.policy.model.parameters() for each in (checked, unchecked))
    assert all(map(torch.equal, *models))


def shifted(samples, by):
    """Add to the sampler's log-probs where tokens are not masked."""
    done = samples.completions
    return replace(samples, completions=replace(done, logprob=done.logprob + by))


def test_metrics_are_of_all_sampled_tokens():
    """Also of groups without a signal and of truncated completions, and no others."""
    learner, sampler = start(mask_truncated=True, max_new_tokens=3, max_sampler_difference=9.0)
    samples = rollouts(learner, sampler)
    done = samples.completions
    by = torch.rand(done.mask.shape, generator=torch.Generator().manual_seed(0)) - 0.3
    expected = by[done.mask].abs()
    metrics = learner.step(shifted(samples, by.where(done.mask, 7.0)), ADVANTAGES)
    assert metrics[MEAN] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert metrics[MAX] == pytest.approx(expected.max().item(), abs=1e-5)
    assert 0 < done.finished.sum() < 16


@pytest.mark.parametrize(
    ("changes", "dtype", "bound"),
    [
        ({}, None, 0.001),
        ({}, torch.float32, 0.001),
        ({}, torch.bfloat16, 0.1),
        ({"autocast": "bf16"}, torch.float32, 0.1),
        ({"max_sampler_difference": 0.01}, torch.bfloat16, 0.01),
    ],
)
def test_bound_is_that_of_the_dtype(changes, dtype, bound):
    learner, sampler = start(**changes)
    sampler.dtype = dtype
    samples = rollouts(learner, sampler)
    learner.step(shifted(samples, 0.8 * bound), torch.zeros(16))
    with pytest.raises(UserError, match=f"at most {bound:g}.*No optimiser step.*logprobs-mode"):
        learner.step(shifted(samples, 1.2 * bound), ADVANTAGES)


def test_stale_sampler_is_only_measured():
    learner, sampler = start("", stale=True)
    step(learner, sampler)
    assert step(learner, sampler)[MEAN] > 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--max-sampler-difference: --sampler shared-prompt samples from the model that"),
        (["--sampler", "http://x", "--stale-sampler"], "means that it is not: choose one"),
    ],
)
def test_bound_that_nothing_reads_is_refused(flags, message, capsys):
    assert train.main(["--max-sampler-difference", "0.1", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_support_only_lower_log_probs_are_wrong():
    learner, sampler = start(top_p=0.5, support=False)
    samples = rollouts(learner, sampler)
    assert learner.step(samples, torch.zeros(16))[MEAN] > 0.1
    with pytest.raises(UserError, match="differ from the trainer's"):
        learner.step(shifted(samples, -3.0), torch.zeros(16))


def test_log_probs_that_are_not_numbers_stop_the_run():
    learner, sampler = start()
    samples = rollouts(learner, sampler)
    with pytest.raises(UserError, match="by nan nats"):
        learner.step(shifted(samples, torch.nan), ADVANTAGES)
