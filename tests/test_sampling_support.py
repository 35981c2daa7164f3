"""The tokens that top-k, top-p and min-p keep, against the rules applied token by token."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import TokenSupport, sampling_support, support_from_logits
from tests.helpers.tensors import normal

INF = torch.inf


def ids(support):
    ends = support.offsets.tolist()
    return [support.token_ids[a:b].tolist() for a, b in itertools.pairwise(ends)]


def kept_by_the_rules(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    """Return the ids that one row keeps: each rule is one sentence of the documentation."""
    p = (logits.double() / temperature).softmax(-1)
    kept = [i for i in range(len(p)) if p[i] > 0 and p[i] >= min_p * p.max()]
    if top_k:
        least = sorted((logits[i] for i in kept), reverse=True)[:top_k][-1]
        kept = [i for i in kept if logits[i] >= least]
    by_p, total, removed = sorted(kept, key=lambda i: (p[i], i)), sum(p[i] for i in kept), 0.0
    while top_p < 1 and len(by_p) > 1 and (removed + p[by_p[0]]) / total <= 1 - top_p:
        removed += p[by_p.pop(0)]
    return sorted(by_p)


RULES = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 40},
    {"top_p": 1e-6},
    {"top_p": 0.8},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.7},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 1.7},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_kept_ids_follow_the_rules(rules, dtype, device, monkeypatch):
    monkeypatch.setattr(sampling_support, "BLOCK_ENTRIES", 100)  # two rows
    logits = normal(0, 5, 41, std=2.0)
    logits[1:3, ::3] = -INF
    logits[4, 5:] = -INF
    logits = logits.to(dtype)  # in bf16 there are ties
    expected = [kept_by_the_rules(row, **rules) for row in logits]
    support = support_from_logits(logits.to(device), **rules)
    assert ids(support) == [row if len(row) < 41 else [] for row in expected]


class RecordCumsum(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.cumsum.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_cumulative_sums_are_exact():
    """torch.use_deterministic_algorithms refuses those of floating-point numbers on a GPU."""
    logits = normal(2, 4, 41)
    with RecordCumsum() as recorder:
        support_from_logits(logits, top_p=0.9)
    assert recorder.dtypes and not any(dtype.is_floating_point for dtype in recorder.dtypes)


def test_ties_stay_in_top_k_and_go_by_id_in_top_p():
    even = torch.zeros(1, 4)
    assert ids(support_from_logits(even, top_p=0.5)) == [[2, 3]]
    assert ids(support_from_logits(even, top_p=0.51)) == [[1, 2, 3]]
    tied = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert ids(support_from_logits(tied, top_k=2)) == [[0, 1, 2]]
    # Top-k and min-p come first, so that top-p acts on 1/4, 1/2, 1/4 here.
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.5]]).log()
    assert ids(support_from_logits(logits, top_p=0.75)) == [[0, 1, 2]]
    assert ids(support_from_logits(logits, top_p=0.75, top_k=2)) == [[1, 2]]
    assert ids(support_from_logits(logits, top_p=0.75, min_p=0.3)) == [[1, 2]]


def test_empty_range_is_the_whole_vocabulary_only_if_all_are_kept():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, -INF, 2.0], [0.0, torch.nan, 1.0], [-INF] * 3])
    for rules in ({}, {"top_k": 3}, {"top_k": 9}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_p": 0.999}):
        assert ids(support_from_logits(logits, **rules)) == [[], [0, 2], [], []]
    assert ids(support_from_logits(torch.empty(0, 3), top_p=0.5, top_k=2)) == []
    infinite = torch.tensor([[0.0, INF, 1.0]])
    for rules in ({"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert ids(support_from_logits(infinite, **rules)) == [[]]


def test_one_temperature_per_token_and_three_dimensions():
    logits, temperature = normal(1, 2, 3, 20), torch.tensor([[0.3, 1.0, 3.0], [1.0, 0.5, 2.0]])
    support = support_from_logits(logits, top_p=0.8, temperature=temperature)
    by_row = [
        kept_by_the_rules(row, top_p=0.8, temperature=float(t))
        for row, t in zip(logits.flatten(0, 1), temperature.flatten(), strict=True)
    ]
    assert ids(support) == by_row
    assert ids(support_from_logits(logits[:, :-1], top_k=3)) == ids(
        support_from_logits(logits[:, :-1].reshape(-1, 20), top_k=3)
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, got float"),
        ({"top_p": 0.0}, ValueError, "top_p must be greater than 0, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p must be at most 1, got 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p must be at least 0, got -0.1"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0, got 0.0"),
        ({"temperature": torch.ones(4)}, ValueError, "temperature must broadcast to shape"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \[B, T, V\] or packed \[N, V\]"),
        (
            {"logits": torch.zeros(2, 0)},
            ValueError,
            r"vocabulary of at least 1, got shape \(2, 0\)",
        ),
        ({"logits": torch.ones(2, 3).long()}, TypeError, "logits must be floating point"),
    ],
)
def test_wrong_arguments_raise(changes, error, message):
    with pytest.raises(error, match=message):
        support_from_logits(**{"logits": torch.zeros(2, 3), **changes})


def test_support_from_lists_of_any_kind():
    own = [[3, 1], None, np.array([2]), [], (4,), torch.tensor([])]
    assert ids(TokenSupport.from_lists(own)) == [[3, 1], [], [2], [], [4], []]
    assert ids(TokenSupport.from_lists([])) == []


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ([True, False], TypeError, r"ids\[1\] must be integer ids, got torch.bool"),
        ([1.5], TypeError, r"ids\[1\] must be integer ids, got torch.float32"),
        (3, ValueError, r"ids\[1\] must be \[K\], the ids of one token, got shape \(\)"),
        (torch.ones(2, 2).long(), ValueError, r"ids\[1\] must be \[K\].*got shape \(2, 2\)"),
    ],
)
def test_lists_that_are_not_of_ids_raise(own, error, message):
    with pytest.raises(error, match=message):
        TokenSupport.from_lists([[0], own])


SUPPORT = TokenSupport.from_lists([[1, 2], [], [5]])


def test_select_takes_any_negative_index_as_no_ids():
    assert ids(SUPPORT.select(torch.tensor([[2, -1], [-7, 0]]))) == [[5], [], [], [1, 2]]
    assert ids(SUPPORT.select(torch.tensor([2, 0], dtype=torch.uint8))) == [[5], [1, 2]]
    assert ids(TokenSupport.from_lists([]).select(torch.tensor([-1, -1]))) == [[], []]
    with pytest.raises(ValueError, match="index must be less than 3, the number of tokens, got 3"):
        SUPPORT.select(torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"index must be integer ids, got torch\.bool"):
        SUPPORT.select(torch.tensor([True, False, True]))


def test_cat_of_no_parts_and_of_short_integers():
    assert ids(TokenSupport.cat([])) == []
    small = TokenSupport(*(x.to(torch.uint8) for x in SUPPORT))
    assert ids(TokenSupport.cat([small] * 100)) == [[1, 2], [], [5]] * 100
