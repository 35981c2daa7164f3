"""Completions from an OpenAI-compatible server, such as vLLM, as token ids over HTTP.

    vllm serve DIRECTORY --logprobs-mode processed_logprobs

This mode is needed if --temperature is not 1 or the distribution is truncated: otherwise vLLM
returns log-probs without either. The server keeps the weights with which it was started, while the
policy is trained. New weights are not sent: vLLM receives them by NCCL, CUDA handles or a developer
mode only. The loss corrects the difference by truncated importance sampling. The metric
sampling/sampling_logp_difference shows it; if it has grown, restart the server from a saved model.

With --top-k, --top-p or --min-p the tokens that the server kept are read from vLLM >= 0.28. Its
/v1/completions does not return them, so that another endpoint is asked:

    vllm serve DIRECTORY --logprobs-mode processed_logprobs \\
        --return-sampling-mask --enable-scale-out
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from grpo_kernels import TokenSupport
from reference.training.errors import UserError
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.truncation import Truncation

TIMEOUT_S = 600
ATTEMPTS = 5
BACK_OFF_S = 0.5  # the wait before the second attempt; it doubles with each further one
REQUESTS_AT_ONCE = 64
COMPLETIONS = "/v1/completions"
WITH_SUPPORT = "/inference/v1/generate"
# No limit; vLLM takes the vocabulary instead. Under --return-sampling-mask it refuses a top_k of 0.
NO_TOP_K = 1 << 30
SUPPORT_HELP = (
    "the tokens that --top-k, --top-p and --min-p keep are returned by vLLM >= 0.28, started with "
    "--return-sampling-mask, --logprobs-mode processed_logprobs and, if it has that flag, "
    "--enable-scale-out; --no-support trains without them"
)


class ServerSampler(Sampler):
    """A sampler that requests the completions of all prompts from a server at once."""

    has_own_weights = True

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        models = self._send("/v1/models").get("data") or [{}]
        self.model = models[0].get("id")
        if self.model is None:
            raise UserError(
                f"{self.url}/v1/models names no model: is it an OpenAI-compatible server?"
            )

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
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            responses = list(pool.map(lambda body: self._send(path, body), requests))
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

    def _send(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET, or POST `body`, and retry if the connection or the server fails."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACK_OFF_S * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")
                with suppress(ValueError, AttributeError):  # not JSON, or of another form
                    content = json.loads(text)
                    text = content.get("error", content).get("message", text)
                reason = " ".join(text.split())[:300] or error.reason  # on one line
                failure = f"answered {error.code}: {reason}"
                if error.code < 500:
                    remedy = f" ({SUPPORT_HELP})" if path == WITH_SUPPORT else ""
                    raise UserError(f"{self.url}{path} {failure}{remedy}") from None
            except json.JSONDecodeError:
                raise UserError(f"{self.url}{path} did not answer in JSON") from None
            except (OSError, http.client.HTTPException) as error:
                failure = f"is out of reach: {getattr(error, 'reason', None) or error}"
        raise UserError(f"{self.url}{path} {failure} (after {ATTEMPTS} attempts)")
