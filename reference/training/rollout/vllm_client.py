"""Completions from an OpenAI-compatible server, such as vLLM, as token ids over HTTP.

`weight_push` gives the server the weights of the policy before each step. With --stale-sampler it
keeps those with which it was started; the loss then corrects the difference by truncated importance
sampling. The commands that start a server are in reference/README.md.

With --top-k, --top-p or --min-p the tokens that the server kept are read from vLLM >= 0.28. Its
/v1/completions does not return them, so that another endpoint is asked.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from grpo_kernels import TokenSupport
from reference.training.config import SamplingSettings
from reference.training.errors import UserError
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.server import REQUESTS_AT_ONCE, Server
from reference.training.rollout.truncation import NO_TOP_K, Truncation
from reference.training.rollout.weight_push import WeightPush, pick_weight_push

COMPLETIONS = "/v1/completions"
WITH_SUPPORT = "/inference/v1/generate"
SUPPORT_HELP = (
    "the tokens that --top-k, --top-p and --min-p keep are returned by vLLM >= 0.28, started with "
    "--return-sampling-mask, --logprobs-mode processed_logprobs and, if it has that flag, "
    "--enable-scale-out; --no-support trains without them"
)
# A prefill that is split draws again from the generator of a request, which a CPU cannot.
SEED_HELP = "a server on a CPU must be started with --no-enable-chunked-prefill"


class ServerSampler(Sampler):
    """A sampler that requests the completions of all prompts from a server at once."""

    has_own_weights = True

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self.server = Server(settings.sampler, settings.sampler_timeout)
        self.url = self.server.url
        try:
            self.card: dict[str, Any] = self.server.get("/v1/models")["data"][0]
            self.model: str = self.card["id"]
        except (LookupError, TypeError):
            raise UserError(
                f"{self.url}/v1/models names no model: is it an OpenAI-compatible server?"
            ) from None
        self._push: WeightPush | None = None

    def start(self, policy, directory: Path) -> None:
        limit, longest = self.card.get("max_model_len"), policy.longest_prompt
        if limit is not None and longest + policy.max_new_tokens > limit:
            raise UserError(
                f"{self.url} has --max-model-len {limit}: expected at least the longest prompt, "
                f"{longest} tokens, and --max-new-tokens {policy.max_new_tokens}"
            )
        if self.settings.stale_sampler:  # it may serve an earlier state of the policy
            return
        root, name = self.card.get("root"), policy.model.config.name_or_path
        if root and name and not is_same_model(root, name):
            raise UserError(f"{self.url} serves {root}: expected --model, which is {name}")
        shared = self.settings.weights_dir
        if shared is None:
            shared = directory / "weights"
            shutil.rmtree(shared, ignore_errors=True)  # of a run that was killed
        self._push = pick_weight_push(self.server, shared, policy, root or self.model)
        self.dtype = self._push.dtype
        print(f"{self.url} gets {self._push.about} before each step")
        with policy.ranks.unsharded(policy.model):
            self.sync(policy)  # now, so that a server that cannot ends the run before step 1

    def sync(self, policy) -> None:
        if self._push is None:
            return
        name = failed = None
        if policy.ranks.is_first:
            try:
                name = self._push.push(policy)
            except UserError as error:
                failed = UserError(str(error))
        name, failed = policy.ranks.broadcast((name, failed))
        if failed is not None:
            raise failed
        self.model = name or self.model

    def close(self) -> None:
        if self._push is not None:
            self._push.close()
        self.server.close()

    def sample(self, policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
        rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
        truncation = Truncation(return_support=False)
        if temperature > 0 and policy.truncation is not None:
            truncation = policy.truncation
        with_support = truncation.return_support
        sampling = {  # overrides vLLM's generation_config; others ignore the fields unknown to them
            "n": group_size if temperature > 0 else 1,  # vLLM refuses several greedy ones
            "temperature": temperature,
            "top_p": truncation.top_p,
            "top_k": truncation.top_k or NO_TOP_K,
            "min_p": truncation.min_p,
            "repetition_penalty": 1.0,
            "max_tokens": policy.max_new_tokens,
            "stop_token_ids": list(policy.eos_ids),
            "logprobs": 1,
        }
        requests: list[dict[str, Any]] = []
        for row, seed in zip(rows, policy.ranks.seeds(len(rows)), strict=True):
            if with_support:
                body = {"token_ids": row, "sampling_params": sampling | {"seed": seed}}
            else:
                ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
                body = {"prompt": row, "seed": seed, **sampling, **ids}
            requests.append({"model": self.model, **body})
        path = WITH_SUPPORT if with_support else COMPLETIONS
        responses = self._post_all(path, requests)
        tokens, logprobs, kept = [], [], []
        for response in responses:
            if not response.get("choices"):
                raise UserError(f"{self.url} gave no choices: {json.dumps(response)[:200]}")
            choices = sorted(response["choices"], key=lambda choice: choice.get("index", 0))
            if temperature == 0:
                choices = choices[:1] * group_size
            if len(choices) != group_size:
                raise UserError(f"{self.url} gave {len(choices)} completions of {group_size}")
            for choice in choices:
                ids, logprob = self._parse(choice, policy)
                tokens.append(ids)
                logprobs.append(logprob)
                if with_support:
                    kept += self._parse_support(choice, ids)
        support = TokenSupport.from_lists(kept) if with_support else None
        return Completions.from_lists(tokens, logprobs, policy, support)

    def _parse(self, choice: dict[str, Any], policy) -> tuple[list[int], list[float]]:
        """Read the token ids, numbers or texts like "token_id:123", and their log-probs.

        The log-probs are in a list, or in one entry per token if the support is returned too.
        """
        logprobs = choice.get("logprobs") or {}
        values = logprobs.get("token_logprobs")
        if values is None:
            values = [token.get("logprob") for token in logprobs.get("content") or []]
        if not values or None in values:
            raise UserError(
                f"{self.url} gave no log-probs: it must support logprobs in completions"
            )
        ids = choice.get("token_ids")
        if ids is None:
            texts = logprobs.get("tokens") or [""]
            if not all(text.startswith("token_id:") for text in texts):
                raise UserError(
                    f"{self.url} gave no token ids: it must support return_token_ids or "
                    "return_tokens_as_token_ids, as vLLM does"
                )
            ids = [int(text.removeprefix("token_id:")) for text in texts]
        if len(ids) != len(values):
            raise UserError(f"{self.url} gave {len(ids)} tokens but {len(values)} log-probs")
        size = len(policy.tokenizer)
        unknown = [token for token in ids if not 0 <= token < size]
        if unknown:
            raise UserError(
                f"{self.url} serves {self.model}, whose token {unknown[0]} is not among the {size} "
                "of --model: serve the model that trains"
            )
        if choice.get("finish_reason") == "stop" and ids[-1] not in policy.eos_ids:
            raise UserError(
                f"{self.url} ended a completion with token {ids[-1]}: expected one of the end "
                f"tokens {list(policy.eos_ids)}"
            )
        if choice.get("finish_reason") == "length" and len(ids) < policy.max_new_tokens:
            raise UserError(
                f"{self.url} cut a completion after {len(ids)} of {policy.max_new_tokens} tokens: "
                "start it with a larger --max-model-len"
            )
        return ids, values

    def _parse_support(self, choice: dict[str, Any], ids: list[int]) -> list[list[int]]:
        """Read the tokens among which each token was drawn."""
        support = choice.get("sampling_mask")
        if support is None:
            raise UserError(f"{self.url} gave no sampling mask: {SUPPORT_HELP}")
        if len(support) != len(ids):
            raise UserError(f"{self.url} gave {len(ids)} tokens but {len(support)} sampling masks")
        for token, kept in zip(ids, support, strict=True):
            if token not in kept:
                raise UserError(
                    f"{self.url} drew token {token} and gave a sampling mask of {len(kept)} tokens "
                    "without it"
                )
        return support

    def _post_all(self, path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Post all bodies at once and return the answers, all before one deadline."""
        deadline = time.monotonic() + self.server.timeout
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            futures = [pool.submit(self.server.post, path, body, deadline) for body in bodies]
            done = set()
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also after Ctrl-C
                if len(done) < len(futures):
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.server.abort()
        failures = [future.exception() for future in done]
        errors = [error for error in failures if error is not None]
        if not errors:
            return [future.result() for future in futures]
        # An answer says more than a lost connection.
        error = min(errors, key=lambda x: getattr(x, "status", None) is None)
        status = getattr(error, "status", None)
        if status == 500:
            raise UserError(f"{error} ({SEED_HELP})")
        if status is not None and status < 500 and path == WITH_SUPPORT:
            raise UserError(f"{error} ({SUPPORT_HELP})")
        raise error


def is_same_model(served: str, trained: str) -> bool:
    """Return whether two directories or ids of the hub are the same model, as far as names tell."""
    directories = [Path(name).resolve() for name in (served, trained)]
    if all(directory.is_dir() for directory in directories):
        return directories[0] == directories[1]
    return len({_model_name(Path(name)) for name in (served, trained)}) == 1


def _model_name(path: Path) -> str:
    """Return the last part of a name; that of models--ORG--NAME/snapshots/COMMIT is NAME."""
    name = path.parent.parent.name if path.parent.name == "snapshots" else path.name
    return name.rpartition("--")[2].lower()
