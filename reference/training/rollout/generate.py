"""Sampling of groups of completions.

Prompts are padded on the left, completions on the right. The prompt of a group is computed once:
of the 50 tokens of an arithmetic question and its completion 45 belong to the prompt, so a group of
8 costs 45 + 8·5 tokens and not 8·50. Sampling repeats the prompt's key-value cache; training puts
the completions into one row behind their prompt (see packing).

Sizes: B prompts, G completions per prompt, P prompt length, T completion length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_kernels import TokenSupport
from reference.training.rollout.chat_template import Messages, apply_chat_template
from reference.training.rollout.truncation import Truncation


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: `ids` and `mask`, both [B, P]; the mask is True on real tokens."""

    ids: Tensor
    mask: Tensor

    def __getitem__(self, rows) -> Prompts:
        return Prompts(self.ids[rows], self.mask[rows])


@dataclass(frozen=True)
class Completions:
    """Right-padded completions; row b·G + g belongs to prompt b.

    Attributes:
        tokens: [B·G, T].
        mask: [B·G, T], True up to and including the end-of-sequence token. It is made from
            positions, never from token ids, because many tokenizers pad with that very token.
        logprob: [B·G, T], the sampler's log-probs of its tokens, 0 under the mask. Those of a
            truncated distribution are normalised over the tokens that it kept.
        finished: [B·G], True if the completion has its end-of-sequence token.
        support: the tokens that a truncated distribution kept, one range per entry of `tokens`,
            empty under the mask; None if it was not truncated, or with --no-support.
    """

    tokens: Tensor
    mask: Tensor
    logprob: Tensor
    finished: Tensor
    support: TokenSupport | None = None

    @classmethod
    def from_lists(
        cls,
        tokens: list[list[int]],
        logprobs: list[list[float]],
        policy,
        support: TokenSupport | None = None,
    ) -> Completions:
        """Pad completions for a policy; a finished one includes its end token.

        support: one range per token, completion after completion.
        """
        device = policy.device
        mask = _pad([[True] * len(row) for row in tokens], False, "right").to(device)
        if support is not None:
            support = support.to(device).select(_number_true(mask))
        return cls(
            _pad(tokens, policy.tokenizer.pad_token_id, "right").to(device),
            mask,
            _pad(logprobs, 0.0, "right").to(device),
            torch.tensor([row[-1] in policy.eos_ids for row in tokens], device=device),
            support,
        )

    def __getitem__(self, rows) -> Completions:
        """Select completions."""
        support = self.support
        if support is not None:
            support = support.select(number_tokens(self.tokens)[rows])
        return Completions(
            self.tokens[rows], self.mask[rows], self.logprob[rows], self.finished[rows], support
        )


def encode(
    tokenizer,
    prompts: Sequence[str | Messages],
    device: torch.device | str = "cpu",
    system: str | None = None,
) -> Prompts:
    """Encode prompts with the chat template, padded on the left.

    A text is the user's message. The system prompt comes first, unless a prompt has its own.
    """
    chats = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system is not None and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": system}, *chat]
        chats.append(chat)
    rows = [apply_chat_template(tokenizer, chat) for chat in chats]
    ids = _pad(rows, tokenizer.pad_token_id, "left")
    mask = _pad([[True] * len(row) for row in rows], False, "left")
    return Prompts(ids.to(device), mask.to(device))


def number_tokens(tokens: Tensor) -> Tensor:
    """Number the entries of `tokens` as the ranges of their support are numbered."""
    return torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)


def _number_true(mask: Tensor) -> Tensor:
    """Number the True entries row by row; the others are -1."""
    return torch.where(mask, mask.flatten().cumsum(0).view(mask.shape) - 1, -1)


def _pad(rows: Sequence[Sequence], value: float, side: str) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


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
    truncation: Truncation | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Completions:
    """Sample `group_size` completions per prompt; temperature 0 decodes greedily, untruncated.

    A completion that has ended leaves the batch; sampling stops when all have. T is the length of
    the longest completion. `draw` returns a random number in [0, 1) per completion.
    """
    # Run each prompt once, and repeat its cache and its last logits for the group.
    output = model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        position_ids=positions(prompts.mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache_name = "cache" if "cache" in output.keys() else "past_key_values"  # transformers < 5.24
    cache = getattr(output, cache_name)
    groups = torch.arange(len(prompts.ids), device=prompts.ids.device)
    cache.reorder_cache(groups.repeat_interleave(group_size))
    logits = output.logits[:, -1].repeat_interleave(group_size, dim=0)

    R, device = len(logits), logits.device
    eos = torch.tensor(list(eos_ids), device=device)
    tokens = torch.full((R, max_new_tokens), pad_id, device=device)
    logprob = torch.zeros((R, max_new_tokens), device=device)
    mask = torch.zeros((R, max_new_tokens), dtype=torch.bool, device=device)
    finished = torch.zeros(R, dtype=torch.bool, device=device)
    rows = torch.arange(R, device=device)  # the completions that have not ended
    truncation = None if temperature == 0 else truncation
    supports = []  # of each step, of the completions that had not ended
    draw = draw or partial(torch.rand, R, device=device)
    attention = prompts.mask.repeat_interleave(group_size, dim=0)
    position = attention.sum(-1, keepdim=True)
    for step in range(max_new_tokens):
        # A number is drawn for every row, so no draw depends on which other rows have ended.
        logits = logits.float()
        if truncation is not None:
            logits, support = truncation(logits, temperature)
            supports += [support] if truncation.return_support else []
        token, logprob[rows, step] = _choose(logits, temperature, draw()[rows])
        tokens[rows, step], mask[rows, step] = token, True
        ended = torch.isin(token, eos)
        finished[rows] = ended
        if step == max_new_tokens - 1 or ended.all():
            break
        if ended.any():
            going_on = (~ended).nonzero().flatten()
            rows, token = rows[going_on], token[going_on]
            attention, position = attention[going_on], position[going_on]
            cache.reorder_cache(going_on)
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        output = model(
            input_ids=token[:, None],
            attention_mask=attention.long(),
            position_ids=position + step,
            use_cache=True,
            **{cache_name: cache},
        )
        logits = output.logits[:, -1]
    longest = step + 1
    support = None
    if supports:
        support = TokenSupport.cat(supports).select(_number_true(mask[:, :longest].T).T)
    return Completions(
        tokens[:, :longest], mask[:, :longest], logprob[:, :longest], finished, support
    )


def positions(mask: Tensor) -> Tensor:
    """Number the real tokens of left-padded prompts from 0; padding has position 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def _choose(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Choose one token per row of logits [R, V]; return the tokens and their log-probs.

    The token is the one at which the cumulative distribution passes a number in [0, 1) per row.
    torch.multinomial draws V numbers per row instead, which took a fifth of the sampling time on a
    CPU.
    """
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logprobs.argmax(-1, keepdim=True)
        return token.squeeze(-1), logprobs.gather(-1, token).squeeze(-1)
    probs = (logits / temperature).softmax(-1)
    dtype = torch.float32 if probs.is_mps else torch.float64  # MPS has no fp64
    cumulative = probs.cumsum(-1, dtype=dtype)
    total = cumulative[:, -1:]
    threshold = (uniform[:, None] * total).minimum(torch.nextafter(total, total * 0))
    token = torch.searchsorted(cumulative, threshold, right=True)
    return token.squeeze(-1), probs.gather(-1, token).log().squeeze(-1)
