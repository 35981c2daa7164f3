"""Hugging Face models through the hidden level: against their own logits, family by family."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_kernels.integrations import transformers as causal_lm
from reference.training.model import plain_scorer as plain
from tests.helpers.tensors import coin

V = 41
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gemma2, softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.5)
    ),
    "granite, divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.3)),
    "cohere, multiplied": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=1.7)),
    "phi, bias": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
}


def make_model(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():  # random heads and biases, so that they matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch():
    ids = torch.randint(1, V, (3, 6), generator=torch.Generator().manual_seed(1))
    attention = torch.ones(3, 6, dtype=torch.int64)
    attention[0, 5:] = attention[2, 3:] = 0
    return ids, attention


def stats_and_gradients(module, model, **keywords):
    model.zero_grad()
    stats = module.causal_lm_token_stats(model, *make_batch(), **keywords)
    sum(each.sum() for each in stats if each is not None).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in stats._asdict().items() if x is not None}, found


@pytest.mark.parametrize("name", MODELS)
def test_statistics_and_gradients_are_those_of_the_model_s_logits(name):
    model, ref_model = make_model(name), make_model(name, seed=1)
    for keywords in ({}, {"temperature": 0.7, "kl": "reverse", "ref_model": ref_model}):
        ours, gradients = stats_and_gradients(causal_lm, model, **keywords)
        expected, exact = stats_and_gradients(plain, model, **keywords)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradients, exact, rtol=1e-7, atol=1e-9)


def test_scale_and_softcap_are_what_the_config_says():
    inputs = dict(zip(("input_ids", "attention_mask"), make_batch(), strict=True))
    expected = {
        "llama": (1.0, None),
        "gemma2, softcap": (1.0, 2.5),
        "granite, divided": (1 / 0.3, None),
        "cohere, multiplied": (1.7, None),
    }
    for name, found in expected.items():
        for _ in range(2):  # measured, then remembered
            head = causal_lm.forward(make_model(name).float(), **inputs).head
            assert (head.scale, head.softcap) == found, name


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.25), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_that_are_cast_are_not_taken_for_capped_ones(dtype, scale, softcap):
    """1e30 is no number of fp32, nor of bf16."""

    class Cast(LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            logits = (scale * output.logits).to(dtype)
            output.logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            return output

    _, head, _ = causal_lm.forward(Cast(LlamaConfig(**SMALL)), input_ids=make_batch()[0])
    assert head.softcap == softcap
    assert head.scale == pytest.approx(scale, rel=1e-6 if dtype == torch.float32 else 1e-2)


def test_no_logits_are_made():
    model = make_model("llama")
    for _ in range(2):
        _, _, output = causal_lm.forward(model, input_ids=make_batch()[0])
    assert output.logits.numel() == 0
    assert model(input_ids=make_batch()[0]).logits.shape == (3, 6, V), "the head is back"


def test_a_mask_picks_the_tokens_of_the_completion():
    model, (ids, attention) = make_model("llama"), make_batch()
    mask = coin(3, 3, 5)
    ours = causal_lm.causal_lm_token_stats(model, ids, attention, mask=mask)
    expected = plain.causal_lm_token_stats(model, ids, attention, mask=mask)
    torch.testing.assert_close(ours, expected)
    assert (ours.logprob[~mask] == 0).all()


def test_the_head_comes_back_when_the_model_fails():
    model = make_model("llama")
    with pytest.raises(TypeError):
        causal_lm.forward(model, input_ids=make_batch()[0], nonsense=1, position_ids="x")
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


class Offset(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits + torch.arange(V)
        return output


class Bounded(LlamaForCausalLM):
    """A hard bound, which is no softcap of that size."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits.clamp(-50, 50)
        return output


class Sliced(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits[..., : V - 1]
        return output


class Hidden(LlamaForCausalLM):
    def get_output_embeddings(self):
        return torch.nn.Identity()


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        (Offset, NotImplementedError, "Offset does more to its logits"),
        (
            Bounded,
            NotImplementedError,
            "Bounded does more to its logits than a scale",
        ),
        (Sliced, NotImplementedError, "Sliced does more .* a scale and a softcap"),
        (
            Hidden,
            TypeError,
            "Hidden must be a linear layer, got torch.*linear.Identity",
        ),
    ],
)
def test_a_model_that_we_would_get_wrong_is_refused(family, error, message):
    with pytest.raises(error, match=message):
        causal_lm.forward(family(LlamaConfig(**SMALL)), input_ids=make_batch()[0])


def test_a_reference_whose_logits_are_scaled_otherwise_is_refused():
    inputs = {"input_ids": make_batch()[0]}
    hidden, head, _ = causal_lm.forward(make_model("llama"), **inputs)
    ref_hidden, ref_head, _ = causal_lm.forward(make_model("granite, divided"), **inputs)
    with pytest.raises(ValueError, match="ref_head must have the scale and softcap of the head"):
        head.token_stats(
            hidden, inputs["input_ids"], kl="forward", ref_hidden=ref_hidden, ref_head=ref_head
        )


def test_a_model_with_gradient_checkpointing():
    model = make_model("llama")
    expected, exact = stats_and_gradients(plain, model)
    model.train()
    model.gradient_checkpointing_enable()
    ours, gradients = stats_and_gradients(causal_lm, model)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients, exact)


def test_the_first_call_runs_under_ddp_that_looks_for_unused_parameters():
    """DDP walks the graph of the model's output, which the probe must not cut."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)  # fmt: skip
    try:
        ids, _ = make_batch()
        wrapped = DistributedDataParallel(make_model("llama"), find_unused_parameters=True)
        causal_lm.causal_lm_token_stats(wrapped, ids, entropy=False).logprob.sum().backward()
        assert all(each.grad is not None for each in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()
