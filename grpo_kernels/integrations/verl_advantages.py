"""Advantage estimators with the signature that verl calls, for groups of any sizes.

verl gives each completion the uid of its prompt (`index`); groups may differ in size. A completion
that is alone in its group keeps its reward, as in verl.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..advantages import (
    ADVANTAGES,
    centred_advantage,
    length_weighted_advantage,
    reinforce_plus_plus_advantage,
)

Estimator = Callable[..., tuple[Tensor, Tensor]]


def by_group(function: Callable[..., Tensor], index: Any, *values: Tensor) -> Tensor:
    """Apply an advantage of [B, G] rewards to completions [N] whose groups differ in size.

    Args:
        function: takes the values as [B, G] each; a completion that is alone keeps the first.
        index: [N], the group of each completion: strings or numbers.
        values: [N] each, the first are the rewards.
    """
    rows_of_group = defaultdict(list)
    for row, group in enumerate(index.tolist() if hasattr(index, "tolist") else index):
        rows_of_group[group].append(row)
    groups_of_size = defaultdict(list)
    for rows in rows_of_group.values():
        groups_of_size[len(rows)].append(rows)
    result = values[0].detach().clone()
    for size, groups in groups_of_size.items():
        if size > 1:
            rows = torch.tensor(groups, device=result.device)
            result[rows] = function(*(x[rows] for x in values)).to(result.dtype)
    return result


def outcome_estimator(function: Callable[[Tensor], Tensor]) -> Estimator:
    """Make an estimator of a function of the rewards [B, G]; a reward is the sum of its tokens'."""

    def estimate(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, **unread: Any
    ) -> tuple[Tensor, Tensor]:
        advantages = by_group(function, index, token_level_rewards.sum(-1))
        return _spread(advantages, response_mask)

    return estimate


def opo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, **unread: Any
) -> tuple[Tensor, Tensor]:
    """Compute `length_weighted_advantage` with verl's arguments."""
    rewards, lengths = token_level_rewards.sum(-1), response_mask.sum(-1)
    advantages = by_group(length_weighted_advantage, index, rewards, lengths)
    return _spread(advantages, response_mask)


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any, **unread: Any
) -> tuple[Tensor, Tensor]:
    """Normalise the return of each token, discounted by config.gamma, over all tokens.

    Masked tokens within a completion, such as those of a tool, are skipped: they do not discount.
    """
    rewards = token_level_rewards.detach()
    mask = response_mask.to(rewards.dtype)
    returns, later = torch.zeros_like(rewards), torch.zeros_like(mask[:, 0])
    for token in reversed(range(mask.shape[1])):
        keep, here = mask[:, token], rewards[:, token] + config.gamma * later
        returns[:, token] = here * keep
        later = torch.where(keep > 0, here, later)
    return _whiten(returns, mask), returns


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, **unread: Any
) -> tuple[Tensor, Tensor]:
    """Subtract the mean of the group from each reward, then normalise over all tokens."""
    centred = by_group(centred_advantage, index, token_level_rewards.sum(-1))
    tokens, _ = _spread(centred, response_mask)
    advantages = _whiten(tokens, response_mask)
    return advantages, advantages


ESTIMATORS: dict[str, Estimator] = {
    **{name: outcome_estimator(ADVANTAGES[name]) for name in ADVANTAGES if name != "batch"},
    "opo": opo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}


def _spread(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, which are the same, of every token of a completion."""
    tokens = advantages.unsqueeze(-1) * response_mask
    return tokens, tokens


def _whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Normalise the values of the unmasked tokens."""
    flat = reinforce_plus_plus_advantage(
        values.reshape(1, -1), mask.reshape(1, -1).to(values.dtype)
    )
    return flat.view_as(values) * mask
