"""Who writes the completions: the loop of `rollout`, two engines of transformers, or a server.

A sampler is a callable (policy, prompts, group_size, temperature) -> Completions. Every one draws
from softmax(logits / temperature), untruncated: what a model's generation_config.json asks for
besides (top-k, top-p, a repetition penalty) would make sampler and trainer two policies. Their
log-probs are their own: engines that add up in another order or precision differ from the trainer,
by what the metric sampling/sampling_logp_difference says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from reference.training.errors import UserError
from reference.training.rollout.generate import Completions, Prompts, generate
from reference.training.rollout.vllm_client import ServerSampler

Sampler = Callable[[Any, Prompts, int, float], Completions]


def pick_sampler(name: str) -> Sampler:
    """The sampler of that name, or the server at that http(s) URL.

    Raises:
        UserError: there is no such sampler, or the server does not answer.
    """
    if is_server(name):
        return ServerSampler(name)
    if name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise UserError(
            f"--sampler must be {known}, or the http:// or https:// URL of a server; got {name!r}"
        )
    return SAMPLERS[name]


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def shared_prompt(policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
    """`rollout.generate`: the prompt of a group is computed once."""
    rows, device = len(prompts.ids) * group_size, prompts.ids.device
    with policy.autocast(), policy.ranks.shared_rng(rows, device) as draw:
        return generate(
            policy.model,
            prompts,
            group_size=group_size,
            max_new_tokens=policy.max_new_tokens,
            eos_ids=policy.eos_ids,
            pad_id=policy.tokenizer.pad_token_id,
            temperature=temperature,
            draw=draw,
        )


def hf_generate(policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
    """`model.generate` of transformers, for models whose cache cannot be repeated."""
    from transformers import LogitsProcessorList

    rows = prompts[torch.arange(len(prompts.ids)).repeat_interleave(group_size)]
    noted = RecordLogprobs(temperature)
    with (
        policy.autocast(),
        override_generation_config(policy.model, _settings(policy, do_sample=temperature > 0)),
    ):
        ids = policy.model.generate(
            rows.ids,
            attention_mask=rows.mask.long(),
            logits_processor=LogitsProcessorList([noted]),
        )
    tokens = ids[:, prompts.ids.shape[1] :]
    logprob = noted.upto(tokens)
    ends = torch.isin(tokens, torch.tensor(policy.eos_ids, device=tokens.device))
    # After its first end token a row is padding, whatever the padding token is.
    mask = ends.long().cumsum(-1) - ends.long() == 0
    return Completions(tokens, mask, logprob.where(mask, 0.0), ends.any(-1))


class RecordLogprobs:
    """A logits processor that applies the temperature and keeps the log-probs of what was drawn.

    `generate` can return the scores of all steps instead: T times the vocabulary per completion.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature or 1.0  # 0 is greedy, and scored at 1
        self.logprobs: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.last is not None:
            self._note(input_ids[:, -1])
        self.last = (scores.float() / self.temperature).log_softmax(-1)
        return self.last

    def upto(self, tokens: Tensor) -> Tensor:
        """[N, T], once the last tokens were drawn."""
        self._note(tokens[:, -1])
        return torch.stack(self.logprobs, dim=1)

    def _note(self, token: Tensor) -> None:
        self.logprobs.append(self.last.gather(-1, token[:, None]).squeeze(-1))


def continuous(policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
    """`model.generate_batch` of transformers: rows enter and leave the batch as they end.

    It runs in a thread of its own, where autocast does not reach: the model acts in the dtype of
    its weights.

    Raises:
        UserError: this transformers, model or device does not run it; the reason is given.
    """
    if not hasattr(policy.model, "generate_batch"):
        raise UserError(
            f"--sampler continuous: {type(policy.model).__name__} has no generate_batch in this "
            "version of transformers"
        )
    rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
    inputs = [row for row in rows for _ in range(group_size)]
    settings = _settings(policy, do_sample=temperature > 0)
    if temperature > 0:
        settings.temperature = temperature
    try:
        results = policy.model.generate_batch(
            inputs,
            generation_config=settings,
            continuous_batching_config=_paging(policy, inputs),
            warmup=False,
        )
    except Exception as error:  # each backend refuses in its own way
        raise UserError(f"--sampler continuous does not run here: {error}") from error
    failed = [result.error for result in results.values() if result.error is not None]
    if failed or len(results) < len(inputs):
        reason = failed[0] if failed else "transformers logged the reason above"
        done = len(results) - len(failed)
        raise UserError(f"--sampler continuous: {done} of {len(inputs)} completions: {reason}")
    return Completions.from_lists(
        [result.generated_tokens for result in results.values()],
        [result.logprobs for result in results.values()],
        eos_ids=policy.eos_ids,
        pad_id=policy.tokenizer.pad_token_id,
        device=prompts.ids.device,
    )


def _settings(policy, **changes):
    """Nothing but the model's own distribution: left open, top-k would be 50."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=policy.max_new_tokens,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.tokenizer.pad_token_id,
        top_k=0,
        **changes,
    )


@contextlib.contextmanager
def override_generation_config(model, settings) -> Iterator[None]:
    """With these settings alone: `generate` fills what they leave open from the model's files."""
    # peft's generate hands the settings on to the model inside.
    models = {id(each): each for each in (model, getattr(model, "get_base_model", lambda: model)())}
    own = [(each, each.generation_config) for each in models.values()]
    model.generation_config = settings
    try:
        yield
    finally:
        for each, config in own:
            each.generation_config = config


def _paging(policy, inputs: list[list[int]]):
    """A cache for these completions; left to itself transformers takes most of the memory.

    For no more at once than a step has tokens: without flash attention it makes a mask of a step's
    tokens by all that the cache has room for, which were 4 GiB of 2,000 completions. Others wait.
    """
    from transformers.generation import ContinuousBatchingConfig

    page = 256  # its default, under a name that changes with the version
    step = max(1024, *map(len, inputs))  # tokens
    pages = sorted((-(-(len(row) + policy.max_new_tokens) // page) for row in inputs), reverse=True)
    config = ContinuousBatchingConfig(
        num_blocks=1 + sum(pages[:step]), max_batch_tokens=step, return_logprobs=True
    )
    config.auto_switch_to_flash = False  # flash attention refuses fp32 weights
    return config


SAMPLERS: dict[str, Sampler] = {
    "shared-prompt": shared_prompt,
    "generate": hf_generate,
    "continuous": continuous,
}
