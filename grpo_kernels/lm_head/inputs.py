"""How arguments of the hidden level become those of its operators: checked, packed, unshard."""

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..ops.token_stats import scalar_temperature
from .chunk_loop import LMHeadInputs
from .token_order import TokenPacking, pack_tokens
from .vocab_parallel import gather, local_ids, rank_in

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def prepare_inputs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    entropy: bool,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl: str | None,
    mask: Tensor | None,
    vocab_group: "ProcessGroup | None",
) -> LMHeadInputs:
    """The arguments checked, packed to [N, ...], unshard, and those that are not read left out."""
    checks.check_hidden(hidden)
    autocast = _autocast_dtype(hidden)
    checks.check_head("", hidden, weight, bias, same_dtype=autocast is None)
    checks.check_tokens(tokens, hidden, "hidden")
    checks.expect_mask(mask, tokens.shape)
    checks.check_temperature(temperature, tokens, mask)
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    checks.check_linear_kl(kl, reference)
    if softcap is not None:
        checks.expect_number("softcap", softcap, above=0)
    if vocab_group is not None:
        heads = {"weight": weight, "bias": bias, **reference}
        checks.check_vocab_group(vocab_group, heads)
    weight, bias = unshard(weight), unshard(bias)
    if kl is None:
        ref_hidden = ref_weight = ref_bias = None
    else:
        check_reference(hidden, weight, reference)
        ref_hidden = ref_hidden.detach().flatten(0, -2)
        ref_weight, ref_bias = (
            None if each is None else unshard(each.detach()) for each in (ref_weight, ref_bias)
        )
    N, acc = tokens.numel(), torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(acc)
    else:
        temperature = scalar_temperature(temperature, acc, hidden.device)
    tokens_of_rows, group_name = tokens.to(torch.int64).flatten(), None
    if vocab_group is not None:
        group_name = vocab_group.group_name
        keep = None if mask is None else mask.flatten() != 0
        tokens_of_rows = _local_tokens(tokens_of_rows, keep, weight.shape[0], group_name)
    return LMHeadInputs(
        hidden.flatten(0, -2),
        weight,
        bias,
        tokens_of_rows,
        temperature.expand(tokens.shape).reshape(N),
        ref_hidden,
        ref_weight,
        ref_bias,
        softcap,
        entropy,
        kl,
        hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast,
        group_name,
    )


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def check_reference(hidden: Tensor, weight: Tensor, reference: dict[str, Tensor | None]) -> None:
    """ref_hidden, ref_weight and ref_bias: a whole head, of the tokens and vocabulary of the other.

    Raises:
        ValueError, TypeError: naming which of them, what was expected and what came.
    """
    checks.check_reference_head(hidden, weight, reference)
    same_dtype = _autocast_dtype(hidden) is None
    checks.check_head("ref_", *reference.values(), same_dtype=same_dtype)


@torch.library.custom_op("grpo_kernels::local_tokens", mutates_args=())
def _local_tokens(tokens: Tensor, mask: Tensor | None, rows: int, vocab_group: str) -> Tensor:
    """`local_ids` of tokens [N] in this rank's shard, of that many rows: one small collective."""
    kept = tokens.new_tensor(len(tokens)) if mask is None else (mask != 0).sum()
    mine = torch.stack([tokens.new_tensor(rows), kept])
    sizes, counts = gather(mine, vocab_group).unbind(1)
    checks.check_same_tokens(counts)
    if tokens.device.type == "cpu":
        checks.check_token_ids(tokens, mask, int(sizes.sum()))
    return local_ids(tokens, sizes, rank_in(vocab_group))


@_local_tokens.register_fake
def _(tokens, mask, rows, vocab_group):
    return torch.empty_like(tokens)


def resolve_token_order(
    packing: TokenPacking | None, mask: Tensor | None, tokens: Tensor
) -> TokenPacking:
    """The packing given, or that of the mask; without a mask nothing is waited for."""
    if packing is not None:
        checks.check_packing(packing, mask, tokens)
        return packing
    if mask is not None:
        return pack_tokens(mask)
    N = tokens.numel()
    return TokenPacking(torch.arange(N, device=tokens.device), torch.tensor([N, 0]))


def unshard(weight: Tensor | None) -> Tensor | None:
    """The whole of a DTensor, on every rank; any other tensor as it is.

    The gradient that comes back is the mean over ranks, in the shards of the weight: what FSDP
    makes of ranks that see different data, and what ranks that see the same data have already.
    """
    # A DTensor exists only where its module has been imported, which costs seconds.
    module = sys.modules.get("torch.distributed.tensor")
    if weight is None or module is None or not isinstance(weight, module.DTensor):
        return weight
    return _Gather.apply(weight)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        return weight.full_tensor()

    @staticmethod
    def backward(ctx, gradient):
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        total = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim)
        # Shards first: what replicas of them (HSDP) then have to reduce is a shard, not the whole.
        shards = [each if each.is_shard() else Partial() for each in ctx.placements]
        return total.redistribute(mesh, shards).redistribute(mesh, ctx.placements)
