"""Pack the completions of a group behind one copy of their prompt, in one row.

    prompt prompt prompt | a1 a2 a3 b1 c1 c2 c3 c4 |

The attention mask lets each token attend to the prompt and to its own completion. The positions of
each completion continue those of the prompt. The last token of a completion predicts nothing and is
left out. One pass without a key-value cache scores a row, so activations can be recomputed.

Sizes: B prompts, G completions of each, N = B·G, k completions in a row, R = N / k rows, P prompt
length, T completion length, S completion tokens of the fullest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from reference.training.rollout.generate import Prompts, positions

# Values of Packed.owner. Completions are numbered from 0 in each row.
PADDING, PROMPT = -2, -1

# Attention grows with the square of a row: at 2,048 tokens it takes a seventh of the
# multiplications of a model of 1 B parameters.
ROW_TOKENS = 2048


@dataclass(frozen=True)
class Packed:
    """Rows of a prompt and its completions.

    Attributes:
        ids, positions: [R, P + S], inputs of the model.
        owner: [R, P + S], the number of the completion to which a token belongs, or PROMPT.
        index: [N, T], the place in the row that predicts a token, counted from the last token of
            the prompt; 0 under the mask.
    """

    ids: Tensor
    positions: Tensor
    owner: Tensor
    index: Tensor
    prompt_length: int

    def model_inputs(self) -> dict[str, Any]:
        """Return the model's keyword arguments; it keeps the last prompt token and all after it."""
        one_per_row = len(self.ids) == len(self.index)
        return {
            "input_ids": self.ids,
            "attention_mask": (self.owner >= PROMPT).long() if one_per_row else self.visible(),
            "position_ids": self.positions,
            "use_cache": False,
            "logits_to_keep": self.ids.shape[1] - self.prompt_length + 1,
        }

    def select_predictions(self, outputs: Tensor) -> Tensor:
        """Select, from the model's outputs [R, S + 1, D], those [N, T, D] that predict the tokens.

        Outputs under the mask are arbitrary.
        """
        N, R = len(self.index), len(outputs)
        rows = torch.arange(N, device=outputs.device) // (N // R)
        place = rows[:, None] * outputs.shape[1] + self.index
        # A group shares the output of the last prompt token. On a CPU the gradient of an indexing
        # expression is added up by threads in any order, that of a lookup in the tokens' order.
        return embedding(place, outputs.flatten(0, 1))

    def visible(self) -> Tensor:
        """Compute the mask [R, 1, P + S, P + S], True if a query (row) attends to a key (column).

        Padding attends to padding: a query without any key would become NaN.
        """
        keys, queries = self.owner[:, None, None, :], self.owner[:, None, :, None]
        causal = torch.ones(2 * self.ids.shape[-1:], dtype=torch.bool, device=self.ids.device)
        return causal.tril() & ((keys == PROMPT) | (keys == queries))


def pack_completions(model, prompts: Prompts, tokens: Tensor, mask: Tensor) -> Packed:
    """Pack prompts and their completions into rows as full as the model allows.

    Args:
        prompts: left-padded.
        tokens: [N, T], row b·G + g is a completion of prompt b.
        mask: [N, T], True on completion tokens, with which each row begins.
    """
    (B, P), (N, T) = prompts.ids.shape, tokens.shape
    k = completions_per_row(getattr(model, "module", model), N // B, P, T)  # of DDP: its module
    prompts = prompts[torch.arange(B, device=tokens.device).repeat_interleave(N // (B * k))]
    lengths = (mask.sum(-1) - 1).clamp_min(0).view(-1, k)
    start = (lengths.cumsum(-1) - lengths).flatten()[:, None]
    times = torch.arange(T, device=tokens.device).expand(N, T)
    kept = times < lengths.view(-1, 1)
    number = torch.arange(N, device=tokens.device)[:, None].expand(N, T)
    place = ((number // k)[kept], (start + times)[kept])
    width = int(lengths.sum(-1).max())

    def append(prompt: Tensor, values: Tensor, padding: int) -> Tensor:
        rows = values.new_full((len(prompt), width), padding)
        rows[place] = values[kept]
        return torch.cat([prompt, rows], dim=1)

    continued = prompts.mask.sum(-1).repeat_interleave(k)[:, None] + times
    return Packed(
        ids=append(prompts.ids, tokens, 0),
        positions=append(positions(prompts.mask), continued, 0),
        owner=append(torch.where(prompts.mask, PROMPT, PADDING), number % k, PADDING),
        index=torch.where(mask & (times > 0), start + times, 0),
        prompt_length=P,
    )


def completions_per_row(model, group_size: int, prompt_length: int, completion_length: int) -> int:
    """Choose how many completions share a row; one if the model cannot keep them apart."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    takes_any_mask = (
        config._attn_implementation == "sdpa"  # eager adds its mask, flash attention takes none
        and getattr(model, "_supports_attention_backend", False)
        and not getattr(model, "_is_stateful", False)
        and layers == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
    )
    fitting = [
        k
        for k in range(1, group_size + 1)
        if group_size % k == 0 and prompt_length + k * (completion_length - 1) <= ROW_TOKENS
    ]
    return max(fitting, default=1) if takes_any_mask else 1
