"""Checks of a loaded model on a few tokens: its sampler, its positions and its chat template.

Samplers and the trainer must agree on the log-probs of a completion. Not every model can do what
they ask of it: some read padding as text, and some keep a state that cannot be repeated for a
group. A table of model families would never be complete, so the model itself is tried.

Sizes: B prompts, G completions per prompt, T tokens per completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels.integrations.transformers import unwrap
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError, one_line
from reference.training.guards import is_out_of_memory
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.packing import pack_completions
from reference.training.rollout.samplers import Sampler, hf_generate, shared_prompt
from reference.training.tasks.questions import Question

PROMPT_LENGTHS, G, T = (3, 6), 2, 3
# A share of the difference between the log-probs of two prompts. Rounding is below 0.001 of it, a
# wrong mask or state above 0.1.
TOLERANCE = 0.02


def choose_sampler(policy) -> Sampler:
    """Return the policy's sampler, or `generate` if shared-prompt does not fit the model.

    It is a UserError if the log-probs of the trainer, or of either sampler, are not those that the
    model gives to a sequence alone.
    """
    name = type(unwrap(policy.model)).__name__
    policy, ranks = replace(policy, precision="off", ranks=SINGLE_PROCESS), policy.ranks
    policy = replace(policy, max_new_tokens=T)
    prompts, tokens = _random_tokens(policy)
    device = prompts.ids.device
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(0)
        if problem := _problem(partial(_score_packed, policy, prompts, tokens), policy, prompts):
            raise UserError(f"{name} cannot be trained here: {problem}")
        problems = {}
        for sampler in dict.fromkeys((policy.sampler, hf_generate)):
            if sampler not in (shared_prompt, hf_generate):  # it was asked for, and raises itself
                return sampler
            problem = _problem(partial(sampler, policy, prompts, G, 1.0), policy, prompts)
            if problem is None:
                break
            problems[sampler] = problem
        else:
            raise UserError(f"{name} cannot be sampled here: {problems[hf_generate]}")
    if problems:
        ranks.check_settings(ranks.size, "generate")
        reason = problems[shared_prompt]
        print(f"--sampler generate: {name} cannot share the prompt of a group: {reason}")
    return sampler


def _random_tokens(policy) -> tuple[Prompts, Tensor]:
    """Draw left-padded prompts and completions [B·G, T] from the tokens that are not special."""
    special = {*policy.tokenizer.all_special_ids, *policy.eos_ids}
    usable = torch.tensor(sorted({*policy.tokenizer.get_vocab().values()} - special))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return usable[torch.randint(len(usable), shape, generator=generator)]

    B, P = len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)
    mask = torch.arange(P) >= P - torch.tensor(PROMPT_LENGTHS)[:, None]
    ids = torch.where(mask, draw(B, P), policy.tokenizer.pad_token_id)
    return Prompts(ids.to(policy.device), mask.to(policy.device)), draw(B * G, T).to(policy.device)


def _score_packed(policy, prompts: Prompts, tokens: Tensor) -> Completions:
    """Compute the log-probs of tokens as the trainer does."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    packed = pack_completions(policy.model, prompts, tokens, mask)
    logits = packed.select_predictions(policy.model(**packed.model_inputs()).logits)
    return Completions(tokens, mask, _logprobs(logits, tokens), mask[:, 0])


def _problem(sample: Callable[[], Completions], policy, prompts: Prompts) -> str | None:
    """Say what is wrong with the log-probs of the completions from `sample`, if anything."""
    try:
        completions = sample()
    except Exception as error:  # each model and cache raises its own type
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {one_line(error)}"
    expected, last = [], []
    for b, (ids, mask) in enumerate(zip(prompts.ids, prompts.mask, strict=True)):
        tokens = completions.tokens[b * G : (b + 1) * G]
        rows = torch.cat([ids[mask].expand(G, -1), tokens], dim=1)
        logits = policy.model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
        logits = logits[:, -1 - tokens.shape[1] : -1].float()
        expected.append(_logprobs(logits, tokens))
        last.append(logits[0, 0].log_softmax(-1))
    expected, mask = torch.cat(expected), completions.mask
    if expected[mask].isnan().any():
        return "its log-probs are NaN"
    scale = (last[0] - last[1]).nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    error = (completions.logprob - expected)[mask].abs().max().item()
    if error <= TOLERANCE * scale:
        return None
    return (
        f"beside padding and other completions, a log-prob differs by {error:.2g} from that of the "
        f"sequence alone; between two prompts it differs by {scale:.2g}"
    )


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def learned_positions(model: Any) -> int | None:
    """Return the largest number of tokens of a model with a table of positions, else None."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tables = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    ]
    # GPT-J and CTRL do not learn theirs, but it ends all the same.
    names = ("embed_positions", "pos_encoding")
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith(names)]
    is_table = (0 <= len(table) - limit <= 2 for table in tables)  # OPT has two rows more
    return limit if any(is_table) else None


def check_questions(policy, questions: Sequence[Question]) -> None:
    """Encode the first and the longest question: errors of the template come before step 1.

    Print a warning if a completion of the longest may exceed the positions of the model's training.
    """
    if not questions:
        return
    longest = max(questions, key=lambda question: sum(len(m["content"]) for m in question.messages))
    prompts = policy.encode([questions[0].prompt, longest.prompt])
    length = int(prompts.mask.sum(-1).max())
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + policy.max_new_tokens > limit:
        print(
            f"warning: a prompt of {length} tokens and --max-new-tokens {policy.max_new_tokens} "
            f"exceed the {limit} positions (max_position_embeddings) that the model was made for"
        )
