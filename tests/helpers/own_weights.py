"""A sampler with weights of its own, which may leave some of them old."""

import copy

import torch

from reference.training.rollout.generate import generate
from reference.training.rollout.sampler import Sampler


class CopySampler(Sampler):
    """Samples from a copy of the model, whose LM head is not tied to the embedding.

    Args:
        old: parts of the names of the weights that `sync` leaves as they are.
    """

    has_own_weights = True

    def __init__(self, *old):
        self.old = old

    def start(self, policy, directory):
        self.model = copy.deepcopy(policy.model)
        head = self.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())

    @torch.no_grad()
    def sync(self, policy):
        weights = dict(policy.model.named_parameters(remove_duplicate=False))
        for name, own in self.model.named_parameters(remove_duplicate=False):
            if not any(part in name for part in self.old):
                own.copy_(weights[name])

    def sample(self, policy, prompts, group_size, temperature):
        seeds = policy.ranks.seeds(len(prompts.ids) * group_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate(
            self.model,
            prompts,
            group_size=group_size,
            max_new_tokens=policy.max_new_tokens,
            eos_ids=policy.eos_ids,
            pad_id=policy.tokenizer.pad_token_id,
            temperature=temperature,
            truncation=policy.truncation,
            draw=lambda: torch.cat([torch.rand(1, generator=each) for each in generators]),
        )
