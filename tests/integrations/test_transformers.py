"""Hugging Face models run to their hidden states, compared with their own logits per family."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels.integrations.score_labels import score_labels
from grpo_kernels.integrations.transformers import LMHead, forward_to_hidden
from tests.helpers.causal_lms import (
    MODELS,
    SMALL,
    V,
    fused_token_stats,
    logits_token_stats,
    make_batch,
    make_model,
    stats_and_gradients,
)
from tests.helpers.linear import half_gradient_tolerance, relative_error
from tests.helpers.tensors import coin


@pytest.mark.parametrize("name", MODELS)
def test_token_stats_and_gradients_match_logits(name):
    model, ref_model = make_model(name), make_model(name, seed=1)
    for keywords in ({}, {"temperature": 0.7, "kl": "reverse", "ref_model": ref_model}):
        stats, grads = stats_and_gradients(fused_token_stats, model, **keywords)
        expected, expected_grads = stats_and_gradients(logits_token_stats, model, **keywords)
        torch.testing.assert_close(stats, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-7, atol=1e-9)


def test_scale_and_softcap_match_model_config():
    ids, attention = make_batch()
    expected = {
        "llama": (1.0, None),
        "gemma2, softcap": (1.0, 2.5),
        "granite, divided": (1 / 0.3, None),
        "cohere, multiplied": (1.7, None),
    }
    for name, scale_and_softcap in expected.items():
        model = make_model(name).float()
        for _ in range(2):  # measured, then cached
            head = forward_to_hidden(model, input_ids=ids, attention_mask=attention).head
            assert (head.scale, head.softcap) == scale_and_softcap, name


def test_scale_and_softcap_together():
    """logits = softcap · tanh(scale · x / softcap)"""
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(1, 3, 8), torch.randn(40, 8), torch.tensor([[1, 2, 3]])
    head = LMHead(weight, None, None, scale=3.0, softcap=2.0)
    logits = 2.0 * (3.0 * (hidden @ weight.T) / 2.0).tanh() / 0.7
    expected = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    logprob = head.token_stats(hidden, tokens, temperature=0.7).logprob
    torch.testing.assert_close(logprob, expected)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.25), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cast_logits_do_not_look_softcapped(dtype, scale, softcap):
    """1e30 is not exact in fp32 or bf16."""

    class Cast(LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            logits = (scale * output.logits).to(dtype)
            output.logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            return output

    _, head, _ = forward_to_hidden(Cast(LlamaConfig(**SMALL)), input_ids=make_batch()[0])
    assert head.softcap == softcap
    assert head.scale == pytest.approx(scale, rel=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("is_upcast", [False, True], ids=["bf16", "fp32"])
def test_bf16_model_with_fp32_head(pytorch_backend, is_upcast):
    """The products have the dtype of the hidden states."""
    model, (ids, _) = make_model("llama").bfloat16(), make_batch()
    torch.nn.init.normal_(model.lm_head.float().weight)
    hidden, head, _ = forward_to_hidden(model, input_ids=ids)
    hidden = hidden.float() if is_upcast else hidden
    logprob = head.token_stats(hidden, ids, entropy=False).logprob
    logprob.sum().backward()
    weight = model.lm_head.weight
    exact_weight = weight.detach().to(hidden.dtype).double().requires_grad_()
    exact = (hidden.detach().double() @ exact_weight.T).log_softmax(-1)
    exact = exact.gather(-1, ids[..., None]).squeeze(-1)
    exact.sum().backward()
    torch.testing.assert_close(logprob.double(), exact, rtol=1e-5, atol=1e-5)
    assert weight.grad.dtype == torch.float32
    tolerance = 1e-5 if is_upcast else half_gradient_tolerance()
    assert relative_error(weight.grad, exact_weight.grad) < tolerance


def test_no_logits_are_computed():
    model = make_model("llama")
    for _ in range(2):
        _, _, output = forward_to_hidden(model, input_ids=make_batch()[0])
    assert output.logits.numel() == 0
    assert model(input_ids=make_batch()[0]).logits.shape == (3, 6, V), "the head is back"


def test_mask_selects_tokens():
    model, mask = make_model("llama"), coin(3, 3, 5)
    stats = fused_token_stats(model, mask=mask)
    expected = logits_token_stats(model, mask=mask)
    torch.testing.assert_close(tuple(stats), tuple(expected))
    assert (stats.logprob[~mask] == 0).all()


def test_hooks_are_removed_when_the_model_raises():
    model = make_model("llama")
    with pytest.raises((TypeError, AttributeError)):  # by the version of Transformers
        forward_to_hidden(model, input_ids=make_batch()[0], position_ids="x")
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


class Offset(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits + torch.arange(V)
        return output


class Clamped(LlamaForCausalLM):
    """A hard bound instead of a softcap."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits.clamp(-50, 50)
        return output


class Sliced(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits[..., : V - 1]
        return output


class Headless(LlamaForCausalLM):
    def get_output_embeddings(self):
        return torch.nn.Identity()


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        (Offset, NotImplementedError, "Offset does more to its logits"),
        (Clamped, NotImplementedError, "Clamped does more to its logits than a scale"),
        (Sliced, NotImplementedError, "Sliced does more .* a scale and a softcap"),
        (
            Headless,
            TypeError,
            "the LM head must be a torch.nn.Linear .* got torch.*linear.Identity: leave",
        ),
    ],
)
def test_unsupported_heads_raise(family, error, message):
    with pytest.raises(error, match=message):
        forward_to_hidden(family(LlamaConfig(**SMALL)), input_ids=make_batch()[0])


@pytest.mark.parametrize("is_tuple", [False, True])
def test_output_as_tuple(is_tuple):
    model, (ids, _) = make_model("granite, divided"), make_batch()
    head = forward_to_hidden(model, input_ids=ids, return_dict=not is_tuple).head
    assert (head.scale, head.softcap) == (1 / 0.3, None)


@pytest.mark.parametrize("model", [make_model("llama").model, torch.nn.Linear(2, 2), None])
@pytest.mark.parametrize("function", [forward_to_hidden, score_labels])
def test_models_without_head_raise(function, model):
    message = f"model must be a transformers model with an LM head, .* got {type(model).__name__}"
    with pytest.raises(TypeError, match=message):
        function(model)


def test_labels_raise():
    ids, _ = make_batch()
    with pytest.raises(ValueError, match="labels must be left out, got Tensor: pass the tokens"):
        forward_to_hidden(make_model("llama"), input_ids=ids, labels=ids)
    forward_to_hidden(make_model("llama"), input_ids=ids, labels=None)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
        ({"ref_head": torch.zeros(3)}, TypeError, "ref_head must be an LMHead, got Tensor"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "granite, divided"])
def test_keywords_of_head_are_checked(name, keywords, error, message):
    ids, _ = make_batch()
    hidden, head, _ = forward_to_hidden(make_model(name), input_ids=ids)
    with pytest.raises(error, match=message):
        head.token_stats(hidden, ids, **keywords)


def test_ref_head_with_another_scale_raises():
    ids, _ = make_batch()
    hidden, head, _ = forward_to_hidden(make_model("llama"), input_ids=ids)
    ref_hidden, ref_head, _ = forward_to_hidden(make_model("granite, divided"), input_ids=ids)
    with pytest.raises(ValueError, match="ref_head must have the scale and softcap of the head"):
        head.token_stats(hidden, ids, kl="forward", ref_hidden=ref_hidden, ref_head=ref_head)


def test_gradient_checkpointing():
    model = make_model("llama")
    expected, expected_grads = stats_and_gradients(logits_token_stats, model)
    model.train()
    model.gradient_checkpointing_enable()
    stats, grads = stats_and_gradients(fused_token_stats, model)
    torch.testing.assert_close(stats, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.slow
def test_compiled_model_alternates_with_its_own_forward():
    """torch.compile does not see hooks that are added after a module has run."""
    model, (ids, _), counter = make_model("llama"), make_batch(), CompileCounter()
    expected = model(ids).logits
    compiled, frames = torch.compile(model, backend=counter), []
    for _ in range(3):
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
        hidden, head, _ = forward_to_hidden(compiled, input_ids=ids)
        torch.testing.assert_close(hidden @ head.weight.T, expected)
        frames.append(counter.frame_count)
    assert frames[1] == frames[2], "nothing is compiled again"
    assert "forward" not in vars(model.lm_head)


def test_first_call_under_ddp_with_find_unused_parameters():
    """DDP searches the graph of the model's output, which the probe must not cut."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)  # fmt: skip
    try:
        wrapped = DistributedDataParallel(make_model("llama"), find_unused_parameters=True)
        fused_token_stats(wrapped, entropy=False).logprob.sum().backward()
        assert all(param.grad is not None for param in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()
