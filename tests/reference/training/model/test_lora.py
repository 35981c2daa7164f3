"""LoRA and frozen copies."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_kernels.integrations.transformers import forward_to_hidden
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model import lora as adapters
from reference.training.model.activation_checkpointing import recompute_activations
from tests.helpers.adapters import add_trained_lora

IDS = torch.tensor([[2, 5, 11, 4, 7], [3, 3, 9, 12, 6]])
pytestmark = pytest.mark.usefixtures("pytorch_backend")

RANK = 4


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return models.from_scratch()[0].eval()


@pytest.fixture
def trained(plain):
    return add_trained_lora(plain, RANK)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def plain_loss(model):
    logprob = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    return -logprob.gather(-1, IDS[:, 1:, None]).mean()


def fused_loss(model):
    hidden, head, _ = forward_to_hidden(model, input_ids=IDS)
    return -head.token_stats(hidden[:, :-1], IDS[:, 1:], entropy=False).logprob.mean()


def test_new_adapter_does_not_change_the_logits(plain):
    before = logits(plain)
    assert torch.equal(logits(adapters.add_lora(plain, RANK, alpha=8.0).eval()), before)


def test_all_linear_layers_but_the_head_have_an_adapter(plain):
    shapes = [
        module.weight.shape
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    model = adapters.add_lora(plain, RANK, alpha=8.0)
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(shapes) == 14  # two layers of q, k, v, o, gate, up, down
    assert len(training) == 2 * len(shapes)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in training.items())
    assert sum(p.numel() for p in training.values()) == sum(RANK * sum(shape) for shape in shapes)


def test_adapter_is_scaled_by_alpha_over_rank(plain):
    weight = plain.model.layers[1].mlp.up_proj.weight.clone()
    layer = adapters.add_lora(plain, RANK, alpha=8.0).base_model.model.model.layers[1].mlp.up_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B.normal_()
        x = torch.randn(3, 64)
        expected = x @ (weight + 8.0 / RANK * B @ A).T
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_disable_adapter_restores_the_base_model_temporarily(trained):
    with_it = logits(trained)
    torch.manual_seed(0)
    before = logits(models.from_scratch()[0].eval())
    assert not torch.allclose(with_it, before)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), before)
    assert torch.equal(logits(trained), with_it)


def test_merged_model_loads_with_transformers_and_has_the_same_logits(trained, tmp_path):
    before = logits(trained)
    adapters.merged(trained).save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.allclose(logits(loaded.eval()), before, atol=1e-5)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(trained), before)  # the wrapped model goes on training


def test_merged_of_a_plain_model_is_the_model(plain):
    assert adapters.merged(plain) is plain


@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapter_gradients_of_fused_and_plain_losses_match(trained, checkpointed):
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


def test_missing_peft_raises_user_error(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'peft: pip install -e "\.\[train\]"'):
        adapters.add_lora(plain, RANK, alpha=8.0)


def test_frozen_copy_shares_nothing_and_keeps_tied_weights(plain):
    before = logits(plain)
    frozen = adapters.frozen_copy(plain, None)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(frozen), before)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in plain.parameters())


def test_frozen_copy_in_bf16_casts_linear_layers_only(plain):
    frozen = adapters.frozen_copy(plain, torch.bfloat16)
    projections = {n: p.dtype for n, p in frozen.named_parameters() if "proj" in n}
    others = {n: p.dtype for n, p in frozen.named_parameters() if "proj" not in n}
    assert set(projections.values()) == {torch.bfloat16}
    assert set(others.values()) == {torch.float32}  # the tied embedding, norms
    assert torch.equal(frozen.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
