"""Every sampler draws from the model's distribution and returns its log-probs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import support_from_logits
from reference import losses
from reference.training.config import SamplingSettings
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.model.load import from_scratch
from reference.training.rollout.generate import encode, number_tokens
from reference.training.rollout.samplers import SAMPLERS, pick_sampler
from reference.training.rollout.truncation import Truncation
from tests.helpers.rollout import END, QUESTIONS, completion_logits

LOCAL = ["shared-prompt", "generate", "continuous"]


@pytest.fixture(scope="module")
def policy():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small only lose when shared between threads
    torch.manual_seed(0)
    model, tokenizer = from_scratch()
    model.eval()
    with torch.no_grad():  # from new weights all tokens are as likely, and every mistake passes
        model.lm_head.weight.mul_(3)
    # What files of models ask for; no sampler may follow.
    model.generation_config.update(temperature=0.3, top_k=2, top_p=0.5, repetition_penalty=1.7)
    yield SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        eos_ids=[END],
        device=torch.device("cpu"),
        max_new_tokens=6,
        autocast=nullcontext,
        truncation=None,
        ranks=SINGLE_PROCESS,
    )
    torch.set_num_threads(threads)


def truncated(policy, **rules):
    """Truncate a policy, and end completions at a token that is likely enough to be kept."""
    changes = {"truncation": Truncation(**rules), "eos_ids": [END, 14]}
    return SimpleNamespace(**{**vars(policy), **changes})


def sample(policy, name, group_size=3, temperature=1.0, questions=QUESTIONS):
    torch.manual_seed(1)
    prompts = encode(policy.tokenizer, questions)
    return prompts, pick_sampler(SamplingSettings(sampler=name)).sample(
        policy, prompts, group_size, temperature
    )


def trainer_logprobs(policy, prompts, completions, temperature):
    with torch.no_grad():
        logits = completion_logits(policy.model, prompts, completions.tokens, completions.mask)
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, completions.tokens[..., None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", LOCAL)
def test_logprobs_match_the_trainer(policy, name, temperature):
    prompts, completions = sample(policy, name, temperature=temperature)
    mask = completions.mask
    expected = trainer_logprobs(policy, prompts, completions, temperature)
    assert torch.allclose(completions.logprob[mask], expected[mask], atol=1e-4)
    assert (completions.logprob[~mask] == 0).all()


RULES = [
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("name", ["shared-prompt", "generate"])
def test_supports_are_those_of_the_logits_and_logprobs_those_of_the_trainer(policy, name, rules):
    prompts, done = sample(truncated(policy, **rules), name, group_size=20, temperature=2.0)
    assert not done.mask.all() and done.support is not None
    with torch.no_grad():
        logits = completion_logits(policy.model, prompts, done.tokens, done.mask)
    expected = support_from_logits(logits, temperature=2.0, **rules)
    expected = expected.select(torch.where(done.mask, number_tokens(done.tokens), -1))
    assert len(expected.token_ids) > 0
    assert all(map(torch.equal, done.support, expected))
    # This raises if a token was drawn outside of its support.
    stats = losses.token_stats(
        logits, done.tokens, temperature=2.0, mask=done.mask, support=done.support
    )
    torch.testing.assert_close(stats.logprob, done.logprob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOCAL)
def test_without_support_samplers_truncate_alike(policy, name):
    rules = {"top_k": 3, "top_p": 0.9}
    prompts, done = sample(truncated(policy, **rules, return_support=False), name, group_size=20)
    assert done.support is None
    with torch.no_grad():
        logits = completion_logits(policy.model, prompts, done.tokens, done.mask)
    support = support_from_logits(logits, **rules)
    expected = losses.token_stats(logits, done.tokens, mask=done.mask, support=support).logprob
    torch.testing.assert_close(done.logprob, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOCAL)
def test_greedy_completions_are_not_truncated(policy, name):
    ours, expected = (
        sample(truncated(policy, top_k=k), name, group_size=2, temperature=0.0)[1] for k in (1, 0)
    )
    assert ours.support is expected.support is None
    assert torch.equal(ours.tokens, expected.tokens)
    assert torch.equal(ours.logprob, expected.logprob)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", LOCAL)
def test_token_frequencies_match_the_model(policy, name, temperature):
    N = 2000
    one = SimpleNamespace(**{**vars(policy), "max_new_tokens": 1})
    prompts, completions = sample(one, name, N, temperature, QUESTIONS[:1])
    with torch.no_grad():
        logits = policy.model(input_ids=prompts.ids).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    counts = completions.tokens.flatten().bincount(minlength=len(expected))
    deviation = (expected * (1 - expected) / N).sqrt()
    assert (expected > 0.01).sum() > 2  # more than the top-k of the model's files lets through
    assert ((counts / N - expected).abs() <= 4 * deviation + 1 / N).all()


@pytest.mark.parametrize("name", LOCAL)
def test_mask_ends_with_the_end_token(policy, name):
    _, completions = sample(policy, name, group_size=40)
    T = completions.tokens.shape[1]
    ended = 0
    for tokens, mask, finished in zip(
        completions.tokens.tolist(), completions.mask.tolist(), completions.finished, strict=True
    ):
        length = tokens.index(END) + 1 if finished else T
        assert mask == [True] * length + [False] * (T - length)
        assert finished == (END in tokens[:length])
        ended += int(finished)
    assert 0 < ended < len(completions.finished)


@pytest.mark.parametrize("name", LOCAL)
def test_greedy_completions_match_shared_prompt(policy, name):
    _, completions = sample(policy, name, group_size=2, temperature=0.0)
    _, expected = sample(policy, "shared-prompt", group_size=2, temperature=0.0)
    assert torch.equal(completions.mask, expected.mask)
    assert torch.equal(completions.tokens[expected.mask], expected.tokens[expected.mask])
    assert torch.allclose(completions.logprob, expected.logprob, atol=1e-4)


@pytest.mark.parametrize("name", LOCAL)
def test_same_seed_gives_same_completions(policy, name):
    assert torch.equal(sample(policy, name)[1].tokens, sample(policy, name)[1].tokens)


def test_sampling_restores_the_generation_config(policy):
    before = policy.model.generation_config.to_dict(), policy.model.config._attn_implementation
    for name in LOCAL:
        sample(policy, name)
    config = policy.model.config
    assert (policy.model.generation_config.to_dict(), config._attn_implementation) == before


def test_continuous_batching_failure_gives_the_reason_of_transformers(policy, monkeypatch):
    def fails(*_, **__):
        raise ValueError("Implementation flex_attention is not supported")

    monkeypatch.setattr(policy.model, "generate_batch", fails, raising=False)
    with pytest.raises(UserError, match=r"--sampler continuous .*flex_attention is not supported"):
        sample(policy, "continuous")


def test_continuous_batching_with_missing_completions_raises(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "generate_batch", lambda *_, **__: {}, raising=False)
    with pytest.raises(UserError, match="--sampler continuous: 0 of 9 completions"):
        sample(policy, "continuous")


def test_unknown_sampler_raises_user_error_with_the_known_names():
    with pytest.raises(UserError, match="shared-prompt, generate, continuous, vllm, or the http"):
        pick_sampler(SamplingSettings(sampler="guess"))
    assert list(SAMPLERS) == LOCAL
