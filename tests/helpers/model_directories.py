"""Directories of small random models with a tokenizer of bytes and a chat template."""

import json
from pathlib import Path
from unittest import mock

import torch
import transformers

from reference.training.model import load as models

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
MAMBA2 |= {"mamba_chunk_size": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {  # arguments of the config <family>Config
    "Llama": SIZES,
    "Qwen3Moe": SIZES | EXPERTS,
    "Gemma2": SIZES | {"head_dim": 8, "sliding_window": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPT": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 32},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "FalconH1": SIZES | MAMBA2 | {"mamba_d_ssm": 64, "head_dim": 8},
    "Bamba": SIZES | MAMBA2 | {"attn_layer_indices": [1]},
    "Jamba": SIZES
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}
    | {"mamba_dt_rank": 4},
    "Qwen3Next": SIZES
    | EXPERTS
    | LINEAR
    | HYBRID
    | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "MiniMax": SIZES
    | HYBRID
    | {"head_dim": 8, "block_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8}
    | {"head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "RecurrentGemma": SIZES
    | {"num_hidden_layers": 3, "num_key_value_heads": 1, "attention_window_size": 4}
    | {"lru_width": 32},
    "Rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}


def make_family(family: str, **changes):
    """Make (model, tokenizer) of a family; weights are so large that context changes the logits."""
    with mock.patch.dict(models.ARCHITECTURES, bytes=SIZES | {"vocab_size": 258}):
        _, tokenizer = models.random_weights("bytes")
    special = {"bos_token_id": 257, "eos_token_id": tokenizer.eos_token_id}
    special |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": 258}
    config = getattr(transformers, family + "Config")(**FAMILIES[family] | special | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for param in model.parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.1)
    return model.eval(), tokenizer


def save_family(directory: Path, family: str, *, chat_template=None, file=None, **changes) -> Path:
    """Save a model of a family; `file` holds further values of its config.json."""
    model, tokenizer = make_family(family, **changes)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (file or {})))
    return directory
