"""LoRA, recomputed layers and frozen copies: the same numbers, in less memory."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_kernels.integrations.transformers import forward_to_hidden
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model import lora as adapters
from reference.training.model.activation_checkpointing import (
    checkpointable_layers,
    recompute_activations,
)

IDS = torch.tensor([[2, 5, 11, 4, 7], [3, 3, 9, 12, 6]])
pytestmark = pytest.mark.usefixtures("pytorch_backend")

RANK = 4


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return models.from_scratch()[0].eval()


@pytest.fixture
def trained(plain):
    """The model with an adapter that no longer is the zero that it begins as."""
    model = adapters.add_lora(plain, RANK, alpha=8.0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def plain_loss(model):
    logprob = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    return -logprob.gather(-1, IDS[:, 1:, None]).mean()


def fused_loss(model):
    hidden, head, _ = forward_to_hidden(model, input_ids=IDS)
    return -head.token_stats(hidden[:, :-1], IDS[:, 1:], entropy=False).logprob.mean()


def test_an_adapter_begins_as_nothing(plain):
    before = logits(plain)
    assert torch.equal(logits(adapters.add_lora(plain, RANK, alpha=8.0).eval()), before)


def test_every_linear_layer_but_the_head_has_an_adapter_and_nothing_else_trains(plain):
    shapes = [
        each.weight.shape
        for name, each in plain.named_modules()
        if isinstance(each, torch.nn.Linear) and name != "lm_head"
    ]
    model = adapters.add_lora(plain, RANK, alpha=8.0)
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(shapes) == 14  # two layers of q, k, v, o, gate, up, down
    assert len(training) == 2 * len(shapes)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in training.items())
    assert sum(p.numel() for p in training.values()) == sum(RANK * sum(shape) for shape in shapes)


def test_an_adapter_adds_its_product_scaled_by_alpha_over_rank(plain):
    weight = plain.model.layers[1].mlp.up_proj.weight.clone()
    layer = adapters.add_lora(plain, RANK, alpha=8.0).base_model.model.model.layers[1].mlp.up_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B.normal_()
        x = torch.randn(3, 64)
        expected = x @ (weight + 8.0 / RANK * B @ A).T
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_only_the_named_layers_have_an_adapter_where_they_are_named(plain):
    model = adapters.add_lora(plain, RANK, alpha=8.0, targets=["q_proj"])
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(training) == 4 and all("q_proj" in name for name in training)


def test_without_its_adapter_a_model_is_the_one_before_it_and_afterwards_has_it_again(trained):
    with_it = logits(trained)
    torch.manual_seed(0)
    before = logits(models.from_scratch()[0].eval())
    assert not torch.allclose(with_it, before)
    with adapters.without_adapter(trained):
        assert torch.equal(logits(trained), before)
    assert torch.equal(logits(trained), with_it)


def test_a_plain_model_is_itself_without_adapter(plain):
    before = logits(plain)
    with adapters.without_adapter(plain):
        assert torch.equal(logits(plain), before)


def test_a_merged_model_loads_with_plain_transformers_and_computes_the_same(trained, tmp_path):
    before = logits(trained)
    adapters.merged(trained).save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.allclose(logits(loaded.eval()), before, atol=1e-5)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(trained), before)  # the wrapped model goes on training


def test_a_model_without_adapter_is_merged_already(plain):
    assert adapters.merged(plain) is plain


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_of_the_adapters_is_the_same_up_to_hidden_states_and_up_to_logits(
    trained, checkpointed
):
    gradients = []
    for loss in (fused_loss, plain_loss):
        trained.zero_grad()
        if checkpointed:
            with recompute_activations(trained):
                loss(trained).backward()
        else:
            loss(trained).backward()
        gradients.append({n: p.grad for n, p in trained.named_parameters() if p.requires_grad})
    for name, ours in gradients[0].items():
        assert ours.abs().max() > 0
        assert torch.allclose(ours, gradients[1][name], rtol=1e-4, atol=1e-7), name
    assert all(p.grad is None for p in trained.parameters() if not p.requires_grad)


def test_lora_without_peft_names_the_package_and_the_extra(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'peft: pip install "grpo_kernels\[train\]"'):
        adapters.add_lora(plain, RANK, alpha=8.0)


def test_a_frozen_copy_shares_nothing_and_keeps_its_ties(plain):
    before = logits(plain)
    frozen = adapters.frozen_copy(plain, None)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(frozen), before)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in plain.parameters())


def test_a_frozen_copy_in_bf16_has_it_in_linear_layers_only(plain):
    frozen = adapters.frozen_copy(plain, torch.bfloat16)
    projections = {n: p.dtype for n, p in frozen.named_parameters() if "proj" in n}
    others = {n: p.dtype for n, p in frozen.named_parameters() if "proj" not in n}
    assert set(projections.values()) == {torch.bfloat16}
    assert set(others.values()) == {torch.float32}  # the tied embedding, norms
    assert torch.equal(frozen.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_recomputed_layers_run_twice_and_others_once(plain):
    runs = []
    plain.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    plain_loss(plain).backward()
    assert len(runs) == 1
    with recompute_activations(plain):
        recomputing = plain_loss(plain)
    assert len(runs) == 2
    recomputing.backward()
    assert len(runs) == 3
    plain_loss(plain).backward()
    assert len(runs) == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_transformers_own_checkpointing_is_skipped_by_a_model_that_evaluates(plain):
    """Why there is `recompute_activations`: once this fails, their switch may do."""
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    plain.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    plain_loss(plain).backward()
    assert len(runs) == 1


def test_the_layers_to_recompute_are_found_under_an_adapter(trained):
    assert len(checkpointable_layers(trained)) == 2
