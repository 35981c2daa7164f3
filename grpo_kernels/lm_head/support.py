"""The LM head of tokens that were drawn among a few ids: only the rows of these ids are multiplied.

Where the supports of a batch have U different ids, logits = hidden @ weight[ids].T are [n, U] and
not [n, V]: every product is U / V of its usual size. In a row, ids that only other tokens have get
logits of -inf.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.row_support import NO_ID
from .inputs import LMHeadInputs
from .vocab_parallel import all_gather

# A token with more ids takes the whole head, so that it does not enlarge that of the others.
LARGEST_SUPPORT = 1024
# The rows are copied, so there must be few of them: V / U is at least this.
SMALLEST_GAIN = 4


class HeadPart(NamedTuple):
    """Some of the tokens, and the rows of the head that they need."""

    inputs: LMHeadInputs  # with the rows `inputs.vocab_ids` of the head; None: all
    token_idx: Tensor  # [n]
    num_with_grad: int  # of the first of them


def split_by_support(
    inputs: LMHeadInputs, token_idx: Tensor, num_with_grad: int, chunk_tokens: int | None
) -> list[HeadPart]:
    """Split the tokens into those of a small union of supports and the others.

    With fixed chunks there is one part with the whole head: the bits of a product may depend on the
    size of the union, and so on the other tokens. With shards of the vocabulary the union is that
    of all ranks, which make the same parts, each with its own rows of them.
    """
    whole = [HeadPart(inputs, token_idx, num_with_grad)]
    sizes = inputs.support_sizes
    if sizes is None or chunk_tokens is not None or len(token_idx) == 0:
        return whole
    own_sizes = sizes[token_idx.cpu()]
    is_small = (own_sizes > 0) & (own_sizes <= LARGEST_SUPPORT)
    if not is_small.any():
        return whole
    places = is_small.nonzero().flatten()
    small = token_idx if len(places) == len(token_idx) else token_idx[places.to(token_idx.device)]
    part = _restrict(inputs, small, own_sizes[places])
    if part is None:
        return whole
    of_small = HeadPart(part, small, int((places < num_with_grad).sum()))
    if len(small) == len(token_idx):
        return [of_small]
    rest = (~is_small).nonzero().flatten()
    others = token_idx[rest.to(token_idx.device)]
    return [HeadPart(inputs, others, int((rest < num_with_grad).sum())), of_small]


def _restrict(inputs: LMHeadInputs, token_idx: Tensor, sizes: Tensor) -> LMHeadInputs | None:
    """Keep the rows of the head that these tokens' supports have; None if they are too many.

    sizes: the numbers of ids of the tokens, on the CPU.
    """
    V, support = len(inputs.weight), inputs.support
    assert support.ids is not None
    _, ids = support.entries(token_idx, sizes)
    is_used = torch.zeros(V + 1, dtype=torch.bool, device=ids.device)
    is_used[torch.where(ids == NO_ID, V, ids)] = True
    vocab_ids = is_used[:V].nonzero().flatten()
    num_used, total = len(vocab_ids), V
    if inputs.vocab_group is not None:  # the ranks choose alike
        own = torch.tensor([num_used, V], device=ids.device)
        num_used, total = all_gather(own, inputs.vocab_group).sum(0).tolist()
    if num_used * SMALLEST_GAIN > total:
        return None
    if len(vocab_ids) == 0:  # a shard without any; a head has at least one row
        vocab_ids = vocab_ids.new_zeros(1)
    place = torch.full((V,), NO_ID, device=ids.device).index_copy_(
        0, vocab_ids, torch.arange(len(vocab_ids), device=ids.device)
    )

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[vocab_ids]

    def places(ids: Tensor) -> Tensor:
        return torch.where(ids < 0, ids, place[ids.clamp(0, V - 1)])

    weight = rows(inputs.weight)
    assert weight is not None
    return inputs._replace(
        weight=weight,
        bias=rows(inputs.bias),
        adapter_b=rows(inputs.adapter_b),
        ref_weight=rows(inputs.ref_weight),
        ref_bias=rows(inputs.ref_bias),
        tokens=places(inputs.tokens),
        vocab_tokens=inputs.tokens if inputs.vocab_tokens is None else inputs.vocab_tokens,
        vocab_ids=vocab_ids,
        support_ids=places(support.ids),
    )


def exclude_others(logits: Tensor, inputs: LMHeadInputs, tokens: Tensor, sizes: Tensor) -> None:
    """Set logits [n, V] outside the supports of tokens [n] to -inf.

    Args:
        tokens: indices of the tokens.
        sizes: their numbers of ids, on the CPU.
    """
    row, ids = inputs.support.entries(tokens, sizes)
    n, V = logits.shape
    stride = logits.stride(0)
    entry = row * stride + ids.clamp_min(0)
    flat = logits.as_strided(((n - 1) * stride + V,), (1,))
    kept = torch.where(ids == NO_ID, -torch.inf, flat[entry])
    has_support = (sizes > 0).to(logits.device, non_blocking=True)
    logits.masked_fill_(has_support.unsqueeze(-1), -torch.inf)
    # The largest of several, because an id that this rank does not have stands in the first entry.
    flat.scatter_reduce_(0, entry, kept, "amax")
