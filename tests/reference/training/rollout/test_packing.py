"""Packed completions: the values do not depend on how many completions share a row."""

from types import SimpleNamespace

import pytest
import torch

from reference.training.rollout import packing
from reference.training.rollout.generate import Completions, encode, generate
from tests.helpers.rollout import END, QUESTIONS, completion_logits


def sample(scratch, group_size=3, temperature=1.0):
    model, tokenizer = scratch
    torch.manual_seed(1)
    return generate(
        model,
        encode(tokenizer, QUESTIONS),
        group_size=group_size,
        max_new_tokens=9,
        eos_ids=[END],
        pad_id=0,
        temperature=temperature,
    )


def logits_and_gradient(scratch, completions):
    model, tokenizer = scratch
    logits = completion_logits(
        model, encode(tokenizer, QUESTIONS), completions.tokens, completions.mask
    )
    mask = completions.mask
    logprobs = logits.log_softmax(-1).gather(-1, completions.tokens[..., None]).squeeze(-1)
    weights = torch.linspace(-1, 1, int(mask.sum()), dtype=logits.dtype)
    loss = (logprobs[mask] * weights).sum()
    return logits[mask], torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("row_tokens", [0, 7 + 2 * 8, 7 + 3 * 8])
def test_logits_and_gradients_do_not_depend_on_completions_per_row(
    scratch, monkeypatch, row_tokens
):
    completions = sample(scratch, group_size=6, temperature=2.0)
    expected, expected_gradient = logits_and_gradient(scratch, completions)
    monkeypatch.setattr(packing, "ROW_TOKENS", row_tokens)
    states, gradient = logits_and_gradient(scratch, completions)
    assert torch.allclose(states, expected, atol=1e-12)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_masked_tokens_have_no_effect(scratch):
    completions = sample(scratch, group_size=20, temperature=3.0)
    states, _ = logits_and_gradient(scratch, completions)
    garbage = completions.tokens.where(completions.mask, 7)
    changed = Completions(garbage, completions.mask, completions.logprob, completions.finished)
    assert not completions.mask.all()
    assert torch.equal(logits_and_gradient(scratch, changed)[0], states)


def test_empty_completion_does_not_affect_the_others(scratch):
    completions = sample(scratch)
    expected = logits_and_gradient(scratch, completions)[0]
    mask = completions.mask.clone()
    mask[4] = False
    others = Completions(completions.tokens, mask, completions.logprob, completions.finished)
    states, gradient = logits_and_gradient(scratch, others)
    assert torch.allclose(states, expected[mask[completions.mask]], atol=1e-12)
    assert all(grad.isfinite().all() for grad in gradient)


def stub_model(**config):
    config = {"_attn_implementation": "sdpa"} | config
    config = SimpleNamespace(**config)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, _supports_attention_backend=True)


def test_row_holds_the_largest_divisor_of_the_group_that_fits():
    lengths = (10, 400, 1000)
    shares = [packing.completions_per_row(stub_model(), 12, 48, T + 1) for T in lengths]
    assert shares == [12, 4, 2]
    assert packing.completions_per_row(stub_model(), 12, 5000, 9) == 1


@pytest.mark.parametrize(
    "model",
    [
        stub_model(_attn_implementation="eager"),
        stub_model(_attn_implementation="flash_attention_2"),
        stub_model(sliding_window=4096),
        stub_model(layer_types=["full_attention", "linear_attention"]),
        SimpleNamespace(config=stub_model().config, _supports_attention_backend=False),
        SimpleNamespace(**vars(stub_model()), _is_stateful=True),
    ],
)
def test_models_without_arbitrary_masks_get_one_completion_per_row(model):
    assert packing.completions_per_row(model, 8, 10, 5) == 1
