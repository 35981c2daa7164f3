"""Seeded sampling supports, and which entries they keep."""

import torch

from grpo_kernels import TokenSupport
from tests.helpers.tensors import generator


def make_support(seed, tokens, V, sizes=None):
    """The token and other ids in any order, on the CPU.

    sizes: number of ids of each token, repeated as often as needed, at most V; 0: none, the whole
    vocabulary. None: at random, and none for a fourth of the tokens.
    """
    random, ids = generator(seed), []
    for n, token in enumerate(tokens.flatten().tolist()):
        if sizes is not None:
            size = min(sizes[n % len(sizes)], V)
        else:
            size = int(torch.randint(1, V + 1, (), generator=random))
            size *= int(torch.rand((), generator=random) < 0.75)
        order = torch.randperm(V, generator=random)
        own = torch.cat([torch.tensor([token]), order[order != token]])[:size]
        ids.append(own[torch.randperm(size, generator=random)])
    return TokenSupport.from_lists(ids)


def lists_of_ids(support):
    """The ids of each token."""
    return list(support.token_ids.split(support.lengths.tolist()))


def with_wrong_ids(support, mask):
    """Give each masked token ids out of range, an id twice, and ids without the token."""
    ids = zip(lists_of_ids(support), mask.flatten().tolist(), strict=True)
    wrong = torch.tensor([-1, 10**6, 3, 3])
    return TokenSupport.from_lists([own if keep else wrong for own, keep in ids])


def kept_entries(support, tokens, V):
    """Dense mask of the ids of each token, [*tokens.shape, V]."""
    kept = torch.zeros(tokens.numel(), V, dtype=torch.bool)
    for row, ids in zip(kept, lists_of_ids(support), strict=True):
        row[ids if len(ids) else slice(None)] = True
    return kept.view(*tokens.shape, V).to(tokens.device)
