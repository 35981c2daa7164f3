"""Groups of sampled completions, and the states behind them under the policy that trains.

Prompts are padded on the left, completions on the right. A group computes its prompt once: of the
50 tokens of an arithmetic question and its answer 45 belong to the prompt, so that a group of 8
costs 45 + 8·5 tokens and not 8·50. In sampling the prompt's key-value cache is repeated; in
training the completions stand in one row behind their prompt (see packing).

Sizes: B prompts, G completions per prompt, P prompt length, T completion length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reference.training.errors import UserError
from reference.training.rollout.chat_template import token_ids


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

    @classmethod
    def from_lists(
        cls,
        tokens: list[list[int]],
        logprobs: list[list[float]],
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        device: torch.device,
    ) -> Completions:
        """Completions as other engines give them: each with its end token, where it has ended."""
        longest = max(map(len, tokens))

        def padded(rows: list[list], padding: float) -> Tensor:
            return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])

        return cls(
            padded(tokens, pad_id).to(device),
            padded([[True] * len(row) for row in tokens], False).to(device),
            padded(logprobs, 0.0).to(device),
            torch.tensor([row[-1] in eos_ids for row in tokens], device=device),
        )


def encode(
    tokenizer,
    questions: Sequence[str],
    device: torch.device | str = "cpu",
    system: str | None = None,
) -> Prompts:
    """The questions through the chat template, behind the system prompt, padded on the left."""
    first = [] if system is None else [{"role": "system", "content": system}]
    chats = [[*first, {"role": "user", "content": question}] for question in questions]
    return encode_messages(tokenizer, chats, device)


def encode_messages(
    tokenizer, chats: Sequence[list[dict[str, str]]], device: torch.device | str = "cpu"
) -> Prompts:
    """Conversations, as `token_ids` takes them, padded on the left."""
    rows = [token_ids(tokenizer, chat) for chat in chats]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Prompts(ids, mask.to(device))


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
    draw: Callable[[], Tensor] | None = None,
) -> Completions:
    """Sample `group_size` completions per prompt; temperature 0 decodes greedily.

    A completion that has ended leaves the batch. Stops as soon as every one has. Returns
    completions as long as the longest of them.

    Args:
        draw: gives a random number of [0, 1) per completion; None: torch.rand.
    """
    logits, cache = _prefill(model, prompts, group_size)
    R, device = len(logits), logits.device
    eos = torch.tensor(list(eos_ids), device=device)
    tokens = torch.full((R, max_new_tokens), pad_id, device=device)
    logprob = torch.zeros((R, max_new_tokens), device=device)
    mask = torch.zeros((R, max_new_tokens), dtype=torch.bool, device=device)
    finished = torch.zeros(R, dtype=torch.bool, device=device)
    rows = torch.arange(R, device=device)  # those that have not ended
    draw = draw or partial(torch.rand, R, device=device)
    attention = prompts.mask.repeat_interleave(group_size, dim=0)
    position = attention.sum(-1, keepdim=True)
    for step in range(max_new_tokens):
        # Drawn for all rows, so that the draw of one does not depend on which others have ended.
        token, logprob[rows, step] = _choose(logits.float(), temperature, draw()[rows])
        tokens[rows, step], mask[rows, step] = token, True
        ended = torch.isin(token, eos)
        finished[rows] = ended
        if step == max_new_tokens - 1 or ended.all():
            break
        if ended.any():
            kept = (~ended).nonzero().flatten()
            rows, token, attention, position = (x[kept] for x in (rows, token, attention, position))
            cache.batch_select_indices(kept)
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        output = model(
            input_ids=token[:, None],
            attention_mask=attention.long(),
            position_ids=position + step,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    longest = step + 1
    return Completions(tokens[:, :longest], mask[:, :longest], logprob[:, :longest], finished)


def _prefill(model, prompts: Prompts, copies: int):
    """Run the prompts once: the logits after each and the cache, `copies` times."""
    output = model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        position_ids=_positions(prompts.mask),
        use_cache=True,
        logits_to_keep=1,
    )
    try:
        cache = output.past_key_values
        cache.batch_repeat_interleave(copies)
    except (AttributeError, NotImplementedError):  # recurrent states, where a model has them
        name = type(model).__name__
        raise UserError(
            f"the cache of {name} cannot be repeated for a group: take --sampler generate"
        ) from None
    return output.logits[:, -1].repeat_interleave(copies, dim=0), cache


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def _choose(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of logits [R, V] and its log-prob, by a number of [0, 1) per row.

    The token where the cumulative distribution passes that number: torch.multinomial draws V
    numbers per row instead, which took a fifth of the sampling time on a CPU.
    """
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logprobs.argmax(-1, keepdim=True)
        return token.squeeze(-1), logprobs.gather(-1, token).squeeze(-1)
    probs = (logits / temperature).softmax(-1)
    # MPS has no fp64
    cumulative = probs.cumsum(-1, dtype=torch.float32 if probs.is_mps else torch.float64)
    total = cumulative[:, -1:]
    threshold = (uniform[:, None] * total).minimum(torch.nextafter(total, total * 0))
    token = torch.searchsorted(cumulative, threshold, right=True)
    return token.squeeze(-1), probs.gather(-1, token).log().squeeze(-1)
