"""--sampler vllm with a real vLLM: its log-probs are those of the policy after each sync."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from reference.training.errors import UserError
from reference.training.rollout import vllm_engine
from reference.training.rollout.truncation import Truncation
from reference.training.rollout.vllm_engine import VLLMEngine
from tests.helpers.vllm import (
    MAX_DIFFERENCE,
    assert_draws_from,
    head_name,
    largest_difference,
    load_policy,
    needs_vllm,
    perturb,
    save_tied_llama,
    smollm2_directory,
    trainer_logprobs,
)

pytestmark = needs_vllm

MEMORY = 0.02  # of the machine's, for the cache
QUESTIONS = ["3 + 4", "What is 12 - 5?"]
GROUP = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tied_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "smollm2"])
def served(request, llama, tmp_path_factory):
    """Yield a directory and an engine that was started for its model."""
    directory = llama if request.param == "llama" else smollm2_directory()
    engine = VLLMEngine(MEMORY, {})
    engine.start(load_policy(directory), tmp_path_factory.mktemp("run"))
    yield directory, engine
    engine.close()


@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "lora"])
def test_synced_engine_draws_from_the_policy(served, lora_rank):
    directory, engine = served
    policy = load_policy(directory, lora_rank=lora_rank)
    prompts = policy.encode(QUESTIONS)
    engine.sync(policy)
    perturb(policy.model, seed=1)
    stale = engine.sample(policy, prompts, GROUP, 1.0)
    assert largest_difference(policy, prompts, stale) > 100 * MAX_DIFFERENCE

    engine.sync(policy)
    assert_draws_from(engine, policy, prompts)


def test_head_that_is_left_out_of_an_update_shows_in_the_log_probs(served, monkeypatch):
    directory, engine = served
    policy = load_policy(directory)
    prompts = policy.encode(QUESTIONS)
    engine.sync(policy)
    perturb(policy.model, seed=2)
    whole, head = vllm_engine.synced_weights, head_name(policy)
    half = lambda policy: (pair for pair in whole(policy) if pair[0] != head)  # noqa: E731
    monkeypatch.setattr(vllm_engine, "synced_weights", half)
    engine.sync(policy)
    completions = engine.sample(policy, prompts, GROUP, 1.0)
    assert largest_difference(policy, prompts, completions) > 100 * MAX_DIFFERENCE


def test_equal_seeds_draw_equal_completions_and_leave_the_random_generators_alone(served):
    directory, engine = served
    policy = load_policy(directory)
    prompts = policy.encode(QUESTIONS)
    engine.sync(policy)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(engine.sample(policy, prompts, GROUP, 1.0))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        policy.ranks.seeds(len(QUESTIONS))  # each rank goes on from the same state
        assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(draws[0].tokens, draws[1].tokens)
    assert torch.equal(draws[0].logprob, draws[1].logprob)
    assert not torch.equal(draws[0].tokens, draws[2].tokens)
    group = draws[0].tokens[:GROUP].tolist()
    assert len({tuple(row) for row in group}) > 1  # nor are those of one prompt all the same
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)


def test_completion_ends_with_the_first_of_its_end_tokens(served):
    directory, engine = served
    policy = load_policy(directory)
    policy = replace(policy, eos_ids=list(range(0, len(policy.tokenizer), 5)))
    prompts = policy.encode(QUESTIONS)
    engine.sync(policy)
    completions = engine.sample(policy, prompts, 8, 1.0)
    assert completions.finished.any()
    ends = torch.isin(completions.tokens, torch.tensor(policy.eos_ids))
    for row, finished in enumerate(completions.finished):
        is_end = ends[row][completions.mask[row]]
        assert not is_end[:-1].any()
        assert is_end[-1] == finished
        assert finished or len(is_end) == policy.max_new_tokens
    assert largest_difference(policy, prompts, completions) < MAX_DIFFERENCE


def test_truncated_log_probs_are_normalised_over_the_kept_tokens(served):
    directory, engine = served
    policy = load_policy(directory, truncation=Truncation(top_k=2, return_support=False))
    prompts = policy.encode(QUESTIONS)
    engine.sync(policy)
    completions = engine.sample(policy, prompts, GROUP, 1.0)
    assert completions.support is None
    whole = trainer_logprobs(policy, prompts, completions)
    kept = (whole - completions.logprob)[completions.mask]  # the log of what two tokens have
    assert (kept < MAX_DIFFERENCE).all() and (kept < -0.01).any()
    greedy = engine.sample(policy, prompts, 1, 0.0)
    assert largest_difference(policy, prompts, greedy) < MAX_DIFFERENCE  # not truncated


def test_prompt_that_is_too_long_raises_user_error(served):
    directory, engine = served
    limit = engine.llm.model_config.max_model_len
    policy = replace(load_policy(directory), max_new_tokens=limit)
    with pytest.raises(UserError, match=f"has room for sequences of {limit} tokens"):
        engine.sample(policy, policy.encode(QUESTIONS), GROUP, 1.0)
