"""Ways to give a running vLLM server the weights of a policy.

Both write files that trainer and server see under the same path, and then announce them. Each time
the directory is a new one: vLLM caches prompts of an adapter by its name and path, and a directory
that is announced must be complete.

Left out: vLLM's transfer by NCCL, for which the trainer would have to import vLLM itself, and the
routes of other servers, such as /update_weights_from_disk of SGLang.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from reference.training.errors import UserError, one_line
from reference.training.model import lora
from reference.training.rollout.server import RETRY_S, Server, ServerError
from reference.training.rollout.synced_weights import synced_weights

LOAD_ADAPTER = "/v1/load_lora_adapter"
COLLECTIVE_RPC = "/collective_rpc"
# What --max-lora-rank may be.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class WeightPush:
    """A way to give a server weights.

    Attributes:
        about: says what the server gets.
        command: starts a server that takes weights in this way.
        dtype: in which the server computes, if it says so.
    """

    about: str
    command: str
    dtype: torch.dtype | None = None

    def __init__(self, server: Server, directory: Path) -> None:
        self.server, self.directory = server, directory.resolve()
        self._is_own = not directory.exists()
        self._current: Path | None = None

    def push(self, policy) -> str | None:
        """Give the server the weights; return the name under which it has them, if it is new."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove the files, and the directory if it was made for them."""
        if self._current is not None:
            shutil.rmtree(self._current, ignore_errors=True)
        if self._is_own:
            with suppress(OSError):  # it holds other files
                self.directory.rmdir()

    @contextmanager
    def _new_directory(self) -> Iterator[Path]:
        """Make a directory that replaces the current one, unless this fails."""
        path = self.directory / f"weights-{secrets.token_hex(4)}"
        outdated: Path | None = path
        try:
            path.mkdir(parents=True)
            yield path
            outdated, self._current = self._current, path
        except ServerError as error:
            if error.status is None:  # the server is gone
                raise
            raise UserError(
                f"{error}; this is the answer to new weights in {path}, a path that must be the "
                f"same on the server (--weights-dir), which is started by: {self.command}"
            ) from None
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"cannot write {path}: {reason}") from None
        finally:  # also after Ctrl-C
            if outdated is not None:
                shutil.rmtree(outdated, ignore_errors=True)


class AdapterPush(WeightPush):
    """Load the LoRA adapter under a name of this run.

    Args:
        base: gives the server the base model first, where an earlier run may have replaced it.
    """

    about = "the adapter of LoRA"

    def __init__(
        self, server: Server, directory: Path, policy, model: str, base: WeightPush | None
    ) -> None:
        super().__init__(server, directory)
        self._base = base
        rank = policy.model.peft_config["default"].r
        largest = next((size for size in LORA_RANKS if size >= rank), rank)
        self.command = (
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {shlex.quote(model)} --enable-lora "
            f"--max-lora-rank {largest} --logprobs-mode processed_logprobs"
        )
        self.name = f"grpo-{secrets.token_hex(4)}"

    def push(self, policy) -> str:
        if self._base is not None:
            with policy.model.disable_adapter():
                self._base.push(policy)
            self._base.close()
            self._base = None
        with self._new_directory() as path:
            # Not state_dict(), which returns shards under FSDP.
            weights = dict(policy.model.named_parameters())
            # Without the flag peft looks for a change of the vocabulary, on the hub if need be.
            policy.model.save_pretrained(path, state_dict=weights, save_embedding_layers=False)
            share(path)
            body = {"lora_name": self.name, "lora_path": str(path), "load_inplace": True}
            self.server.request("POST", LOAD_ADAPTER, body)
        return self.name


class CheckpointPush(WeightPush):
    """Write all weights as a checkpoint and let each worker load it."""

    about = "all weights"

    def __init__(self, server: Server, directory: Path, policy, model: str) -> None:
        super().__init__(server, directory)
        self.is_tied = policy.model.config.get_text_config().tie_word_embeddings
        untied = shlex.quote('{"tie_word_embeddings": false}')
        self.command = (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(model)} --host 127.0.0.1 "
            "--logprobs-mode processed_logprobs"
            + (f" --hf-overrides {untied}" if self.is_tied else "")
        )

    def check(self, config: dict[str, Any]) -> None:
        """Raise a UserError if the server would keep a head that is tied to the embedding.

        vLLM on a CPU packs the weight of the head. A tied one is packed once and stays the old one.
        """
        overrides = config.get("model_config", {}).get("hf_overrides") or {}
        if is_on_cpu(config) and self.is_tied and overrides.get("tie_word_embeddings") is not False:
            raise UserError(
                f"{self.server.url} runs on a CPU, where vLLM never replaces a head that is tied "
                f"to the embedding; start it by: {self.command} --no-enable-chunked-prefill"
            )

    def push(self, policy) -> None:
        with self._new_directory() as path:
            save_file(independent(synced_weights(policy)), path / "model.safetensors")
            share(path)
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
            self.server.request("POST", COLLECTIVE_RPC, body)
            # It fails while another request still holds blocks of the cache.
            deadline = time.monotonic() + RETRY_S
            while not self.server.post("/reset_prefix_cache", {}).get("success", True):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.server.url} does not drop the prompts that it has cached for the "
                        "old weights: it must serve nobody else"
                    )
                time.sleep(0.2)


def pick_weight_push(server: Server, directory: Path, policy, model: str) -> WeightPush:
    """Find out how the server takes weights, by the routes that it has.

    A server without the route of adapters gets a LoRA policy merged, as all weights.

    Args:
        model: what the server serves, for the command that starts it.
    """
    full = CheckpointPush(server, directory, policy, model)
    takes_all, config = server.has_route(COLLECTIVE_RPC), {}
    if takes_all:
        config = server.get("/server_info?config_format=json").get("vllm_config")
        if not isinstance(config, dict):
            raise UserError(f"{server.url}/server_info has no vllm_config in JSON: is it a vLLM?")
    if is_on_cpu(config) and config.get("scheduler_config", {}).get("enable_chunked_prefill"):
        raise UserError(
            f"{server.url} runs on a CPU, where vLLM fails as soon as it splits a prompt whose "
            "request has a seed: start it with --no-enable-chunked-prefill"
        )
    needed: WeightPush = full
    if lora.has_adapter(policy.model):
        needed = AdapterPush(server, directory, policy, model, full if takes_all else None)
    if needed is not full and server.has_route(LOAD_ADAPTER):
        push = needed
    elif takes_all:
        full.check(config)
        push = full
    else:
        raise UserError(
            f"{server.url} takes over no weights: start it by: {needed.command}; or pass "
            "--stale-sampler to sample from the weights that it has"
        )
    name = str(config.get("model_config", {}).get("dtype")).removeprefix("torch.")
    push.dtype = getattr(torch, name, None)
    return push


def is_on_cpu(config: dict[str, Any]) -> bool:
    return config.get("device_config", {}).get("device") == "cpu"


def independent(weights: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Collect weights on the CPU, and copy those that share memory with an earlier one."""
    found: dict[str, Tensor] = {}
    memory: set[Any] = set()
    for name, weight in weights:
        weight = weight.cpu().contiguous()
        pointer = weight.untyped_storage().data_ptr()
        found[name] = weight.clone() if pointer in memory else weight
        memory.add(pointer)
    return found


def share(directory: Path) -> None:
    """Let those who may read the directory read its files: safetensors lets only the owner."""
    for file in directory.iterdir():
        file.chmod(directory.stat().st_mode & 0o666)
