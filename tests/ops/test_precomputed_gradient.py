"""Gradients computed together with the loss: backward scales them without a copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss
from grpo_kernels.ops import precomputed_gradient
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


class RecordStorages(TorchDispatchMode):
    """Record the size in bytes of the storage behind every returned tensor."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
        return result


LOSSES = [loss_of_logits, loss_of_hidden]


@pytest.mark.parametrize("compute_loss", LOSSES)
def test_second_backward_gives_same_gradient(backend, compute_loss):
    """With retain_graph and other incoming gradients."""
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
    (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(0.0), retain_graph=True)
    assert (gradient == 0).all()
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
    with RecordStorages() as storages:
        loss.backward()
    large = {pointer for pointer, nbytes in storages.sizes.items() if nbytes >= leaf.nbytes}
    assert large <= {leaf.grad.data_ptr()} and leaf.grad.abs().sum() > 0


def test_accumulate_grad_takes_gradient_without_copy(backend, monkeypatch):
    pointers = []
    scale_ = precomputed_gradient._scale_

    def recording(x, factor):
        pointers.append(x.data_ptr())
        scale_(x, factor)

    monkeypatch.setattr(precomputed_gradient, "_scale_", recording)
    leaf, loss = loss_of_hidden()
    loss.backward()
    assert leaf.grad.data_ptr() in pointers, "AccumulateGrad copied the gradient"


def test_power_of_two_scale_does_not_round_bf16_gradient(backend):
    _, loss = loss_of_logits(torch.bfloat16)
    leaf, scaled = loss_of_logits(torch.bfloat16)
    (scaled * 65536.0).backward()
    other, loss = loss_of_logits(torch.bfloat16)
    loss.backward()
    assert torch.equal(leaf.grad, other.grad * 65536.0)


def test_fp16_gradient_with_loss_scale(backend):
    """Without its scale of 65,536 the gradient would underflow to 0 in fp16."""
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
    """Every field but entropy_coef, which the operators get as a tensor."""
    config = LossConfig.dapo(beta=0.1, kl_estimator="k3+", delta=2.0)
    assert LossConfig.decode(config.text, config.coefficients) == config
