"""grpo_loss(inplace=True): the gradient overwrites the logits, which cannot be used again."""

import pytest
import torch

from grpo_kernels import LossConfig, grpo_loss, token_stats
from grpo_kernels.ops import token_stats as operators
from tests.helpers.grpo_loss import CONFIGS, B, T, V, make_inputs, run
from tests.helpers.tensors import make_case


def gradient_of_hidden(inplace, config, dtype, **extra):
    _, tokens, advantages, keywords = make_inputs(1, B, T, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, 8, generator=generator).requires_grad_()
    weight = torch.randn(8, V, generator=generator)
    logits = (hidden @ weight).to(dtype)  # not a leaf, like the logits of a language model
    loss, metrics = grpo_loss(
        logits, tokens, advantages, config=config, inplace=inplace, **keywords, **extra
    )
    before = logits.detach().clone()
    (1.5 * loss).backward()
    return loss.detach(), metrics, hidden.grad, before, logits.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grpo", "every term", "gspo", "beta, k3", "beta, forward"])
def test_inplace_is_bitwise_equal(backend, dtype, name):
    expected = gradient_of_hidden(False, CONFIGS[name], dtype, softcap=30.0, temperature=0.9)
    actual = gradient_of_hidden(True, CONFIGS[name], dtype, softcap=30.0, temperature=0.9)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)


def test_gradient_overwrites_logits(backend, monkeypatch):
    logits, tokens, advantages, keywords = make_inputs(2, B, T, dtype=torch.float32)
    _, _, expected = run(grpo_loss, logits, tokens, advantages, **keywords)

    def refuse(*arguments):
        raise AssertionError("a second tensor of the logits' size was allocated")

    monkeypatch.setattr(operators, "_backward", refuse)
    leaf = logits.clone().requires_grad_()
    values = leaf * 1.0
    pointers = []
    values.register_hook(lambda gradient: pointers.append(gradient.data_ptr()))
    grpo_loss(values, tokens, advantages, inplace=True, **keywords).loss.backward()
    assert torch.equal(values.detach(), expected) and torch.equal(leaf.grad, expected)
    assert pointers == [values.data_ptr()]


@pytest.mark.parametrize("name", ["every term", "entropy bonus"])
@pytest.mark.parametrize("inplace", [False, True])
def test_only_logits_are_modified(backend, inplace, name):
    logits, tokens, advantages, keywords = make_inputs(3, B, T, dtype=torch.float32)
    config = CONFIGS[name]
    given = {"tokens": tokens, "advantages": advantages, **keywords}
    copies = {name: value.clone() for name, value in given.items()}
    values = logits.clone().requires_grad_() * 1.0
    grpo_loss(values, config=config, inplace=inplace, **given).loss.backward()
    assert torch.equal(values.detach(), logits) is not inplace
    for name, value in given.items():
        assert torch.equal(value, copies[name]), name


def test_overwritten_logits_cannot_be_scored_again(backend):
    logits, tokens, advantages, keywords = make_inputs(4, B, T, dtype=torch.float32)
    values = logits.requires_grad_() * 1.0
    loss, _ = grpo_loss(values, tokens, advantages, inplace=True, **keywords)
    for score_again in (
        lambda: grpo_loss(values, tokens, advantages, **keywords),
        lambda: grpo_loss(values, tokens, advantages, inplace=True, **keywords),
        lambda: token_stats(values, tokens),
    ):
        with pytest.raises(ValueError, match="logits must not be used again after inplace=True"):
            score_again()
    loss.backward()


def test_second_backward_raises(backend):
    logits, tokens, advantages, keywords = make_inputs(5, B, T, dtype=torch.float32)
    values = logits.requires_grad_() * 1.0
    config = CONFIGS["beta, forward"]  # its gradient is computed in backward from the logits
    loss, _ = grpo_loss(values, tokens, advantages, config=config, inplace=True, **keywords)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_of_another_reader_raises(backend):
    logits, tokens, advantages, keywords = make_inputs(6, B, T, dtype=torch.float32)
    values = logits.requires_grad_() * 1.0
    other = values.square().sum()  # saves the logits
    loss, _ = grpo_loss(values, tokens, advantages, inplace=True, **keywords)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_strided_logits_padding_is_not_written(backend):
    logits, tokens, advantages, keywords = make_inputs(7, B, T, dtype=torch.float32)
    _, _, expected = run(grpo_loss, logits, tokens, advantages, **keywords)
    wide = torch.full((B, T + 1, V), 7.0)
    wide[:, :-1] = logits
    values = wide[:, :-1].requires_grad_()
    grpo_loss(values, tokens, advantages, inplace=True, **keywords).loss.backward()
    assert torch.equal(values.grad, expected) and (wide[:, -1] == 7).all()


@pytest.mark.usefixtures("pytorch_backend")
def test_failed_call_of_two_passes_leaves_logits_usable():
    logits, tokens = make_case(3, 1, 2, 5)
    config, advantages = LossConfig.gspo(), torch.ones(1)
    with pytest.raises(ValueError, match="tokens must lie in"):
        grpo_loss(logits, tokens + 9, advantages, config=config, inplace=True)
    grpo_loss(logits, tokens, advantages, config=config, inplace=True)
    with pytest.raises(ValueError, match="must not be used again"):
        grpo_loss(logits, tokens, advantages, config=config)
