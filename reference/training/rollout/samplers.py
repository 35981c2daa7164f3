"""Samplers: the loop of `generate`, two engines of transformers, vLLM, or a server.

The settings of a model's generation_config.json are not followed: a repetition penalty would make
sampler and trainer two policies. A sampler returns its own log-probs and, of a truncated
distribution, the tokens that it kept, over which the loss then normalises. Engines that sum in
another order or precision differ from the trainer; the metric sampling/sampling_logp_difference
shows by how much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels import TokenSupport
from reference.training.config import SamplingSettings, parse_options
from reference.training.errors import UserError
from reference.training.rollout.generate import Completions, Prompts, generate, number_tokens
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.truncation import Truncation
from reference.training.rollout.vllm_client import ServerSampler
from reference.training.rollout.vllm_engine import VLLMEngine

VLLM = "vllm"


def pick_sampler(settings: SamplingSettings) -> Sampler:
    """Make the sampler that --sampler names: one of SAMPLERS, vllm, or a server's URL."""
    name = settings.sampler
    if settings.async_rollout and name in SAMPLERS and not SAMPLERS[name].has_own_weights:
        raise UserError(
            f"--async-rollout samples while the policy trains, and --sampler {name} samples from "
            "the model that trains: take --sampler vllm or a server"
        )
    if settings.max_sampler_difference is not None and name in SAMPLERS:
        if not SAMPLERS[name].has_own_weights:
            raise UserError(
                f"--max-sampler-difference: --sampler {name} samples from the model that trains, "
                "and is not compared with it"
            )
    if name == VLLM:
        return VLLMEngine(
            settings.vllm_memory, parse_options("--vllm-options", settings.vllm_options)
        )
    if settings.names_server:
        return ServerSampler(settings)
    if name not in SAMPLERS:
        known = ", ".join([*SAMPLERS, VLLM])
        raise UserError(
            f"--sampler must be {known}, or the http:// or https:// URL of a server; got {name!r}"
        )
    return SAMPLERS[name]()


class SharedPrompt(Sampler):
    """The loop of `generate`, which computes the prompt of a group once."""

    def sample(self, policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
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
                truncation=policy.truncation,
                draw=draw,
            )


class Generate(Sampler):
    """`model.generate` of transformers, for models whose cache cannot be repeated too."""

    def sample(self, policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
        from transformers import LogitsProcessorList

        rows = prompts[torch.arange(len(prompts.ids)).repeat_interleave(group_size)]
        recorder = Recorder(temperature, policy.truncation)
        settings = generation_config(policy, do_sample=temperature > 0)
        with policy.autocast(), override_generation_config(policy.model, settings):
            ids = policy.model.generate(
                rows.ids,
                attention_mask=rows.mask.long(),
                logits_processor=LogitsProcessorList([recorder]),
            )
        tokens = ids[:, prompts.ids.shape[1] :]
        recorder.record(ids)
        logprob = torch.cat(recorder.logprobs, dim=1)
        ends = torch.isin(tokens, torch.tensor(policy.eos_ids, device=tokens.device))
        # After its first end token a row is padding, whichever token pads it.
        mask = ends.long().cumsum(-1) - ends.long() == 0
        support = None
        if recorder.supports:  # one step after another, each of all rows
            number = number_tokens(tokens.T).T.where(mask, -1)
            support = TokenSupport.cat(recorder.supports).select(number)
        return Completions(tokens, mask, logprob.where(mask, 0.0), ends.any(-1), support)


class Recorder:
    """A logits processor that applies temperature and truncation, and records what is drawn.

    `generate` can return the scores of all steps instead: T times the vocabulary per completion.

    Attributes:
        logprobs: [R, 1] of each step, those of the drawn tokens.
        supports: of each step, if the truncation returns them.
    """

    def __init__(self, temperature: float, truncation: Truncation | None) -> None:
        self.temperature = temperature or 1.0  # 0 is greedy and scored at 1
        self.truncation = truncation if temperature > 0 else None
        self.logprobs: list[Tensor] = []
        self.supports: list[TokenSupport] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.record(input_ids)
        scores = scores.float()
        if self.truncation is not None:
            scores, support = self.truncation(scores, self.temperature)
            self.supports += [support] if self.truncation.return_support else []
        self.last = (scores / self.temperature).log_softmax(-1)
        return self.last

    def record(self, input_ids: Tensor) -> None:
        """Record the log-probs of the last tokens, if they were drawn."""
        if self.last is not None:
            self.logprobs.append(self.last.gather(-1, input_ids[:, -1:]))


class Continuous(Sampler):
    """`model.generate_batch` of transformers: continuous batching.

    It runs in another thread, where autocast has no effect: the model computes in the dtype of its
    weights. Top-k and top-p are those of transformers, which returns no tokens that it kept.
    """

    def sample(self, policy, prompts: Prompts, group_size: int, temperature: float) -> Completions:
        if not hasattr(policy.model, "generate_batch"):
            raise UserError(
                f"--sampler continuous: {type(policy.model).__name__} has no generate_batch in "
                "this version of transformers"
            )
        rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
        inputs = [row for row in rows for _ in range(group_size)]
        settings = generation_config(policy, do_sample=temperature > 0)
        if temperature > 0:
            settings.temperature = temperature
            if policy.truncation is not None:
                settings.top_k, settings.top_p = policy.truncation.top_k, policy.truncation.top_p
        from transformers.generation import ContinuousBatchingConfig

        # By default the cache takes most of the memory. Here it holds as many completions as a
        # step has tokens; others wait. Without flash attention the mask of a step is its tokens
        # times the space of the cache, which would be 4 GiB for 2,000 completions.
        page = 256  # the default, under a name that changes with the version
        step = max(1024, *map(len, inputs))  # tokens
        lengths = (len(row) + policy.max_new_tokens for row in inputs)
        pages = sorted((-(-length // page) for length in lengths), reverse=True)
        batching = ContinuousBatchingConfig(
            num_blocks=1 + sum(pages[:step]), max_batch_tokens=step, return_logprobs=True
        )
        batching.auto_switch_to_flash = False  # flash attention refuses fp32 weights
        try:
            results = policy.model.generate_batch(
                inputs,
                generation_config=settings,
                continuous_batching_config=batching,
                warmup=False,
            )
        except Exception as error:  # each backend raises its own type
            raise UserError(f"--sampler continuous does not run here: {error}") from error
        failed = [result.error for result in results.values() if result.error is not None]
        if failed or len(results) < len(inputs):
            reason = failed[0] if failed else "transformers logged the reason above"
            done = len(results) - len(failed)
            raise UserError(f"--sampler continuous: {done} of {len(inputs)} completions: {reason}")
        return Completions.from_lists(
            [result.generated_tokens for result in results.values()],
            [result.logprobs for result in results.values()],
            policy,
        )


def generation_config(policy, **options):
    """Make a config that truncates nothing; by default top-k would be 50."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=policy.max_new_tokens,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.tokenizer.pad_token_id,
        top_k=0,
        **options,
    )


@contextlib.contextmanager
def override_generation_config(model, settings) -> Iterator[None]:
    """Replace the model's generation config, from which `generate` takes unset options."""
    # peft's generate passes the config on to the base model.
    base = getattr(model, "get_base_model", lambda: model)()
    before = [(owner, owner.generation_config) for owner in (model, base)]
    model.generation_config = settings
    try:
        yield
    finally:
        for owner, config in before:
            owner.generation_config = config


SAMPLERS: dict[str, type[Sampler]] = {
    "shared-prompt": SharedPrompt,
    "generate": Generate,
    "continuous": Continuous,
}
