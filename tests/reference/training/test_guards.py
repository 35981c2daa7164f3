"""Values that are not finite, and memory that runs out."""

import pytest
import torch

from reference import train
from reference.training.errors import UserError
from reference.training.rollout.samplers import SharedPrompt
from reference.training.update.learner import Learner
from tests.helpers.learner import ADVANTAGES, QUESTIONS, make_learner
from tests.helpers.training_runs import tiny

NAN = float("nan")


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(learner):
    return [param.detach().clone() for param in learner.policy.model.parameters()]


def with_changed_loss(learner, monkeypatch, change, number: int):
    """Change the loss of one micro-batch, counted from 1, in the next steps of the learner."""
    original, calls = learner.loss, []

    def loss(batch, denominators):
        output = original(batch, denominators)
        calls.append(batch)
        return change(output) if len(calls) == number else output

    monkeypatch.setattr(learner, "loss", loss)
    return learner


@pytest.mark.parametrize(
    ("changes", "metric", "value", "message"),
    [
        ({}, "policy_loss", "nan", r"micro-batch 2 of 2 is nan: policy nan\. The weights are as"),
        ({"beta": 0.1}, "kl", "inf", r"micro-batch 2 of 4 is inf: KL inf\. The weights are as"),
        ({"entropy_coef": 0.1}, "entropy", "-inf", r"2 of 4 is -inf: entropy -inf\. The weights"),
    ],
)
def test_non_finite_loss_names_its_micro_batch_and_leaves_weights(
    monkeypatch, changes, metric, value, message
):
    learner, samples = make_learner(micro_batch=1, learning_rate=0.1, **changes)
    bad = torch.tensor(float(value), dtype=torch.float64)

    def change(output):
        loss = output.loss * bad.abs() + bad
        return output._replace(loss=loss, metrics=output.metrics | {metric: bad})

    learner.step(samples, ADVANTAGES)
    before = weights(learner)
    with_changed_loss(learner, monkeypatch, change, 2)
    with pytest.raises(UserError, match=rf"^step 2: the loss of .*{message}"):
        learner.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), before))
    assert all(param.grad is None for param in learner.policy.model.parameters())


def test_non_finite_gradient_is_named_and_leaves_weights():
    learner, samples = make_learner(learning_rate=0.1)
    before = weights(learner)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(learner.policy.model.named_parameters())[name]
    weight.register_hook(lambda gradient: gradient * NAN)
    with pytest.raises(UserError, match=rf"^step 1: the gradient of {name} is not finite\. The"):
        learner.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), before))


def test_gradient_norm_overflow_has_its_own_message():
    learner, samples = make_learner(learning_rate=0.1)
    weight = learner.policy.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient.sign() * 1e300)
    with pytest.raises(UserError, match=r"^step 1: the norm of the gradient overflows\. The"):
        learner.step(samples, ADVANTAGES)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
]


def with_failing_passes(learner, monkeypatch, error, calls):
    """Make the passes of these numbers fail; return a list of the questions per pass."""
    original, count = learner.loss, []

    def loss(batch, denominators):
        count.append(batch.num_questions)
        if len(count) in calls:
            raise error
        return original(batch, denominators)

    monkeypatch.setattr(learner, "loss", loss)
    return count


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
def test_out_of_memory_step_repeats_with_half_micro_batches(monkeypatch, capsys, error):
    flags = {"beta": 0.1, "inner_iterations": 2, "learning_rate": 0.01, "warmup_steps": 0}
    whole, samples = make_learner(**flags)
    half, _ = make_learner(micro_batch=2, **flags)
    learner, _ = make_learner(**flags)
    seen = with_failing_passes(learner, monkeypatch, error, {1})
    for _ in range(2):
        found = learner.step(samples, ADVANTAGES)
        assert found == half.step(samples, ADVANTAGES)
        assert found == pytest.approx(whole.step(samples, ADVANTAGES), rel=1e-9, abs=1e-12)
    assert all(map(torch.equal, weights(learner), weights(half)))
    assert seen == [4, *[2] * 8]
    assert capsys.readouterr().err == (
        "out of memory in step 1 with micro-batches of 4 questions: from here on 2; the gradient "
        "is the same\n"
    )


def test_out_of_memory_discards_the_partial_gradient(monkeypatch):
    half, samples = make_learner(micro_batch=1, beta=0.1)
    learner, _ = make_learner(micro_batch=2, beta=0.1)
    with_failing_passes(learner, monkeypatch, OUT_OF_MEMORY[0], {2})
    assert learner.step(samples, ADVANTAGES) == half.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), weights(half)))


@pytest.mark.parametrize(
    ("flags", "calls", "size"),
    [({}, {1, 2}, 2), ({"micro_batch": 1}, {1}, 1), ({"top_entropy": 0.2}, {1}, 4)],
    ids=["twice", "one question", "tokens ranked within a micro-batch"],
)
def test_out_of_memory_names_flags_if_halving_does_not_help(monkeypatch, flags, calls, size):
    learner, samples = make_learner(beta=0.1, **flags)
    before = weights(learner)
    with_failing_passes(learner, monkeypatch, OUT_OF_MEMORY[0], calls)
    expected = (
        rf"^out of memory in step 1 with micro-batches of {size} questions: lower --micro-batch, "
        r"--max-new-tokens or --group-size, or set --gradient-checkpointing$"
    )
    with pytest.raises(UserError, match=expected):
        learner.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), before))


def test_other_runtime_errors_pass_through(monkeypatch):
    learner, samples = make_learner()
    with_failing_passes(learner, monkeypatch, RuntimeError("shapes do not match"), {1})
    with pytest.raises(RuntimeError, match="shapes"):
        learner.step(samples, ADVANTAGES)


def test_out_of_memory_while_sampling_names_flags():
    learner, _ = make_learner()

    class Sampler(SharedPrompt):
        def sample(self, *_):
            raise OUT_OF_MEMORY[0]

    with pytest.raises(
        UserError,
        match=r"^out of memory while answers were sampled: lower --prompts, --group-size or --max-",
    ):
        learner.policy.sample(QUESTIONS, 4, 1.0, Sampler())


def test_out_of_memory_in_the_optimiser_names_lora(monkeypatch):
    learner, samples = make_learner()

    def step():
        raise OUT_OF_MEMORY[0]

    monkeypatch.setattr(learner.optimizer, "step", step)
    with pytest.raises(UserError, match="out of memory while the optimiser stepped: --lora-rank"):
        learner.step(samples, ADVANTAGES)


def test_nan_ends_the_run_and_keeps_its_checkpoint(tmp_path, tiny_model, monkeypatch, capsys):
    original = Learner.loss

    def loss(learner, batch, denominators):
        output = original(learner, batch, denominators)
        return output._replace(loss=output.loss * NAN) if learner.steps == 3 else output

    monkeypatch.setattr(train, "plot_dashboard", lambda *_: None)
    monkeypatch.setattr(Learner, "loss", loss)
    assert tiny(tmp_path, "--model", tiny_model, "--checkpoint-every", "2") == 2
    said = capsys.readouterr().err
    assert "error: step 3: the loss of micro-batch 1 of 1 is nan. The weights are" in said
    assert f"to go on after step 2: python reference/train.py --resume {tmp_path}\n" in said
    assert (tmp_path / "model" / "model.safetensors").exists()
