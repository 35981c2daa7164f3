"""The learner with a teacher: the divergence, its gradient, and what it leaves out."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

from reference.training.model.scorers import FusedScorer, PlainScorer
from reference.training.update import learner as learner_module
from tests.helpers.learner import ADVANTAGES, make_learner
from tests.helpers.rollout import completion_logits

pytestmark = pytest.mark.usefixtures("one_thread", "pytorch_backend")

SCORERS = {"fused": FusedScorer(), "plain": PlainScorer()}
ZEROS = torch.zeros(16)
KINDS = ["reverse", "forward", "jsd"]


def distiller(scorer="plain", *, rows=16, **changes):
    """Make a learner with a random teacher of another width, and maybe of more rows."""
    if changes.get("distill") == "jsd":
        changes["jsd_weight"] = 0.3
    sizes = {"hidden_size": 64}, {"hidden_size": 96, "vocab_size": rows}
    return make_learner(SCORERS[scorer], sizes=sizes, max_grad_norm=1e6, **changes)


def divergence(learner, samples, kind, temperature=1.0):
    """Compute the divergence by its definition, as a mean over the tokens of all completions."""
    done = samples.completions
    inputs = samples.prompts, done.tokens, done.mask
    p, q = (
        log_softmax(completion_logits(policy.model, *inputs)[..., :16] / temperature, dim=-1)
        for policy in (learner.policy, learner.teacher)
    )
    q = q.detach()
    if kind == "jsd":  # of weight 0.3 of the teacher
        m = (0.7 * p.exp() + 0.3 * q.exp()).log()
        per_token = (0.7 * p.exp() * (p - m) + 0.3 * q.exp() * (q - m)).sum(-1)
    else:
        per_token = (p.exp() * (p - q) if kind == "reverse" else q.exp() * (q - p)).sum(-1)
    return per_token[done.mask].mean()


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 1, "temperature": 1.7},
        {"rows": 19, "top_k": 3},
    ],
    ids=str,
)
def test_gradient_is_that_of_the_divergence(scorer, kind, changes):
    learner, samples = distiller(scorer, distill=kind, **changes)
    weights = list(learner.policy.model.parameters())
    value = divergence(learner, samples, kind, changes.get("temperature", 1.0))
    expected = torch.autograd.grad(value, weights)
    before = [weight.clone() for weight in learner.teacher.model.parameters()]
    metrics = learner.step(samples, ZEROS)
    assert metrics["divergence"] == pytest.approx(value.item(), rel=1e-5) and value > 0.1
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-7)
    assert all(map(torch.equal, learner.teacher.model.parameters(), before))
    names = {"divergence", "entropy", "teacher_entropy", "top1_agreement"}
    assert metrics.keys() == {"learning_rate", "grad_norm", *names}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("coef", [None, 0.5])
def test_the_teacher_scores_a_micro_batch_once_for_all_inner_iterations(scorer, coef, monkeypatch):
    """A limit of one micro-batch makes it score the others in each iteration: the same result."""
    left = []
    for limit, passes in (("none", 8), ("one", 7), ("all", 4)):
        changes = {"minibatches": 2, "micro_batch": 1, "teacher_coef": coef}
        learner, samples = distiller(scorer, inner_iterations=2, learning_rate=1e-2, **changes)
        (batch, *_), *_ = (each.micro_batches for each in learner.minibatches(samples, ZEROS))
        size = learner.scorer.teacher_predictions(learner.teacher, batch).nbytes
        size = {"none": size - 1, "one": size, "all": 10 * size}[limit]
        monkeypatch.setattr(learner_module, "MAX_KEPT_BYTES", size)
        steps, scored = [], []
        learner.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        learner.teacher.model.register_forward_hook(lambda *_, scored=scored: scored.append(1))
        for count in (1, 2):
            learner.step(samples, ADVANTAGES)
            assert (len(steps), len(scored)) == (4 * count, passes * count)
        left.append([param.detach().clone() for param in learner.policy.model.parameters()])
    assert all(torch.equal(*each) for each in zip(left[0], left[1], strict=True))
    assert all(torch.equal(*each) for each in zip(left[0], left[2], strict=True))


def test_a_part_of_a_micro_batch_has_no_kept_predictions():
    """They would be those of the whole."""
    learner, samples = distiller(inner_iterations=2)
    (minibatch,) = learner.minibatches(samples, ZEROS)
    learner.update(minibatch)
    (batch,) = minibatch.micro_batches
    assert batch.teacher is not None and batch.split(8)[0].teacher is batch.teacher
    assert [part.teacher for part in batch.split(2)] == [None, None]


COEF = 0.5


def rl_and_divergence(learner, samples, kind, advantages, temperature=1.0):
    """Compute the GRPO loss on-policy, as a mean over sequences, and the KL to the teacher."""
    done = samples.completions
    inputs = samples.prompts, done.tokens, done.mask
    logits, teacher_logits = (
        completion_logits(policy.model, *inputs)[..., :16] / temperature
        for policy in (learner.policy, learner.teacher)
    )
    p, q = log_softmax(logits, dim=-1), log_softmax(teacher_logits.detach(), dim=-1)
    kl = (p.exp() * (p - q) if kind == "reverse" else q.exp() * (q - p)).sum(-1)
    logprob = p.gather(-1, done.tokens[..., None]).squeeze(-1)
    policy = -(logprob - logprob.detach()).exp() * advantages[:, None]
    lengths = done.mask.sum(-1)

    def mean(per_token):
        return (torch.where(done.mask, per_token, 0.0).sum(-1) / lengths).mean()

    return mean(policy) + COEF * mean(kl), mean(policy), kl[done.mask].mean()


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("changes", [{"micro_batch": 1, "temperature": 1.7}, {"rows": 19}], ids=str)
def test_gradient_is_that_of_rewards_and_teacher(scorer, kind, changes):
    learner, samples = distiller(scorer, distill=kind, teacher_coef=COEF, **changes)
    assert learner.reference_policy is None
    weights = list(learner.policy.model.parameters())
    temperature = changes.get("temperature", 1.0)
    value, policy, kl = rl_and_divergence(learner, samples, kind, ADVANTAGES, temperature)
    expected = torch.autograd.grad(value, weights)
    metrics = learner.step(samples, ADVANTAGES)
    assert metrics["divergence"] == pytest.approx(kl.item(), rel=1e-5) and kl > 0.1
    assert metrics["policy_loss"] == pytest.approx(policy.item(), rel=1e-4, abs=1e-7)
    assert "kl" not in metrics
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("support", [True, False])
def test_with_top_k_the_terms_are_over_the_tokens_that_the_loss_reads(support):
    """The loss reads the tokens that the sampler kept; with --no-support, the vocabulary."""
    found = []
    for scorer in SCORERS:
        changes = {"teacher_coef": 2.0, "top_k": 3, "support": support}
        learner, samples = distiller(scorer, **changes)
        assert (samples.completions.support is not None) == support
        metrics = learner.step(samples, ADVANTAGES)
        gradients = [param.grad for param in learner.policy.model.parameters()]
        found.append([torch.tensor(metrics["divergence"]), *gradients])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)
    is_smaller = found[0][0] < divergence(learner, samples, "reverse")
    assert is_smaller == support


def test_truncated_completions_are_masked():
    learner, samples = distiller(mask_truncated=True)
    finished = torch.arange(16) % 3 > 0
    samples = replace(samples, completions=replace(samples.completions, finished=finished))
    (minibatch,) = learner.minibatches(samples, ZEROS)
    kept = samples.completions.mask & finished[:, None]
    assert minibatch.denominators["normalizer"] == kept.sum()
    (batch,) = minibatch.micro_batches
    assert torch.equal(batch.loss_mask, kept[:, : batch.loss_mask.shape[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_student_approaches_the_teacher(kind):
    learner, samples = distiller("fused", distill=kind, learning_rate=1e-2, warmup_steps=0)
    found = [learner.step(samples, ZEROS)["divergence"] for _ in range(30)]
    assert found[-1] < 0.1 * found[0]
