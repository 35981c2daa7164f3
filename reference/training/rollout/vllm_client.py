"""Completions from an OpenAI-compatible server, such as vLLM, as token ids over HTTP.

    vllm serve DIRECTORY --logprobs-mode processed_logprobs

This mode is needed if --temperature is not 1: otherwise vLLM returns log-probs without the
temperature. The server keeps the weights with which it was started, while the policy is trained.
New weights are not sent: vLLM receives them by NCCL, CUDA handles or a developer mode only. The
loss corrects the difference by truncated importance sampling. The metric
sampling/sampling_logp_difference shows it; if it has grown, restart the server from a saved model.
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

from reference.training.errors import UserError
from reference.training.rollout.generate import Completions, Prompts

TIMEOUT_S = 600
ATTEMPTS = 5
BACK_OFF_S = 0.5  # the wait before the second attempt; it doubles with each further one
REQUESTS_AT_ONCE = 64


class ServerSampler:
    """A sampler that requests the completions of all prompts from a server at once."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        models = self._send("/v1/models").get("data") or [{}]
        self.model = models[0].get("id")
        if self.model is None:
            raise UserError(
                f"{self.url}/v1/models names no model: is it an OpenAI-compatible server?"
            )

    def __call__(
        self, policy, prompts: Prompts, group_size: int, temperature: float
    ) -> Completions:
        """Sample a group for each prompt."""
        rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
        requests = [
            {  # overrides vLLM's generation_config; other servers ignore the fields unknown to them
                "model": self.model,
                "prompt": row,
                "n": group_size if temperature > 0 else 1,  # vLLM refuses several greedy ones
                "temperature": temperature,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "max_tokens": policy.max_new_tokens,
                "stop_token_ids": list(policy.eos_ids),
                "seed": seed,
                "logprobs": 1,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
            for row, seed in zip(rows, policy.ranks.seeds(len(rows)), strict=True)
        ]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            responses = list(pool.map(lambda body: self._send("/v1/completions", body), requests))
        tokens, logprobs = [], []
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
        return Completions.from_lists(tokens, logprobs, policy)

    def _parse(self, choice: dict[str, Any], policy) -> tuple[list[int], list[float]]:
        """Read the token ids, numbers or texts like "token_id:123", and their log-probs."""
        logprobs = choice.get("logprobs") or {}
        values = logprobs.get("token_logprobs")
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
                    raise UserError(f"{self.url}{path} {failure}") from None
            except json.JSONDecodeError:
                raise UserError(f"{self.url}{path} did not answer in JSON") from None
            except (OSError, http.client.HTTPException) as error:
                failure = f"is out of reach: {getattr(error, 'reason', None) or error}"
        raise UserError(f"{self.url}{path} {failure} (after {ATTEMPTS} attempts)")
