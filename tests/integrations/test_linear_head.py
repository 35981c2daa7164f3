"""LM heads under PEFT: statistics and all gradients match those of the model's own logits."""

import importlib
import sys
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from grpo_kernels import LossConfig
from grpo_kernels.integrations.transformers import forward_to_hidden, unwrap
from reference import losses
from tests.helpers.causal_lms import (
    V,
    fused_token_stats,
    logits_token_stats,
    make_batch,
    make_model,
    stats_and_gradients,
)
from tests.helpers.linear import half_gradient_tolerance, relative_error
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.versions import needs_adapters_of_transformers

pytestmark = [
    pytest.mark.usefixtures("pytorch_backend"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def lora(r=2, **settings):
    """A LoRA of the attention and the head whose B is not 0."""
    settings = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False} | settings
    return peft.LoraConfig(r=r, lora_alpha=3, task_type="CAUSAL_LM", **settings)


def adapted(config, name="llama", **others):
    """A model with an active adapter "default", and inactive `others`."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on tied heads and biases of adapters
        model = peft.get_peft_model(make_model(name), config)
        for other, other_config in others.items():
            model.add_adapter(other, other_config)
    for key, param in model.named_parameters():
        if param.requires_grad or "lora_" in key or "modules_to_save" in key:
            nn.init.normal_(param, std=0.3)
    return model.double().eval()


def several_active():
    model = adapted(
        lora(), second=lora(3, use_rslora=True), elsewhere=lora(target_modules=["v_proj"])
    )
    model.base_model.set_adapter(["default", "second", "elsewhere"])
    return model


def frozen_adapter():
    model = adapted(lora(), second=lora(3))
    model.set_adapter("second")
    model.set_requires_grad("second", requires_grad=False)
    model.lm_head.base_layer.weight.requires_grad_()
    return model


def merged():
    model = adapted(lora(), second=lora(3))
    model.merge_adapter(["default"])
    model.lm_head.base_layer.weight.requires_grad_()
    return model


def copied(active):
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = adapted(
        lora(**config), second=lora(**config), elsewhere=lora(target_modules=["v_proj"])
    )
    model.set_adapter(active)
    return model


def trained_tokens(name, **settings):
    return adapted(lora(target_modules=["q_proj"], trainable_token_indices=settings), name)


HEADS = {
    "lora": lambda: adapted(lora()),
    "lora, rslora, tied": lambda: adapted(lora(4, use_rslora=True), "llama, tied"),
    "lora, bias, head's bias": lambda: adapted(lora(lora_bias=True), "phi, bias"),
    "lora, bias": lambda: adapted(lora(lora_bias=True)),
    "lora, multiplied": lambda: adapted(lora(), "cohere, multiplied"),
    "lora, softcap": lambda: adapted(lora(), "gemma2, softcap"),
    "lora, eval": lambda: adapted(lora(lora_dropout=0.5)),
    "lora, several active": several_active,
    "lora, frozen": frozen_adapter,
    "lora, merged": merged,
    "lora, all-linear": lambda: adapted(lora(target_modules="all-linear")),
    "copy": lambda: copied("default"),
    "copy of another adapter": lambda: copied("second"),
    "copy, inactive": lambda: copied("elsewhere"),
    "trained tokens, tied": lambda: trained_tokens("llama, tied", embed_tokens=[3, 5]),
    "trained tokens, bias": lambda: trained_tokens("phi, bias", lm_head=[3, 5]),
}


@pytest.mark.parametrize("name", HEADS)
def test_peft_heads_match_logits(name):
    model = HEADS[name]()
    for _ in range(2):  # the scale is measured, then cached
        stats, grads = stats_and_gradients(fused_token_stats, model, temperature=0.7)
        expected, expected_grads = stats_and_gradients(logits_token_stats, model, temperature=0.7)
        torch.testing.assert_close(stats, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lora", "lora, merged", "copy", "trained tokens, bias"])
def test_disabled_adapter(name):
    """The reference policy of LoRA training; PEFT takes a merged adapter out of the weight."""
    model, (ids, attention) = HEADS[name](), make_batch()
    enabled = fused_token_stats(model).logprob
    with model.disable_adapter():
        head = forward_to_hidden(model, input_ids=ids, attention_mask=attention).head
        found, expected = fused_token_stats(model), logits_token_stats(model)
    assert head.adapter is None
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert (found.logprob - enabled).abs().max() > 0.1


@needs_adapters_of_transformers
def test_adapter_of_transformers():
    """Without a PeftModel around the model: its own add_adapter."""
    model = make_model("llama")
    model.add_adapter(lora())
    for enable in (model.enable_adapters, model.disable_adapters):
        enable()
        found, expected = fused_token_stats(model), logits_token_stats(model)
        torch.testing.assert_close(tuple(found), tuple(expected))


def test_head_wrapped_after_its_scale_was_measured():
    model, ids = make_model("cohere, multiplied"), make_batch()[0]
    assert forward_to_hidden(model, input_ids=ids).head.adapter is None
    wrapped = peft.get_peft_model(model, lora()).double()
    hidden, head, _ = forward_to_hidden(wrapped, input_ids=ids)
    assert head.scale == 1.7 and head.adapter.a.shape == (2, 16) and head.adapter.b.shape == (V, 2)
    assert head.adapter.scale == 1.5
    with torch.no_grad():
        expected = wrapped(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(hidden, expected.hidden_states[-1])


class Packed4Bit(nn.Module):
    """A linear layer with 16 levels of weight, two entries in a byte, and a scale per row."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = nn.Buffer(weight.abs().amax(1, keepdim=True) / 7)
        levels = (weight / self.scale).round().to(torch.int8) + 8
        self.packed = nn.Buffer((levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8))

    def forward(self, x):
        levels = torch.stack((self.packed >> 4, self.packed & 15), -1).flatten(1)
        return nn.functional.linear(x, ((levels.float() - 8) * self.scale).to(x.dtype))


def quantize(model):
    """Quantize the linear layers of the decoder, below their adapters if they have one."""
    for module in list(unwrap(model).model.modules()):
        for name, layer in list(module.named_children()):
            is_adapter = name == "default"
            if isinstance(layer, nn.Linear) and not is_adapter:
                setattr(module, name, Packed4Bit(layer))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_4_bit_base_with_half_precision_head(dtype, targets):
    """PEFT computes A and B in fp32, and rounds the logits that ours leaves unrounded."""
    model = quantize(adapted(lora(target_modules=targets))).to(dtype)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = param.data.float()
    ids, attention = make_batch()
    mask = attention[:, 1:] != 0
    hidden, head, _ = forward_to_hidden(model, input_ids=ids, attention_mask=attention)
    assert hidden.dtype == head.weight.dtype == dtype and not head.weight.requires_grad
    found, grads = stats_and_gradients(fused_token_stats, model)
    same_dtype, same_grads = stats_and_gradients(logits_token_stats, model)

    # The ground truth: the head in fp64 on the same hidden states.
    leaves = [hidden] if head.adapter is None else [hidden, head.adapter.a, head.adapter.b]
    exact_hidden, *ab = (x.detach().double().requires_grad_() for x in leaves)
    logits = exact_hidden @ head.weight.double().T
    if ab:
        logits = logits + head.adapter.scale * exact_hidden @ ab[0].T @ ab[1].T
    keep = mask & (attention[:, :-1] != 0)
    exact = losses.token_stats(logits[:, :-1], ids[:, 1:], mask=keep)
    for name, value in found.items():
        assert_as_accurate(name, value, same_dtype[name].float(), getattr(exact, name).detach())
    (exact.logprob.sum() + exact.entropy.sum()).backward()
    assert grads.keys() == same_grads.keys() and all("lora_" in name for name in grads)
    for x, name in zip(ab, ("lora_A", "lora_B"), strict=bool(ab)):
        grad = grads[f"base_model.model.lm_head.{name}.default.weight"]
        assert relative_error(grad, x.grad) <= half_gradient_tolerance(), name


def test_in_fp32_converts_the_adapter():
    head = head_of(adapted(lora()).bfloat16()).in_fp32()
    assert {head.weight.dtype, head.adapter.a.dtype, head.adapter.b.dtype} == {torch.float32}
    assert head.adapter.scale == 1.5


def head_of(model, **inputs):
    return forward_to_hidden(model, input_ids=make_batch()[0], **inputs).head


@pytest.mark.parametrize("estimator", ["k3", "reverse"])
def test_model_without_adapters_is_the_reference_policy(estimator):
    model, (ids, attention) = adapted(lora()), make_batch()
    inputs = {"input_ids": ids, "attention_mask": attention}
    arguments = {"advantages": torch.tensor([1.0, -0.5, 2.0]), "mask": attention[:, 1:]}
    arguments["config"] = LossConfig.dapo(beta=0.5, kl_estimator=estimator)
    hidden, head, _ = forward_to_hidden(model, **inputs)
    with torch.no_grad(), model.disable_adapter():
        ref_hidden, ref_head, _ = forward_to_hidden(model, **inputs)
        ref_logits = model(**inputs).logits[:, :-1]
    reference = {"ref_hidden": ref_hidden[:, :-1], "ref_head": ref_head}
    loss = head.grpo_loss(hidden[:, :-1], ids[:, 1:], **arguments, **reference).loss
    logits = model(**inputs).logits[:, :-1]
    expected = losses.grpo_loss(logits, ids[:, 1:], ref_logits=ref_logits, **arguments).loss
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    params = [param for param in model.parameters() if param.requires_grad]
    grads, expected_grads = (torch.autograd.grad(x, params) for x in (loss, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-7, atol=1e-9)


def test_ref_head_with_adapter_raises():
    model, ids = adapted(lora()), make_batch()[0]
    hidden, head, _ = forward_to_hidden(model, input_ids=ids)
    with pytest.raises(ValueError, match="ref_head must have no adapter, got one: merge"):
        head.token_stats(hidden, ids, kl="forward", ref_hidden=hidden, ref_head=head)


def test_lora_dropout_raises_in_training_mode():
    model = adapted(lora(lora_dropout=0.25)).train()
    with pytest.raises(TypeError, match=r"lora_dropout=0.25 in training mode: set lora_dropout=0"):
        head_of(model)
    with model.disable_adapter():
        assert head_of(model).adapter is None


def lm_head(kind, **settings):
    return kind(target_modules=["lm_head"], task_type="CAUSAL_LM", **settings)


OTHERS = {
    "dora": (lambda: lora(use_dora=True), "adapter 'default' with peft.*DoraLinearVariant: leave"),
    "ia3": (lambda: lm_head(peft.IA3Config, feedforward_modules=[]), "got peft.tuners.ia3"),
    "loha": (lambda: lm_head(peft.LoHaConfig, r=2), "got peft.tuners.loha"),
    "vera": (lambda: lm_head(peft.VeraConfig, r=2), "got peft.tuners.vera.*out of target_modules"),
    "adalora": (lambda: lm_head(peft.AdaLoraConfig, total_step=9), "got peft.tuners.adalora"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_raise(name):
    config, message = OTHERS[name]
    model = peft.get_peft_model(make_model("llama"), config())
    with pytest.raises(TypeError, match=message + ".*take the model's logits, and token_stats"):
        head_of(model)


def test_adapters_that_differ_in_a_batch_raise():
    for config in (lora(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"])):
        model, names = adapted(config), ["default", "__base__", "default"]
        with pytest.raises(TypeError, match="hidden states alone, got adapter_names"):
            head_of(model, adapter_names=names)


class PackedLinear(nn.Linear):
    """A quantized layer that looks like a linear layer with a weight."""

    def forward(self, x):
        return Packed4Bit(self)(x)


def with_int8_weight(linear):
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return linear


def with_tensor_subclass(linear):
    linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data))
    return linear


@pytest.mark.parametrize("adapter", [None, lora])
@pytest.mark.parametrize(
    ("quantize_head", "message"),
    [
        (Packed4Bit, "Packed4Bit: leave"),
        (lambda _: PackedLinear(16, V, bias=False), "PackedLinear: leave"),
        (with_int8_weight, "Linear with torch.*Parameter in torch.int8: leave"),
        (with_tensor_subclass, "Linear with .*TwoTensor in torch.float64: leave"),
    ],
)
def test_quantized_head_raises(quantize_head, message, adapter):
    model = make_model("llama")
    if adapter is not None:
        model = peft.get_peft_model(model, adapter())
    parent, name = (model, "lm_head") if adapter is None else (model.lm_head, "base_layer")
    setattr(parent, name, quantize_head(getattr(parent, name)))
    with pytest.raises(TypeError, match=f"{message} it out of quantization, or take the model's"):
        head_of(model)


def test_model_without_peft_needs_no_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "grpo_kernels.integrations.linear_head")
    module = importlib.import_module("grpo_kernels.integrations.linear_head")
    assert module.linear_head(make_model("phi, bias")).bias.shape == (V,)
