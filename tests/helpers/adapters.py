"""LoRA adapters that change what a model computes: a new one does not, since its B is 0."""

import torch

from reference.training.model import lora


def add_trained_lora(model, rank):
    """Add an adapter to a model and draw its B."""
    model = lora.add_lora(model, rank, alpha=8.0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model
