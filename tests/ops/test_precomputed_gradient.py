"""Gradients that are ready with the loss: scaled, handed out without a copy, and repeatable."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss
from grpo_kernels.ops import precomputed_gradient as ready_gradient
from tests.helpers.grpo_loss import CONFIGS, B, T, make_inputs, run


def loss_of_logits(dtype=torch.float32, **keywords):
    logits, tokens, advantages, given = make_inputs(3, B, T, dtype=dtype)
    logits.requires_grad_()
    return logits, grpo_loss(logits, tokens, advantages, **given, **keywords).loss


def loss_of_hidden(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(37, 8, generator=generator, dtype=dtype).requires_grad_()
    tokens = torch.randint(0, 37, (2, 3), generator=generator)
    loss = linear_grpo_loss(hidden, weight, tokens, torch.tensor([1.0, -0.5])).loss
    return weight, loss


class StoragesMade(TorchDispatchMode):
    """The sizes in bytes of the storages behind every tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
        return made


LOSSES = [loss_of_logits, loss_of_hidden]


@pytest.mark.parametrize("compute_loss", LOSSES)
def test_second_backward_gives_same_gradient(backend, compute_loss):
    """With retain_graph, under other incoming gradients, whatever became of the first result."""
    leaf, loss = compute_loss()
    first, second, third = (
        torch.autograd.grad(loss, leaf, torch.tensor(factor), retain_graph=True)[0].clone()
        for factor in (2.0, 3.0, -1.0)
    )
    torch.testing.assert_close(first / 2, second / 3)
    torch.testing.assert_close(first / 2, -third)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("compute_loss", LOSSES)
def test_gradients_accumulate_with_retain_graph(backend, compute_loss):
    leaf, loss = compute_loss()
    for _ in range(3):
        loss.backward(retain_graph=True)
    (once,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(leaf.grad, 3 * once)


@pytest.mark.parametrize("compute_loss", LOSSES)
def test_backward_after_zero_gradient_raises(backend, compute_loss):
    leaf, loss = compute_loss()
    (nothing,) = torch.autograd.grad(loss, leaf, torch.tensor(0.0), retain_graph=True)
    assert (nothing == 0).all()
    with pytest.raises(RuntimeError, match="after one in which the loss's gradient was 0"):
        torch.autograd.grad(loss, leaf)


def test_incoming_gradient_may_change_between_backwards(backend):
    leaf, loss = loss_of_logits()
    incoming = torch.tensor(2.0)
    first = torch.autograd.grad(loss, leaf, incoming, retain_graph=True)[0].clone()
    incoming.fill_(5.0)
    (second,) = torch.autograd.grad(loss, leaf, incoming)
    torch.testing.assert_close(second, 2.5 * first)


@pytest.mark.parametrize("compute_loss", LOSSES)
def test_backward_allocates_no_large_tensor(backend, compute_loss):
    leaf, loss = compute_loss()
    with StoragesMade() as made:
        loss.backward()
    large = {pointer for pointer, nbytes in made.sizes.items() if nbytes >= leaf.nbytes}
    assert large <= {leaf.grad.data_ptr()} and leaf.grad.abs().sum() > 0


def test_accumulate_grad_takes_gradient_without_copy(backend, monkeypatch):
    made = []
    scale_ = ready_gradient._scale_

    def noted(x, factor):
        made.append(x.data_ptr())
        scale_(x, factor)

    monkeypatch.setattr(ready_gradient, "_scale_", noted)
    leaf, loss = loss_of_hidden()
    loss.backward()
    assert leaf.grad.data_ptr() in made, "AccumulateGrad copied instead of taking"


def test_power_of_two_scale_does_not_round_bf16_gradient(backend):
    _, loss = loss_of_logits(torch.bfloat16)
    leaf, scaled = loss_of_logits(torch.bfloat16)
    (scaled * 65536.0).backward()
    other, loss = loss_of_logits(torch.bfloat16)
    loss.backward()
    assert torch.equal(leaf.grad, other.grad * 65536.0)


def test_fp16_gradient_with_loss_scale(backend):
    """1/65,536 of it underflows in fp16: made before the scale came, it would be 0."""
    logits, tokens, advantages, keywords = make_inputs(3, B, T, dtype=torch.float16)
    advantages = advantages * 1e-6
    _, _, scaled = run(grpo_loss, logits, tokens, advantages, 2.0**16, **keywords)
    exact = run(grpo_loss, logits.double(), tokens, advantages, 2.0**16, **keywords)[2]
    torch.testing.assert_close(scaled.double(), exact, rtol=2e-3, atol=1e-6)


def test_second_derivative_raises(backend):
    leaf, loss = loss_of_logits()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("name", ["entropy bonus", "beta, k3", "dual clip"])
def test_one_pass_compiles_fullgraph(backend, name):
    torch._dynamo.reset()
    logits, tokens, advantages, keywords = make_inputs(8, B, T, dtype=torch.float32)
    compiled = torch.compile(grpo_loss, backend="aot_eager", fullgraph=True)
    for inplace in (False, True):
        case = {"config": CONFIGS[name], "inplace": inplace, **keywords}
        expected = run(
            lambda x, *a, **k: grpo_loss(x * 1, *a, **k), logits, tokens, advantages, **case
        )
        actual = run(
            lambda x, *a, **k: compiled(x * 1, *a, **k), logits, tokens, advantages, **case
        )
        torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


def test_config_encode_decode_round_trip():
    """All but the entropy's coefficient, which the operators get as the weight of a sum."""
    config = LossConfig.dapo(beta=0.1, kl_estimator="k3+", delta=2.0)
    assert ready_gradient.config_of(config.text) == config
