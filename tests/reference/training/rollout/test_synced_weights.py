"""The weights that an inference engine is given."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from reference.training.distributed import Ranks
from reference.training.model import load as models
from reference.training.model import lora
from reference.training.rollout.synced_weights import synced_weights
from tests.helpers.adapters import add_trained_lora
from tests.helpers.model_directories import save_family


def policy_of(model):
    return SimpleNamespace(model=model)


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return models.from_scratch()[0].eval()


@pytest.fixture
def adapted(tied):
    return add_trained_lora(tied, rank=4)


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe", "GPT2"])
def test_weights_are_those_of_the_checkpoint_and_the_tied_head(family, tmp_path):
    model, _ = models.load(save_family(tmp_path, family))
    expected = load_file(tmp_path / "model.safetensors")
    expected["lm_head.weight"] = model.lm_head.weight.detach()  # GPT2's is not in the file
    assert_same_weights(dict(synced_weights(policy_of(model))), expected)


def test_weights_without_adapter_share_memory_with_the_model(tied):
    weights = dict(synced_weights(policy_of(tied)))
    embedding = tied.model.embed_tokens.weight
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert weights[name].data_ptr() == embedding.data_ptr()
        assert not weights[name].requires_grad


def test_adapter_is_merged_and_the_model_unchanged(adapted):
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    assert_same_weights(dict(synced_weights(policy_of(adapted))), lora.merged(adapted).state_dict())
    assert_same_weights(adapted.state_dict(), before)


def test_adapted_weights_are_merged_one_at_a_time(adapted):
    """A weight is computed when it is asked for: it sees what has changed since the first."""
    weights = synced_weights(policy_of(adapted))
    next(weights)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.zero_()
    assert not any(weight.any() for _, weight in weights)


def test_saved_buffers_are_sent_and_the_others_are_not(tied):
    tied.model.register_buffer("scale", torch.ones(1))
    tied.model.register_buffer("table", torch.ones(1), persistent=False)
    weights = dict(synced_weights(policy_of(tied)))
    assert weights.keys() == tied.state_dict().keys()
    assert "model.scale" in weights


def test_weights_are_whole_under_fsdp(tied, tmp_path):
    before = {name: weight.clone() for name, weight in tied.state_dict().items()}
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for layer in tied.model.layers:
            fully_shard(layer)
        fully_shard(tied)
        with Ranks(0, 2).unsharded(tied):
            weights = dict(synced_weights(policy_of(tied)))
            assert not any(hasattr(weight, "full_tensor") for weight in weights.values())
            assert_same_weights(weights, before)
    finally:
        dist.destroy_process_group()
