"""The statistics that linear_token_stats computes on request only: Σ p², mean, top-1 and top-K."""

import pytest
import torch

from grpo_kernels import linear_token_stats
from tests.helpers.linear import (
    LEAVES,
    check_linear,
    linear_results,
    make_linear_case,
    without_reference,
)
from tests.helpers.tensors import DTYPES, assert_same_bits, coin, normal, upstream_like

ALL = ("logprob", "entropy", "sum_sq_probs", "mean_logit")
EVERY = {"sum_sq_probs": True, "mean_logit": True, "is_top1": True, "top_logprobs": 5}


def make_case(seed, *leading, **keywords):
    """A case whose first tokens are the most likely ones."""
    case = without_reference(make_linear_case(seed, *leading, **keywords))
    tokens = linear_token_stats(
        case["hidden"], case["weight"], case["tokens"], bias=case["bias"], top_logprobs=1
    ).top_ids[..., 0]
    case["tokens"][..., :2] = tokens[..., :2]
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("leaves", [LEAVES, ("hidden",)], ids=["trained", "frozen"])
def test_statistics_and_gradients_are_as_accurate_as_torch(
    backend, device, dtype, chunk_tokens, leaves
):
    case = make_case(3, 2, 5, dtype=dtype, device=device)
    mask = coin(8, 2, 5, device=device)
    for names in (ALL, ("mean_logit",)):
        ours = check_linear(
            linear_token_stats, case, upstream_like(9, case["tokens"], names), leaves,
            mask=mask, chunk_tokens=chunk_tokens, temperature=0.7, **EVERY,
        )  # fmt: skip
    assert ours["is_top1"][:, :2][mask[:, :2]].all()
    assert all((ours[name][~mask] == 0).all() for name in (*ALL, "top_logprobs", "top_ids"))


def test_softcap_excluded_entries_and_kl(backend):
    case = make_linear_case(4, 2, 4, V=24)
    case["bias"][:20] = case["ref_bias"][:20] = -torch.inf
    case["tokens"] = case["tokens"] % 4 + 20
    ours = check_linear(
        linear_token_stats, case, upstream_like(9, case["tokens"], (*ALL, "kl")), softcap=5.0,
        kl="reverse", chunk_tokens=3, **EVERY,
    )  # fmt: skip
    assert (ours["top_ids"][..., 4] == 0).all() and ours["top_logprobs"][..., 4].isinf().all()


@pytest.mark.parametrize("request_top", [0, 3])
def test_several_tokens_to_a_row(backend, request_top):
    rows = torch.tensor([0, 3, 3, 1, 3, 2])
    case = make_case(5, 4)
    tops = linear_token_stats(
        case["hidden"], case["weight"], case["tokens"], bias=case["bias"], top_logprobs=2
    ).top_ids
    case["tokens"] = torch.cat([tops[rows[:4], 0], tops[rows[4:], 1]])
    keywords = EVERY | {"top_logprobs": request_top, "token_rows": rows}
    ours = check_linear(
        linear_token_stats, case, upstream_like(9, case["tokens"], ALL), chunk_tokens=3, **keywords
    )
    assert ours["is_top1"].tolist() == [True] * 4 + [False] * 2
    assert ("top_ids" in ours) == (request_top > 0)


def test_of_equal_logits_the_smaller_id_comes_first(backend):
    """Small integers have exact products, so that equal rows of the head have equal logits."""
    case = without_reference(make_linear_case(6, 8, V=90, bias=False))
    case = {name: x if x is None else x.round() for name, x in case.items()}
    case["weight"] = case["weight"].clamp(-1, 1)
    case["weight"][45:] = case["weight"][:45].clone()
    check_linear(linear_token_stats, case, {}, is_top1=True, top_logprobs=30)


def test_fixed_chunk_size_is_batch_invariant(backend):
    case = make_case(11, 14, V=65)
    upstream = upstream_like(3, case["tokens"], ALL)
    keywords = EVERY | {"chunk_tokens": 8}
    whole = linear_results(linear_token_stats, case, upstream, **keywords)
    part = case | {name: case[name][6:9] for name in ("hidden", "tokens")}
    incoming = {name: g[6:9] for name, g in upstream.items()}
    alone = linear_results(linear_token_stats, part, incoming, **keywords)
    shared = [name for name in alone if name not in ("d_weight", "d_bias")]
    assert_same_bits(
        {name: alone[name] for name in shared}, {name: whole[name][6:9] for name in shared}
    )


def test_compiled_fullgraph_equals_eager(pytorch_backend):
    torch._dynamo.reset()
    case = make_case(12, 2, 4)
    tensors = [case[name] for name in ("hidden", "weight", "tokens")]

    def loss(hidden):
        stats = linear_token_stats(hidden, *tensors[1:], **EVERY)
        total = (stats.sum_sq_probs + 0.1 * stats.mean_logit + stats.logprob).sum()
        return total, stats.is_top1, stats.top_logprobs, stats.top_ids

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = tensors[0].clone().requires_grad_()
        total, *others = function(leaf)
        total.backward()
        found.append((total.detach(), *others, leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_without_tokens_that_count(backend, shape):
    case = without_reference(make_linear_case(1, *shape))
    mask = torch.zeros(shape, dtype=torch.bool)
    upstream = upstream_like(3, case["tokens"], ALL)
    ours = linear_results(linear_token_stats, case, upstream, mask=mask, **EVERY)
    assert ours["top_ids"].shape == (*shape, 5)
    assert all((value == 0).all() for value in ours.values())


def test_more_than_the_vocabulary_raises():
    case = without_reference(make_linear_case(1, 3))
    with pytest.raises(ValueError, match="top_logprobs must be at most 37, got 38"):
        linear_token_stats(**case, top_logprobs=38)


def test_no_token_is_the_most_likely_where_all_are_excluded(backend):
    hidden, weight, bias = normal(1, 1, 8), normal(2, 20, 8), torch.full((20,), -torch.inf)
    stats = linear_token_stats(
        hidden, weight, torch.tensor([0, 1]), bias=bias, token_rows=torch.tensor([0, 0]),
        is_top1=True,
    )  # fmt: skip
    assert stats.is_top1.tolist() == [False, False]
