"""Activation checkpointing: recomputed layers run twice."""

import pytest
import torch

from reference.training.model.activation_checkpointing import (
    checkpointable_layers,
    recompute_activations,
)
from reference.training.model.load import from_scratch
from reference.training.model.lora import add_lora

IDS = torch.tensor([[2, 5, 11, 4, 7], [3, 3, 9, 12, 6]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return from_scratch()[0].eval()


def loss(model):
    logprob = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    return -logprob.gather(-1, IDS[:, 1:, None]).mean()


def test_recomputed_layers_run_twice(model):
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss(model).backward()
    assert len(runs) == 1
    with recompute_activations(model):
        recomputing = loss(model)
    assert len(runs) == 2
    recomputing.backward()
    assert len(runs) == 3
    loss(model).backward()
    assert len(runs) == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_transformers_checkpointing_has_no_effect_in_evaluation_mode(model):
    """If this fails, transformers' own switch can replace `recompute_activations`."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss(model).backward()
    assert len(runs) == 1


def test_checkpointable_layers_are_found_under_an_adapter(model):
    assert len(checkpointable_layers(add_lora(model, rank=4, alpha=8.0))) == 2
