"""--sampler vllm with a real vLLM: its log-probs are those of the policy after each sync."""

import pytest
import torch

from reference.training.rollout import vllm_engine
from reference.training.rollout.samplers import SharedPrompt
from reference.training.rollout.vllm_engine import VLLMEngine
from tests.helpers.vllm import (
    MAX_DIFFERENCE,
    head_name,
    largest_difference,
    load_policy,
    needs_vllm,
    perturb,
    save_tied_llama,
    smollm2_directory,
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
    for temperature in (1.0, 0.7):
        completions = engine.sample(policy, prompts, GROUP, temperature)
        difference = largest_difference(policy, prompts, completions, temperature)
        print(f"largest difference of a log-prob: {difference:.2g}")
        assert difference < MAX_DIFFERENCE
    greedy = engine.sample(policy, prompts, 2, 0.0)
    expected = SharedPrompt().sample(policy, prompts, 2, 0.0)
    assert torch.equal(greedy.tokens, expected.tokens)
    assert torch.equal(greedy.finished, expected.finished)


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
