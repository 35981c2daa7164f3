"""Sampling with a shared prompt against full forward passes: masks, padding, log-probs."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import TokenSupport
from reference.training.rollout.generate import (
    Completions,
    _choose,
    encode,
    generate,
)
from tests.helpers.rollout import END, QUESTIONS, completion_logits


def sample(scratch, **changes):
    model, tokenizer = scratch
    settings = {"group_size": 3, "max_new_tokens": 9, "eos_ids": [END], "pad_id": 0} | changes
    torch.manual_seed(1)
    return generate(model, encode(tokenizer, QUESTIONS), **settings)


def logprobs(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def logits_alone(scratch, question, tokens):
    """Compute the tokens' logits in one unpadded pass over question and tokens, without a cache."""
    model, tokenizer = scratch
    prompt = encode(tokenizer, [question]).ids[0]
    logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0]
    return logits[len(prompt) - 1 : -1]


def test_prompts_are_padded_on_the_left(scratch):
    prompts = encode(scratch[1], QUESTIONS)
    assert prompts.ids.shape == (3, 7)
    assert prompts.mask.sum(-1).tolist() == [2, 7, 6]
    assert prompts.mask[:, -1].all() and not prompts.mask[0, :5].any()


@pytest.mark.parametrize("pad_id", [0, END])
def test_mask_ends_with_the_end_token_even_if_padding_is_that_token(scratch, pad_id):
    completions = sample(scratch, group_size=40, pad_id=pad_id, temperature=3.0)
    ended = 0
    for tokens, mask, finished in zip(
        completions.tokens.tolist(), completions.mask.tolist(), completions.finished, strict=True
    ):
        length = tokens.index(END) + 1 if finished else len(tokens)
        assert mask == [True] * length + [False] * (len(tokens) - length)
        assert tokens[length:] == [pad_id] * (len(tokens) - length)
        assert finished == (END in tokens[:length])
        ended += int(finished)
    assert 0 < ended < len(completions.finished)


def test_masks_do_not_depend_on_the_padding_token(scratch):
    a, b = sample(scratch, pad_id=0), sample(scratch, pad_id=END)
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.tokens[a.mask], b.tokens[b.mask])


def test_generation_stops_when_every_completion_has_ended(scratch):
    assert sample(scratch, eos_ids=range(16)).tokens.shape == (9, 1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_logprobs_match_the_forward_pass(scratch, temperature):
    model, tokenizer = scratch
    completions = sample(scratch, temperature=temperature)
    logits = completion_logits(
        model, encode(tokenizer, QUESTIONS), completions.tokens, completions.mask
    )
    expected = logprobs(logits / temperature, completions.tokens)[completions.mask]
    assert torch.allclose(completions.logprob[completions.mask].double(), expected, atol=1e-5)
    assert (completions.logprob[~completions.mask] == 0).all()


def test_packed_logits_match_each_sequence_alone(scratch):
    model, tokenizer = scratch
    completions = sample(scratch)
    logits = completion_logits(
        model, encode(tokenizer, QUESTIONS), completions.tokens, completions.mask
    )
    for row, (tokens, mask) in enumerate(zip(completions.tokens, completions.mask, strict=True)):
        expected = logits_alone(scratch, QUESTIONS[row // 3], tokens[mask])
        assert torch.allclose(logits[row, mask], expected, atol=1e-12)


def test_packed_gradient_matches_the_sequences_alone(scratch):
    model, tokenizer = scratch
    completions = sample(scratch)
    weights = torch.randn(completions.tokens.shape, dtype=torch.float64)
    logits = completion_logits(
        model, encode(tokenizer, QUESTIONS), completions.tokens, completions.mask
    )
    shared = (logprobs(logits, completions.tokens) * weights)[completions.mask].sum()
    separate = sum(
        (logprobs(logits_alone(scratch, QUESTIONS[row // 3], t[m]), t[m]) * weights[row, m]).sum()
        for row, (t, m) in enumerate(zip(completions.tokens, completions.mask, strict=True))
    )
    parameters = list(model.parameters())
    for ours, expected in zip(
        torch.autograd.grad(shared, parameters),
        torch.autograd.grad(separate, parameters),
        strict=True,
    ):
        # Llama's norms compute in fp32 whatever the model's dtype.
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradient_is_summed_in_a_fixed_order(scratch):
    """On a CPU index_put with accumulate depends on the order of threads."""
    model, tokenizer = scratch
    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append((str(function), *arguments[3:4]))
            return function(*arguments, **(keywords or {}))

    prompts, done = encode(tokenizer, QUESTIONS), sample(scratch)
    with Operators():
        logits = completion_logits(model, prompts, done.tokens, done.mask)
        logits.sum().backward()
    assert "aten.embedding_dense_backward.default" in dict.fromkeys(name for name, *_ in seen)
    assert not [name for name, *added in seen if "index_put" in name and added == [True]]


def test_greedy_generation_matches_argmax_of_full_passes(scratch):
    model, tokenizer = scratch
    completions = sample(scratch, group_size=2, temperature=0.0)
    for row, (tokens, mask) in enumerate(zip(completions.tokens, completions.mask, strict=True)):
        ids = encode(tokenizer, [QUESTIONS[row // 2]]).ids
        for token in tokens[mask]:
            assert model(input_ids=ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        assert len(tokens[mask]) == 9 or tokens[mask][-1] == END


@torch.no_grad()
def sample_alone(scratch, row, draws, temperature):
    """Sample completion `row` from full passes over it alone, with its column of the draws."""
    model, tokenizer = scratch
    ids, tokens, values = encode(tokenizer, [QUESTIONS[row // 3]]).ids, [], []
    for draw in draws[:, row]:
        probs = (model(input_ids=ids).logits[0, -1].float() / temperature).softmax(-1)
        token = int((probs.double().cumsum(-1) <= draw).sum())
        tokens.append(token)
        values.append(probs[token].log())
        if token == END:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokens, torch.tensor(values)


def test_completions_match_each_row_sampled_alone(scratch):
    completions = sample(scratch, temperature=3.0, max_new_tokens=16)
    torch.manual_seed(1)
    draws = torch.stack([torch.rand(9) for _ in range(16)])
    lengths = completions.mask.sum(-1)
    assert len(set(lengths.tolist())) > 2
    for row, length in enumerate(lengths):
        tokens, values = sample_alone(scratch, row, draws, 3.0)
        assert completions.tokens[row, :length].tolist() == tokens
        assert torch.allclose(completions.logprob[row, :length], values, atol=1e-5)


def test_a_row_does_not_depend_on_other_rows_ending(scratch):
    ending, going_on = (
        sample(scratch, temperature=3.0, eos_ids=ids, group_size=20) for ids in ([END], [])
    )
    assert ending.mask.sum() < going_on.mask.sum()
    width = ending.tokens.shape[1]
    assert torch.equal(ending.tokens[ending.mask], going_on.tokens[:, :width][ending.mask])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_token_frequencies_match_probabilities(temperature):
    logits = torch.tensor([1.0, -2.0, -torch.inf, 3.0, 0.5, -torch.inf])
    probs = (logits / temperature).softmax(-1)
    draws = torch.arange(1000) / 1000
    token, logprob = _choose(logits.expand(1000, -1), temperature, draws)
    assert ((token.bincount(minlength=6) - 1000 * probs).abs() <= 1).all()
    assert torch.allclose(logprob, probs.log()[token])


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_extreme_draws_choose_no_token_of_probability_0(draw):
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, 100:40_000] = torch.randn(39_900)
    token, logprob = _choose(logits, 1.0, torch.tensor([draw]))
    assert token == (100 if draw == 0 else 39_999) and logprob.isfinite()


def test_same_seed_gives_same_completions(scratch):
    assert torch.equal(sample(scratch).tokens, sample(scratch).tokens)


def test_logits_of_one_token_completions(scratch):
    model, tokenizer = scratch
    tokens = torch.tensor([[4], [5], [6]])
    prompts, mask = encode(tokenizer, QUESTIONS), torch.ones(3, 1, dtype=torch.bool)
    logits = completion_logits(model, prompts, tokens, mask)
    for row, question in enumerate(QUESTIONS):
        assert torch.allclose(logits[row], logits_alone(scratch, question, tokens[row]), atol=1e-12)


def test_from_lists_pads_and_marks_finished_completions():
    policy = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=END), eos_ids=[END, 9], device=torch.device("cpu")
    )
    completions = Completions.from_lists(
        [[5, 9, END], [7], [5, 6, 8]],
        [[-0.5, -1.5, -0.25], [-2.0], [-1.0, -1.0, -1.0]],
        policy,
        TokenSupport.from_lists([[5], [9, 2], [], [7, 3], [5], [6], [8]]),
    )
    assert completions.tokens.tolist() == [[5, 9, END], [7, END, END], [5, 6, 8]]
    assert completions.mask.tolist() == [[True] * 3, [True, False, False], [True] * 3]
    assert completions.logprob[1].tolist() == [-2.0, 0.0, 0.0]
    assert completions.finished.tolist() == [True, False, False]
    selected = completions[[1, 0]]
    assert selected.tokens.tolist() == [[7, END, END], [5, 9, END]]
    assert selected.support.lengths.tolist() == [2, 0, 0, 1, 2, 0]
    assert selected.support.token_ids.tolist() == [7, 3, 5, 9, 2]
