"""The update: advantages, groups without signal, micro-batches, inner iterations, the KL."""

from dataclasses import replace

import pytest
import torch

import grpo_kernels
import reference
from grpo_kernels.integrations import causal_lm as fused_causal_lm
from reference import causal_lm
from reference.config import LOSSES, TrainConfig
from reference.learner import Learner
from reference.policy import Policy
from reference.tasks import make_task


def make_learner(forward=causal_lm.forward, **changes):
    """A learner on a random model in fp64, and answers to four questions, four each."""
    config = TrainConfig(task="reverse", group_size=4, max_new_tokens=6, **changes)
    torch.manual_seed(0)
    policy = Policy.load("scratch", torch.device("cpu"), config.max_new_tokens, forward)
    policy.model.double()
    loss_config = reference.LossConfig(**config.loss_fields())
    answers = policy.ask(make_task("reverse", 0).train[:4], 4, 1.0)
    return Learner(policy, reference, loss_config, config), answers


def gradient(learner, answers, rewards):
    learner.step(answers, advantages(rewards, learner.config.loss))
    return torch.cat([p.grad.flatten() for p in learner.policy.model.parameters()])


def advantages(rewards, loss="grpo"):
    if loss == "dr_grpo":
        return (rewards - rewards.mean(-1, keepdim=True)).flatten()
    return reference.group_normalised_advantage(rewards).flatten()


REWARDS = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1.2], [1, 1, 1, 1]])
ADVANTAGES = advantages(REWARDS)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("extra", [{}, {"beta": 0.1, "entropy_coef": 0.01}])
def test_micro_batches_add_up_to_the_whole_batch(loss, extra):
    changes = {"loss": loss, "max_grad_norm": 1e6, **extra}
    whole = gradient(*make_learner(**changes), REWARDS)
    pieces = gradient(*make_learner(**changes, micro_batch=1), REWARDS)
    assert whole.norm() > 1e-3
    assert torch.allclose(pieces, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"beta": 0.1, "entropy_coef": 0.01, "inner_iterations": 2},
    ],
)
def test_the_fused_losses_from_hidden_states_train_as_the_plain_ones_do(loss, extra):
    changes = {"loss": loss, "learning_rate": 1e-3, "micro_batch": 2, **extra}
    learner, answers = make_learner(**changes)
    expected = learner.step(answers, ADVANTAGES)
    fused, answers = make_learner(forward=fused_causal_lm.forward, **changes)
    metrics = fused.step(answers, ADVANTAGES)
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for ours, plain in zip(
        fused.policy.model.parameters(), learner.policy.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_leaving_out_groups_without_signal_leaves_the_gradient_as_it_was():
    learner, answers = make_learner(max_grad_norm=1e6)
    ours = gradient(learner, answers, REWARDS)
    learner, answers = make_learner()
    logits, _ = learner.policy.states(
        answers.prompts, answers.completions.tokens, answers.completions.mask
    )
    reference.grpo_loss(
        logits,
        answers.completions.tokens,
        reference.group_normalised_advantage(REWARDS).flatten(),
        mask=answers.completions.mask,
    ).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in learner.policy.model.parameters()])
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_a_batch_without_signal_costs_no_forward_and_no_step(monkeypatch):
    learner, answers = make_learner()
    before = [p.clone() for p in learner.policy.model.parameters()]
    monkeypatch.setattr(Policy, "states", lambda *_: pytest.fail("a forward pass"))
    metrics = learner.step(answers, advantages(REWARDS[[1, 3, 1, 3]]))
    assert metrics["grad_norm"] == 0.0 and "policy_loss" not in metrics
    assert all(map(torch.equal, learner.policy.model.parameters(), before))


def test_only_groups_with_signal_are_run(monkeypatch):
    learner, answers = make_learner()
    (part,) = next(learner.minibatches(answers, ADVANTAGES)).parts
    assert torch.equal(part.prompts.ids, answers.prompts.ids[[0, 2]])
    assert torch.equal(part.advantages.view(2, 4).sum(-1).abs() < 1e-6, torch.tensor([True, True]))
    learner, answers = make_learner(beta=0.1)
    assert len(next(learner.minibatches(answers, ADVANTAGES)).parts[0].tokens) == 16


def test_one_inner_iteration_has_ratio_one_and_loss_zero_yet_a_gradient():
    learner, answers = make_learner()
    metrics = learner.step(answers, ADVANTAGES)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["policy_loss"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["grad_norm"] > 1e-3


def test_later_inner_iterations_compare_with_the_sampling_policy():
    learner, answers = make_learner(inner_iterations=3, learning_rate=1e-2, warmup_steps=0)
    metrics = learner.step(answers, ADVANTAGES)
    assert metrics["ratio_max"] > 1.01
    assert metrics["clip_ratio/region_mean"] > 0


def test_the_kl_is_to_the_model_before_training():
    learner, answers = make_learner(beta=0.1, learning_rate=1e-3, warmup_steps=0)
    assert learner.step(answers, ADVANTAGES)["kl"] == pytest.approx(0.0, abs=1e-12)
    assert learner.step(answers, ADVANTAGES)["kl"] > 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_the_named_losses_are_those_of_the_package(loss):
    ours = grpo_kernels.LossConfig(**TrainConfig(loss=loss).loss_fields())
    arguments = {"max_completion_length": 12} if loss == "dr_grpo" else {}
    assert ours == getattr(grpo_kernels.LossConfig, loss)(**arguments)


def test_the_learning_rate_warms_up():
    learner, answers = make_learner(learning_rate=8e-6, warmup_steps=4)
    rates = [learner.step(answers, ADVANTAGES)["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([2e-6, 4e-6, 6e-6, 8e-6, 8e-6, 8e-6])


def test_minibatches_step_once_each_and_later_ones_compare_with_the_sampling_policy():
    learner, answers = make_learner(minibatches=2, learning_rate=1e-2, warmup_steps=0)
    steps = []
    learner.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    metrics = learner.step(answers, ADVANTAGES)
    assert len(steps) == 2
    # The policy moved between them: the second one's ratios are not 1.
    assert metrics["ratio_max"] > 1.001


def test_one_minibatch_s_gradient_is_that_of_its_own_questions():
    half, answers = make_learner(max_grad_norm=1e6)
    found = list(half.minibatches(answers, ADVANTAGES))
    assert [each.denominators["normalizer"] for each in found] == [16]
    half, answers = make_learner(max_grad_norm=1e6, minibatches=2)
    first, second = half.minibatches(answers, ADVANTAGES)
    assert first.denominators["normalizer"] == second.denominators["normalizer"] == 8
    tokens = answers.completions.mask.view(2, -1).sum(-1).tolist()
    assert [each.denominators["entropy_normalizer"] for each in (first, second)] == tokens


@pytest.mark.parametrize("minibatches", [1, 3, 4])
def test_there_are_as_many_minibatches_as_asked_for_of_even_sizes(minibatches):
    learner, answers = make_learner(minibatches=minibatches)
    found = list(learner.minibatches(answers, torch.ones(16)))
    sizes = [each.denominators["normalizer"] // 4 for each in found]
    assert len(sizes) == minibatches and sum(sizes) == 4 and max(sizes) - min(sizes) <= 1


def test_truncated_answers_are_left_out_of_the_loss_and_of_its_denominator():
    learner, answers = make_learner(mask_truncated=True, loss="bnpo")
    finished = torch.arange(16) % 3 > 0
    answers = replace(answers, completions=replace(answers.completions, finished=finished))
    (minibatch,) = learner.minibatches(answers, torch.ones(16))
    counted = answers.completions.mask & finished[:, None]
    assert minibatch.denominators["normalizer"] == counted.sum()
    (part,) = minibatch.parts
    assert torch.equal(part.counted, counted[:, : part.counted.shape[1]])
    assert torch.equal(part.mask, answers.completions.mask[:, : part.mask.shape[1]])


def test_advantages_of_tokens_are_cut_with_them():
    learner, answers = make_learner(micro_batch=1)
    of_tokens = ADVANTAGES[:, None] * torch.ones(answers.completions.mask.shape)
    whole = learner.step(answers, of_tokens)
    learner, answers = make_learner(micro_batch=1)
    assert whole == pytest.approx(learner.step(answers, ADVANTAGES), rel=1e-6, abs=1e-9)


def test_the_reference_is_refreshed_every_so_many_steps():
    learner, answers = make_learner(
        beta=0.1, learning_rate=1e-2, warmup_steps=0, reference_refresh=2
    )
    kls = [learner.step(answers, ADVANTAGES)["kl"] for _ in range(5)]
    assert [kls[0], kls[2], kls[4]] == pytest.approx([0.0] * 3, abs=1e-12)
    assert kls[1] > 1e-6 and kls[3] > 1e-6


def test_the_sampler_s_numbers_are_compared_with_the_trainer_s():
    learner, answers = make_learner()
    metrics = learner.step(answers, ADVANTAGES)
    assert 0 < metrics["sampling/sampling_logp_difference/max"] < 1e-4
    shifted = replace(answers.completions, logprob=answers.completions.logprob - 0.5)
    learner, _ = make_learner()
    metrics = learner.step(replace(answers, completions=shifted), ADVANTAGES)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.6487, abs=1e-3)
