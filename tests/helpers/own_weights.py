"""A sampler with weights of its own, which may leave some of them old."""

import copy
from dataclasses import replace

import torch

from reference.training.rollout.sampler import Sampler
from reference.training.rollout.samplers import SharedPrompt


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
        own = replace(policy, model=self.model)
        return SharedPrompt().sample(own, prompts, group_size, temperature)
