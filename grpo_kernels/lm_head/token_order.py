"""Order of the tokens at the hidden level: which tokens count, known on the host in advance."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..objective.sequences import check_advantages, spread_to_tokens
from ..validation import expect_mask, expect_tensor, suggest_keywords, values_are_readable


class TokenPacking(NamedTuple):
    """The tokens of a batch in the order in which the hidden level works on them.

    order: [N], int64; flat indices of the tokens that count and may have a gradient, then of
        those that count and have none, then of the masked ones.
    counts: [2], int64, on the CPU; how many tokens are of the first and of the second kind.
    """

    order: Tensor
    counts: Tensor


@torch.library.custom_op(add_op_namespace_prefix("pack_tokens"), mutates_args=())
def _pack(counted: Tensor, with_grad: Tensor) -> tuple[Tensor, Tensor]:
    with_grad = with_grad & counted
    key = torch.where(counted, 1, 2).sub_(with_grad.int()).to(torch.uint8)
    order = key.sort(stable=True).indices
    num_active = with_grad.sum()
    # The one place where the hidden level waits for a GPU.
    return order, torch.stack((num_active, counted.sum() - num_active)).cpu()


@_pack.register_fake
def _(counted: Tensor, with_grad: Tensor) -> tuple[Tensor, Tensor]:
    order = counted.new_empty(counted.shape, dtype=torch.int64)
    return order, torch.empty(2, dtype=torch.int64)


@suggest_keywords
def pack_tokens(
    mask: Tensor, advantages: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> TokenPacking:
    """Find the tokens that count, so that masked ones are in no matrix product.

    It waits for the device once, to learn how many there are. `linear_token_stats` and
    `linear_grpo_loss` call it themselves. Called early, with the result passed as `packing`, it
    keeps them from waiting.

    Args:
        mask: [B, T] or packed [N], bool or 0/1, the loss mask.
        advantages: the advantages of the loss, [B], [B, T], [N] or, with `cu_seqlens`,
            [sequences]. No gradient is then computed for tokens of advantage 0, if nothing else in
            the loss gives them one: a KL, a bonus, a penalty, or the rest of their sequence.

    Returns:
        TokenPacking(order [B·T] or [N], counts [2]).

    Raises:
        ValueError, TypeError: a shape or dtype is wrong.
    """
    expect_tensor("mask", mask)
    expect_mask(mask, mask)
    counted = mask.bool().flatten()
    if advantages is None:
        return TokenPacking(*_pack(counted, counted))
    check_advantages(advantages, mask, cu_seqlens)
    spread = spread_to_tokens(advantages.detach(), mask.shape, cu_seqlens)
    return TokenPacking(*_pack(counted, (spread != 0).flatten()))


def resolve_token_order(
    packing: TokenPacking | None, mask: Tensor | None, tokens: Tensor
) -> TokenPacking:
    """Check the given packing, or make that of the mask; without a mask nothing waits."""
    if packing is not None:
        check_packing(packing, mask, tokens)
        return packing
    if mask is not None:
        return pack_tokens(mask)
    N = tokens.numel()
    return TokenPacking(torch.arange(N, device=tokens.device), torch.tensor([N, 0]))


def check_packing(
    packing: TokenPacking, mask: Tensor | None, tokens: Tensor, advantage: Tensor | None = None
) -> None:
    """Check that the packing was made of this mask and, if given, of this advantage per token."""
    if not isinstance(packing, TokenPacking):
        raise TypeError(
            f"packing must be a TokenPacking of pack_tokens(), got {type(packing).__name__}"
        )
    order, counts = packing
    if order.shape != (tokens.numel(),):
        raise ValueError(
            f"packing must be of a mask of {tokens.numel()} tokens, got one of {order.shape[0]}"
        )
    expect_tensor("packing", order, device_of=tokens)
    if not values_are_readable(tokens):
        return
    counted = torch.zeros(tokens.numel(), dtype=torch.bool)
    counted[order[: counts.sum()]] = True
    expected = torch.ones_like(counted) if mask is None else mask.flatten() != 0
    if not counted.equal(expected):
        raise ValueError("packing must be pack_tokens of the same mask, got that of another")
    without_grad = order[counts[0] : counts.sum()]
    if advantage is not None and advantage.flatten()[without_grad].any():
        raise ValueError("packing must be pack_tokens of the same advantages, got that of others")
