"""The learner with a teacher: the divergence, its gradient, and what it leaves out."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

from reference.training.model.scorers import FusedScorer, PlainScorer
from tests.helpers.learner import make_learner
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


def test_minibatches_and_inner_iterations_take_optimiser_steps():
    learner, samples = distiller(minibatches=2, inner_iterations=2)
    steps = []
    learner.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    learner.step(samples, ZEROS)
    assert len(steps) == 4


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
