"""Policies for a real vLLM, and the differences between its log-probs and theirs.

vLLM has constraints of its own (constraints-vllm.txt). Where it is not installed, its tests are
skipped.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from grpo_kernels.integrations.transformers import unwrap
from reference.training.config import ModelSettings
from reference.training.model.load import default_cache_dir
from reference.training.model.policy import Policy
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.samplers import SharedPrompt
from tests.helpers.model_directories import save_family

MAX_NEW_TOKENS = 12
MAX_DIFFERENCE = 1e-4  # of an fp32 log-prob; the largest found is 4e-5
# vLLM's attention on a CPU has no heads smaller than 32.
SERVED_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NOT_INSTALLED = "vllm is not installed here: see CONTRIBUTING.md"
# A module with pytestmark = needs_vllm is one of `pytest tests/vllm`.
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NOT_INSTALLED),
]


def save_tied_llama(directory: Path, **changes) -> Path:
    """Save a small random Llama whose head is tied to its embedding."""
    sizes = SERVED_SIZES | {"tie_word_embeddings": True} | changes
    return save_family(directory, "Llama", chat_template="{{ messages[-1]['content'] }}", **sizes)


def smollm2_directory() -> Path:
    """Return the directory of SmolLM2-135M-Instruct; skip the test if it was never downloaded."""
    directory = default_cache_dir() / "SmolLM2-135M-Instruct"
    if not (directory / "model.safetensors").exists():
        pytest.skip("SmolLM2-135M-Instruct has not been downloaded here")
    return directory


def load_policy(directory: Path, *, lora_rank: int | None = None, **options) -> Policy:
    settings = ModelSettings(model=str(directory), lora_rank=lora_rank)
    return Policy.load(settings, torch.device("cpu"), MAX_NEW_TOKENS, **options)


@torch.no_grad()
def perturb(model, seed: int) -> None:
    """Add noise to each trained weight, of 10% of its spread; a LoRA's B starts as 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 0.02 if "lora_B" in name else parameter.std(correction=0).item()
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            parameter.add_(noise, alpha=0.1 * (spread or 1.0))


@torch.no_grad()
def trainer_logprobs(policy: Policy, prompts: Prompts, completions: Completions, temperature=1.0):
    """Compute log-probs [B·G, T] of completions, each sequence alone."""
    group = len(completions.tokens) // len(prompts.ids)
    logprobs = torch.zeros_like(completions.logprob)
    for row, mask in enumerate(completions.mask):
        prompt = prompts.ids[row // group][prompts.mask[row // group]]
        tokens = completions.tokens[row][mask]
        ids = torch.cat([prompt, tokens])[None]
        logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])
        logprobs[row, : len(tokens)] = chosen.squeeze(-1)
    return logprobs


def largest_difference(policy: Policy, prompts: Prompts, completions: Completions, temperature=1.0):
    expected = trainer_logprobs(policy, prompts, completions, temperature)
    return (completions.logprob - expected)[completions.mask].abs().max().item()


def assert_draws_from(sampler: Sampler, policy: Policy, prompts: Prompts) -> None:
    """Check the log-probs of a sampler, and its greedy tokens, against a policy."""
    for temperature in (1.0, 0.7):
        completions = sampler.sample(policy, prompts, 4, temperature)
        difference = largest_difference(policy, prompts, completions, temperature)
        print(f"largest difference of a log-prob: {difference:.2g}")
        assert difference < MAX_DIFFERENCE
    greedy = sampler.sample(policy, prompts, 2, 0.0)
    expected = SharedPrompt().sample(policy, prompts, 2, 0.0)
    assert torch.equal(greedy.tokens, expected.tokens)
    assert torch.equal(greedy.finished, expected.finished)


def head_name(policy: Policy) -> str:
    """Return the name of the weight of the LM head in a checkpoint."""
    model = unwrap(policy.model)
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)
