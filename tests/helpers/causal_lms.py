"""Small random Hugging Face causal language models, one per family, and a batch for them.

Their statistics are computed without logits, and from their own logits.
"""

import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_kernels.integrations.transformers import forward_to_hidden
from reference import losses

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
VISION = {"hidden_size": 16, "intermediate_size": 32}


def qwen3_5():
    """A class with a vision tower; the batch has no image."""
    text = SMALL | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    text |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    vision = VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 16}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


def gemma4():
    """A class with a vision tower and a softcap; the batch has no image."""
    text = SMALL | {"head_dim": 8, "global_head_dim": 8, "final_logit_softcapping": 2.5}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    text |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": V}
    vision = VISION | {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision |= {"num_key_value_heads": 2}
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    )


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
    "qwen3.5, vision": qwen3_5,
    "gemma4, vision, softcap": gemma4,
}
MORE_MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma3, softcap": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=8, final_logit_softcapping=1.5)
    ),
    "cohere2, multiplied": lambda: Cohere2ForCausalLM(
        Cohere2Config(**SMALL, logit_scale=0.6, layer_types=["full_attention"] * 2)
    ),
    "gpt-j, bias": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=V, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    ),
    "falcon-h1, multiplied": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **SMALL, head_dim=8, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4,
            mamba_n_groups=1, mamba_chunk_size=4, lm_head_multiplier=0.4,
        )
    ),
}  # fmt: skip


def make_model(name, seed=0):
    """A model of a family in fp64, with random heads and biases, so that each of them matters."""
    torch.manual_seed(seed)
    model = (MODELS | MORE_MODELS)[name]().double().eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


def make_batch():
    """Token ids and attention mask [3, 6], padded on the right."""
    ids = torch.randint(1, V, (3, 6), generator=torch.Generator().manual_seed(1))
    attention = torch.ones(3, 6, dtype=torch.int64)
    attention[0, 5:] = attention[2, 3:] = 0
    return ids, attention


def fused_token_stats(model, *, ref_model=None, **keywords):
    ids, attention = make_batch()
    inputs = {"input_ids": ids, "attention_mask": attention}
    hidden, head, _ = forward_to_hidden(model, **inputs)
    if ref_model is not None:
        with torch.no_grad():
            ref_hidden, ref_head, _ = forward_to_hidden(ref_model, **inputs)
        keywords |= {"ref_hidden": ref_hidden[:, :-1], "ref_head": ref_head}
    return head.token_stats(hidden[:, :-1], ids[:, 1:], **keywords)


def logits_token_stats(model, *, ref_model=None, **keywords):
    ids, attention = make_batch()
    logits = model(ids, attention_mask=attention).logits[:, :-1]
    if ref_model is not None:
        with torch.no_grad():
            keywords["ref_logits"] = ref_model(ids, attention_mask=attention).logits[:, :-1]
    return losses.token_stats(logits, ids[:, 1:], **keywords)


def stats_and_gradients(token_stats, model, **keywords):
    """Statistics of the unpadded tokens by name, and all gradients of their sum."""
    _, attention = make_batch()
    model.zero_grad()
    mask = (attention[:, 1:] != 0) & (attention[:, :-1] != 0)
    stats = token_stats(model, mask=mask, **keywords)
    sum(stat.sum() for stat in stats if stat is not None).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in stats._asdict().items() if x is not None}, grads
