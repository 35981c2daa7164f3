"""Groups of sampled completions, and the states behind them under the policy that trains.

Prompts are padded on the left, completions on the right. The prompt of a group is run through the
model once and its key-value cache repeated for the group's completions, in sampling and in training
alike: of the 50 tokens of an arithmetic question and its answer, 45 belong to the prompt, so that a
group of 8 costs 45 + 8·5 tokens and not 8·50. The gradient flows through the repeated cache.

Sizes: B prompts, G completions per prompt, P prompt length, T completion length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference import causal_lm


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: `ids` and `mask`, both [B, P]; the mask is True on real tokens."""

    ids: Tensor
    mask: Tensor

    def __getitem__(self, rows) -> Prompts:
        return Prompts(self.ids[rows], self.mask[rows])


@dataclass(frozen=True)
class Completions:
    """Right-padded completions, prompt after prompt: row b·G + g answers prompt b.

    `mask` [B·G, T] is True up to and including the end-of-sequence token. It is made from
    positions, never from token ids, because many tokenizers pad with that very token. `logprob`
    [B·G, T] is what the sampler assigned to its tokens, 0 under the mask.
    """

    tokens: Tensor
    mask: Tensor
    logprob: Tensor
    finished: Tensor  # [B·G], True where the completion ended by itself


def encode(tokenizer, questions: Sequence[str], device: torch.device | str = "cpu") -> Prompts:
    """The questions through the chat template, padded on the left."""
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Prompts(ids, mask.to(device))


def _prefill(run: Callable, prompts: Prompts, copies: int):
    """Run the prompts once: the state after each, repeated `copies` times, the head, the cache."""
    positions = (prompts.mask.long().cumsum(-1) - 1).clamp_min(0)
    states, head, output = run(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(copies)
    return states[:, -1].repeat_interleave(copies, dim=0), head, cache


@torch.no_grad()
def generate(
    model,
    prompts: Prompts,
    *,
    group_size: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
) -> Completions:
    """Sample `group_size` completions per prompt; temperature 0 decodes greedily.

    Stops as soon as every completion has ended. Returns completions as long as the longest of them.
    """
    logits, _, cache = _prefill(partial(causal_lm.forward, model), prompts, group_size)
    eos = torch.tensor(list(eos_ids), device=logits.device)
    attention = prompts.mask.repeat_interleave(group_size, dim=0)
    position = attention.sum(-1, keepdim=True)
    alive = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    tokens, masks, logprobs = [], [], []
    for step in range(max_new_tokens):
        token, logprob = _choose(logits.float(), temperature)
        tokens.append(torch.where(alive, token, pad_id))
        masks.append(alive)
        logprobs.append(torch.where(alive, logprob, 0.0))
        alive = alive & ~torch.isin(token, eos)
        if step == max_new_tokens - 1 or not alive.any():
            break
        attention = torch.cat([attention, masks[-1][:, None]], dim=1)
        output = model(
            input_ids=tokens[-1][:, None],
            attention_mask=attention.long(),
            position_ids=position + step,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    stacked = (torch.stack(columns, dim=1) for columns in (tokens, masks, logprobs))
    return Completions(*stacked, finished=~alive)


def _choose(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row of logits [R, V] and its log-prob."""
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logprobs.argmax(-1)
    else:
        logprobs = (logits / temperature).log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1).squeeze(-1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1)


def completion_states(
    forward: Callable, model, prompts: Prompts, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Any]:
    """The states [B·G, T, ...] from which each completion token was drawn, and the head over them.

    Args:
        forward: of a causal_lm module, which runs the model but for its head.
        prompts: B left-padded prompts.
        tokens: [B·G, T] completions, row b·G + g of prompt b.
        mask: [B·G, T] True on completion tokens.
    """
    copies = len(tokens) // len(prompts.ids)
    run = partial(forward, model)
    first, head, cache = _prefill(run, prompts, copies)
    if tokens.shape[1] == 1:
        return first[:, None], head
    attention = prompts.mask.repeat_interleave(copies, dim=0)
    positions = attention.sum(-1, keepdim=True) + torch.arange(
        tokens.shape[1] - 1, device=mask.device
    )
    rest, _, _ = run(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([attention, mask[:, :-1]], dim=1).long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first[:, None], rest], dim=1), head
