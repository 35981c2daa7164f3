"""Completions from vLLM in this process (`--sampler vllm`).

Before each rollout vLLM takes over the policy's weights, by its public interface for reinforcement
learning (`reload_weights`). On a GPU it shares the device with the training: --vllm-memory is its
share, and while the policy trains it sleeps, which frees its cache and moves its weights to the
host. Under torchrun each rank has an engine of its own and samples for its questions.

Prompts go in and completions come out as token ids, so that vLLM reads no tokenizer.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from grpo_kernels import TokenSupport
from grpo_kernels.integrations.transformers import unwrap
from reference.training.errors import UserError, one_line
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.synced_weights import synced_weights
from reference.training.rollout.truncation import NO_TOP_K, Truncation

# Read when vLLM is imported. Without the first it runs in another process, which weights would have
# to be sent to.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULT_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
CPU_BATCH_TOKENS = 8192


class VLLMEngine(Sampler):
    """A sampler that owns a vLLM engine.

    Args:
        memory: the engine's share of the memory of the device, above 0 and below 1.
        options: arguments of `vllm.LLM`, which replace those that are chosen here.
    """

    has_own_weights = True

    def __init__(self, memory: float, options: Mapping[str, Any]) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError('--sampler vllm needs the package vllm: pip install -e ".[train,vllm]"')
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if options.get(name, 1) != 1:
                raise UserError(
                    f"--vllm-options {name}={options[name]}: the engine of --sampler vllm has one "
                    "device, that of the process; for more start a server and name it by --sampler "
                    "URL, or start several processes with torchrun"
                )
        self.memory = memory
        self.options = dict(options)
        self.llm: Any = None
        self.sleeps = self.is_asleep = False
        self.owns_distributed = False  # whether vLLM has made the default process group

    def start(self, policy, directory: Path) -> None:
        import pydantic  # vLLM requires it

        self.owns_distributed = not dist.is_initialized()
        os.environ.update(ENVIRONMENT)
        for name, value in DEFAULT_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with (
            _same_rng(policy.device),
            tempfile.TemporaryDirectory() as scratch,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # of vLLM's own imports
            try:
                from vllm import LLM, SamplingParams

                self.llm = LLM(**self._arguments(policy, Path(scratch)))
                # Some models fail in their first forward pass only.
                one_token = SamplingParams(max_tokens=1, detokenize=False)
                self.llm.generate(_prompts([[policy.eos_ids[0]]]), one_token, use_tqdm=False)
            except Exception as error:  # each part of vLLM raises its own type
                name = type(unwrap(policy.model)).__name__
                reason, remedy = one_line(error), ""
                if isinstance(error, pydantic.ValidationError):  # its first line is a count
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                if "return_sampling_mask" in reason or "sampling distribution" in reason:
                    remedy = (
                        ". This vLLM returns no tokens that --top-k, --top-p and --min-p keep: "
                        "train without them with --no-support"
                    )
                raise UserError(
                    f"--sampler vllm does not run {name} here: {reason}{remedy}"
                ) from error

    def sync(self, policy) -> None:
        if self.is_asleep:  # the cache has to wait: loading needs memory
            self.llm.wake_up(tags=["weights"])
        with _fork_torch_rng(policy.device):
            weights = {"weights_iterator": synced_weights(policy)}
            self.llm.collective_rpc("reload_weights", kwargs=weights)
        if self.is_asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.is_asleep = False
        self.llm.reset_prefix_cache()  # keys and values of the old weights

    def sample(self, policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
        rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
        self._check_lengths(rows, policy.max_new_tokens)
        params = self._sampling_params(policy, group_size, temperature, len(rows))
        if self.is_asleep:
            self.llm.wake_up()
            self.is_asleep = False
        with _fork_torch_rng(policy.device):
            results = self.llm.generate(_prompts(rows), params, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=1)  # a further round of the step finds its weights again
            self.is_asleep = True

        tokens, logprobs, kept = [], [], []
        for result in results:
            outputs = sorted(result.outputs, key=lambda output: output.index)
            for output in outputs * (group_size if temperature == 0 else 1):
                ids = list(output.token_ids)
                tokens.append(ids)
                pairs = zip(output.logprobs, ids, strict=True)
                logprobs.append([candidates[token].logprob for candidates, token in pairs])
                if output.sampling_mask is not None:
                    kept += output.sampling_mask.token_ids
        support = TokenSupport.from_lists(kept) if kept else None
        return Completions.from_lists(tokens, logprobs, policy, support)

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
        gc.collect()
        if self.owns_distributed and dist.is_initialized():
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _arguments(self, policy, scratch: Path) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM` for a policy."""
        from vllm.platforms import current_platform

        model: Any = unwrap(policy.model)
        config = model.config
        arguments: dict[str, Any] = {
            "model": str(_model_directory(model, scratch)),
            "load_format": "dummy",  # the weights come with the first sync
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model's, which may hold a penalty
            "dtype": "bfloat16" if policy.uses_bf16 else "float32",
            "max_model_len": -1,  # the most for which there is memory
            "logprobs_mode": "processed_logprobs",  # after temperature and truncation
            "seed": 0,  # each request brings its own
        }
        if policy.truncation is not None and policy.truncation.return_support:
            arguments["return_sampling_mask"] = True
        if dist.is_initialized():
            arguments["distributed_executor_backend"] = "external_launcher"
        if policy.device.type == "cpu":
            limit = getattr(config.get_text_config(), "max_position_embeddings", None)
            arguments |= {
                "enforce_eager": True,  # otherwise it compiles for minutes
                "kv_cache_memory_bytes": int(self.memory * _cpu_memory()),
                # A prefill in chunks rewinds the generator of a request with a seed, which one on a
                # CPU cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_BATCH_TOKENS, limit or 0),
            }
        else:
            can_sleep = torch.cuda.is_available() and current_platform.is_sleep_mode_available()
            arguments |= {"gpu_memory_utilization": self.memory, "enable_sleep_mode": can_sleep}
        overrides = {}
        if config.get_text_config().tie_word_embeddings:
            # Where vLLM packs the layers, as on a CPU, reloading leaves a tied head as it was. An
            # untied one has a weight of its own in the state that is sent.
            overrides["tie_word_embeddings"] = False
        options = dict(self.options)
        arguments["hf_overrides"] = overrides | options.pop("hf_overrides", {})
        arguments |= options
        self.sleeps = bool(arguments.get("enable_sleep_mode"))
        return arguments

    def _sampling_params(self, policy, group_size: int, temperature: float, prompts: int) -> list:
        """Return the parameters of each prompt, which differ in their seeds."""
        from vllm import SamplingParams

        truncation = Truncation()
        if temperature > 0 and policy.truncation is not None:
            truncation = policy.truncation
        return [
            SamplingParams(
                n=group_size if temperature > 0 else 1,  # vLLM refuses several greedy ones
                temperature=temperature,
                top_k=truncation.top_k or NO_TOP_K,
                top_p=truncation.top_p,
                min_p=truncation.min_p,
                max_tokens=policy.max_new_tokens,
                stop_token_ids=list(policy.eos_ids),
                logprobs=0,  # of the sampled token only
                detokenize=False,
                seed=seed,
            )
            for seed in policy.ranks.seeds(prompts)
        ]

    def _check_lengths(self, rows: list[list[int]], max_new_tokens: int) -> None:
        longest, limit = max(map(len, rows)), self.llm.model_config.max_model_len
        if longest + max_new_tokens > limit:
            raise UserError(
                f"--sampler vllm has room for sequences of {limit} tokens: expected a prompt and "
                f"--max-new-tokens within them; got a prompt of {longest} tokens and "
                f"--max-new-tokens {max_new_tokens}. --vllm-memory sets its memory"
            )


def _prompts(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": row} for row in rows]


def _model_directory(model: Any, scratch: Path) -> Path:
    """Return the directory of the model's config, or write it to `scratch`."""
    if (Path(model.name_or_path) / "config.json").is_file():
        return Path(model.name_or_path)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(scratch)
    return scratch


def _cpu_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _same_rng(device: torch.device) -> Iterator[None]:
    """Restore the state of all random generators, which vLLM seeds when it starts."""
    python, numpy = random.getstate(), np.random.get_state()
    with _fork_torch_rng(device):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _fork_torch_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restore the state of PyTorch's generators.

    vLLM draws from them for every row, on each rank another number of times, and all ranks must
    agree on the next seed.
    """
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type)
