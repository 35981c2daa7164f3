"""`pack_tokens`: which tokens count, on the host, before a hidden-level loss needs to know."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..objective.sequences import spread_to_tokens


class TokenPacking(NamedTuple):
    """The tokens of a batch in the order in which the hidden level works on them.

    `order` [N], int64: flat indices of the tokens with a learning signal, then of the others that
    count, then of the masked ones. `counts` [2], int64, on the CPU: of the first two kinds.
    """

    order: Tensor
    counts: Tensor


@torch.library.custom_op("grpo_kernels::pack_tokens", mutates_args=())
def _pack(active: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    live = live & active
    key = torch.where(active, 1, 2).sub_(live.int()).to(torch.uint8)
    order = key.sort(stable=True).indices
    live_count = live.sum()
    # The one place where the hidden level waits for a GPU.
    return order, torch.stack((live_count, active.sum() - live_count)).cpu()


@_pack.register_fake
def _(active, live):
    return active.new_empty(active.shape, dtype=torch.int64), torch.empty(2, dtype=torch.int64)


def pack_tokens(
    mask: Tensor, advantages: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> TokenPacking:
    """Find the tokens that count, so that masked ones are in no matrix product.

    It waits for the device once, to learn how many there are. `linear_token_stats` and
    `linear_grpo_loss` call it themselves; called early, with the result passed as `packing`, it
    keeps them from waiting.

    Args:
        mask: [B, T] or packed [N], bool or 0/1, the mask that the loss gets.
        advantages: the advantages that the loss gets, [B], [B, T], [N] or, with `cu_seqlens`,
            [sequences]. Tokens of advantage 0 then have no gradient computed by a loss in which
            nothing else moves them: neither a KL, a bonus or a penalty, nor the rest of their
            sequence.

    Returns:
        TokenPacking(order [B·T] or [N], counts [2]).

    Raises:
        ValueError, TypeError: a shape or dtype is wrong.
    """
    checks.expect_mask(mask, mask.shape if isinstance(mask, Tensor) else torch.Size())
    active = mask.bool().flatten()
    if advantages is None:
        return TokenPacking(*_pack(active, active))
    checks.check_advantages(advantages, mask.shape, cu_seqlens)
    spread = spread_to_tokens(advantages.detach(), mask.shape, cu_seqlens)
    return TokenPacking(*_pack(active, (spread != 0).flatten()))
