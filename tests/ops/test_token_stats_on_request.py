"""The statistics of token_stats that are computed on request only: Σ p², mean, top-1 and top-K."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_kernels import token_stats
from grpo_kernels.backends import RowInputs, RowStats, StatsRequest
from grpo_kernels.backends.row_support import RowSupport
from grpo_kernels.objective.token_gradients import TokenGrads
from reference import losses
from tests.helpers.tensors import (
    DTYPES,
    assert_same_bits,
    check_against_oracle,
    coin,
    generator,
    make_case,
    normal,
    results,
    token_ids,
    upstream_like,
)

V = 83  # two whole tiles of the interpreter and a tail
INF = torch.inf
SUMS = ("sum_sq_probs", "mean_logit")
ALL = ("logprob", "entropy", *SUMS)


def every_statistic(K=5):
    return {"sum_sq_probs": True, "mean_logit": True, "is_top1": True, "top_logprobs": K}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_statistics_and_gradient_are_as_accurate_as_torch(backend, device, dtype, softcap):
    logits, tokens = make_case(1, 2, 3, V, dtype=dtype, device=device)
    tokens[0] = logits[0].argmax(-1)
    ours = check_against_oracle(
        logits, tokens, upstream_like(5, tokens, ALL), temperature=0.7, softcap=softcap,
        **every_statistic(),
    )  # fmt: skip
    assert ours["is_top1"][0].all() and ours["top_ids"].dtype == torch.int64
    assert ours["top_ids"].shape == ours["top_logprobs"].shape == (2, 3, 5)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
def test_gradient_of_each_statistic_alone(backend, device, name, kl):
    logits, tokens = make_case(2, 5, V, device=device)
    keywords = {"kl": kl, "ref_logits": normal(9, 5, V, device=device) if kl else None}
    names = (name, "kl") if kl else (name,)
    check_against_oracle(
        logits, tokens, upstream_like(5, tokens, names), entropy=False, **{name: True}, **keywords
    )


def test_mean_with_common_offset_and_outlier(backend, device):
    """Logits far from 0, and one far above the others, which a sum relative to it would round."""
    logits, tokens = make_case(3, 2, V, device=device)
    logits[0] += 1e4
    logits[1, 7] = 1e4
    check_against_oracle(
        logits, tokens, upstream_like(5, tokens, SUMS), sum_sq_probs=True, mean_logit=True
    )


@pytest.mark.parametrize("excluded", [slice(0, 1), slice(0, 32), slice(0, 79), slice(70, V)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_excluded_entries(backend, device, excluded, softcap):
    """One -inf, leading blocks of -inf, fewer entries than K, and a padded vocabulary."""
    logits, _ = make_case(6, 3, V, device=device)
    logits[:, excluded] = -INF
    tokens = logits.argmax(-1)
    tokens[2] = 0
    ours = check_against_oracle(
        logits, tokens, upstream_like(5, tokens, SUMS), softcap=softcap, **every_statistic(6)
    )
    assert (ours["d_logits"][:, excluded] == 0).all() and ours["d_logits"].isfinite().all()
    assert ours["is_top1"][:2].all()
    if excluded == slice(0, 79):
        assert ours["top_ids"][0, 4:].tolist() == [0, 1]
        assert (ours["top_logprobs"][:, 4:] == -INF).all()


def test_single_entry_left_and_excluded_token(backend, device):
    logits = torch.full((2, V), -INF, device=device)
    logits[:, 60] = -3.0
    tokens = torch.tensor([60, 0], device=device)
    ours = check_against_oracle(logits, tokens, {}, **every_statistic(3))
    assert ours["is_top1"].tolist() == [True, False]
    assert ours["top_ids"].tolist() == [[60, 0, 1], [60, 0, 1]]
    assert (ours["sum_sq_probs"] == 0).all() and (ours["mean_logit"] == -3).all()


@pytest.mark.parametrize("rows", [2, 6], ids=["split", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_of_equal_logits_the_smaller_id_comes_first(backend, device, rows, dtype):
    """Within a lane's access, across lanes, tiles and parts, and between 0 and -0."""
    size = 300
    logits = normal(7, rows, size, dtype=dtype, device=device).clamp(max=1.0)
    ties = [5, 6, 33, 70, 140, 141, 290]
    logits[:, ties] = 2.0
    logits[0] = 0.0
    logits[0, 2] = -0.0
    tokens = torch.full((rows,), 5, device=device)
    tokens[0] = 0
    for K in (1, 3, 9):
        ours = check_against_oracle(logits, tokens, {}, **every_statistic(K))
        assert ours["is_top1"].all()
        assert ours["top_ids"][0].tolist() == list(range(K))
        assert ours["top_ids"][1].tolist()[:7] == ties[:K]
    later = token_stats(logits, torch.full_like(tokens, 33), is_top1=True)
    assert not later.is_top1.any()


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31), N=st.integers(1, 5), V=st.integers(1, 130), K=st.integers(1, 130),
    levels=st.integers(1, 200), share=st.sampled_from([0.0, 0.3, 0.97]),
)  # fmt: skip
@example(0, 3, 130, 8, 2, 0.3)
@example(1, 5, 130, 64, 3, 0.97)
@example(2, 5, 100, 65, 50, 0.3)  # more than the kernel takes
def test_largest_of_logits_with_many_ties(backend, seed, N, V, K, levels, share):
    K = min(K, V)
    logits = torch.randint(0, levels, (N, V), generator=generator(seed)).float() - levels // 2
    logits[coin(seed + 1, N, V, p=share)] = -INF
    logits[:, seed % V] = 0.0
    tokens = token_ids(seed + 2, N, V=V)
    ours = token_stats(logits, tokens, is_top1=True, top_logprobs=K)
    exact = losses.token_stats(logits, tokens, is_top1=True, top_logprobs=K)
    assert torch.equal(ours.top_ids, exact.top_ids)
    assert torch.equal(ours.is_top1, exact.is_top1)
    torch.testing.assert_close(ours.top_logprobs, exact.top_logprobs, rtol=1e-6, atol=4e-6)
    assert (ours.top_logprobs[:, 1:] <= ours.top_logprobs[:, :-1]).all()


@pytest.mark.parametrize("K", [17, 20, 33])
def test_number_of_largest_logits_need_not_divide_the_most(backend, K):
    logits, tokens = normal(1, 2, 70), token_ids(2, 2, V=70)
    ours = token_stats(logits, tokens, top_logprobs=K)
    exact = losses.token_stats(logits, tokens, top_logprobs=K)
    torch.testing.assert_close(ours.top_logprobs, exact.top_logprobs, rtol=1e-6, atol=4e-6)
    assert torch.equal(ours.top_ids, exact.top_ids)


@pytest.mark.parametrize("shape", [(0, V), (2, 0, V)])
def test_no_tokens(backend, device, shape):
    logits, tokens = make_case(1, *shape, device=device)
    upstream = upstream_like(5, tokens, ALL)
    ours = results(token_stats, logits, tokens, upstream, **every_statistic())
    assert ours["top_ids"].shape == (*shape[:-1], 5) and ours["is_top1"].shape == shape[:-1]


def test_vocabulary_of_one(backend, device):
    logits = normal(1, 3, 1, device=device, std=100.0)
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    upstream = {name: torch.ones(3, device=device) for name in ALL}
    ours = results(token_stats, logits, tokens, upstream, **every_statistic(1))
    assert torch.equal(ours["mean_logit"], logits[:, 0]) and ours["is_top1"].all()
    for name in ("sum_sq_probs", "top_logprobs", "top_ids"):
        assert (ours[name] == 0).all(), name
    assert (ours["d_logits"] == 1).all()  # the mean's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_tokens_get_zeros(backend, device, dtype):
    logits, tokens = make_case(7, 3, 4, V, dtype=dtype, device=device)
    for mask in (coin(8, 3, 4, device=device), torch.zeros(3, 4, dtype=torch.bool, device=device)):
        case = {"mask": mask, **every_statistic()}
        clean = check_against_oracle(logits, tokens, upstream_like(5, tokens, ALL), **case)
        assert all((value[~mask] == 0).all() for value in clean.values())
        broken = logits.masked_fill(~mask[..., None], torch.nan)
        ours = results(token_stats, broken, tokens, upstream_like(5, tokens, ALL), **case)
        assert_same_bits(ours, clean)


def test_nan_stays_in_its_row(backend, device):
    logits, tokens = make_case(8, 4, V, device=device)
    upstream = upstream_like(5, tokens, ALL)
    clean = results(token_stats, logits, tokens, upstream, **every_statistic())
    logits[2, 5] = torch.nan
    tokens[2] = 5
    ours = results(token_stats, logits, tokens, upstream, **every_statistic())
    others = torch.tensor([0, 1, 3], device=device)
    assert_same_bits(
        {name: value[others] for name, value in ours.items()},
        {name: value[others] for name, value in clean.items()},
    )
    assert all(ours[name][2].isnan().all() for name in (*SUMS, "top_logprobs"))
    assert not ours["is_top1"][2]
    assert ((ours["top_ids"][2] >= 0) & (ours["top_ids"][2] < V)).all()


def test_row_without_entries_has_no_top1(backend, device):
    logits = torch.full((2, V), -INF, device=device)
    ours = token_stats(logits, torch.zeros(2, dtype=torch.int64, device=device), is_top1=True)
    assert not ours.is_top1.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(backend, dtype):
    """Five rows are whole in the interpreter, one is split into parts."""
    logits, tokens = make_case(9, 5, 300, dtype=dtype)
    upstream = upstream_like(3, tokens, ALL)
    batch = results(token_stats, logits, tokens, upstream, **every_statistic(8))
    for row in (slice(0, 1), slice(4, 5)):
        part = {name: g[row] for name, g in upstream.items()}
        alone = results(token_stats, logits[row], tokens[row], part, **every_statistic(8))
        assert_same_bits(alone, {name: value[row] for name, value in batch.items()})


def test_strided_logits(backend, device):
    wide, tokens = make_case(10, 2, 4, V + 7, device=device)
    logits, tokens = wide[:, :-1, :V], tokens[:, 1:] % V
    check_against_oracle(logits, tokens, upstream_like(5, tokens, ALL), **every_statistic())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(backend, softcap):
    logits, tokens = make_case(1, 2, 6, dtype=torch.float64, std=1.5)
    logits[0, 1] = -INF
    included = logits[0] != -INF
    temperature = torch.tensor([0.7, 1.6], dtype=torch.float64)

    def outputs(first, second):
        row = torch.full((6,), -INF, dtype=torch.float64).masked_scatter(included, first)
        stats = token_stats(
            torch.stack([row, second]), tokens, temperature=temperature, softcap=softcap,
            **every_statistic(2),
        )  # fmt: skip
        return stats.sum_sq_probs, stats.mean_logit

    leaves = (logits[0, included].requires_grad_(), logits[1].clone().requires_grad_())
    torch.autograd.gradcheck(outputs, leaves)


def test_only_the_sums_are_differentiable(backend):
    logits, tokens = make_case(1, 3, V)
    stats = token_stats(logits.requires_grad_(), tokens, **every_statistic())
    differentiable = {name for name, x in stats._asdict().items() if x is not None}
    differentiable -= {"is_top1", "top_logprobs", "top_ids"}
    assert differentiable == {
        name for name, x in stats._asdict().items() if x is not None and x.requires_grad
    }


def operator_arguments():
    logits, tokens = make_case(3, 1, 3, 7)
    mask = torch.tensor([[True, False, True]])
    rows = RowInputs(logits, tokens, torch.full((1, 3), 1.3), mask, None, None, None)
    return rows, StatsRequest(True, *every_statistic(2).values())


def test_opcheck(backend):
    rows, request = operator_arguments()
    forward = torch.ops.grpo_kernels.token_stats_forward
    leaf = rows._replace(logits=rows.logits.clone().requires_grad_())
    support = RowSupport()
    torch.library.opcheck(forward, (*leaf, *support, *request, False))
    stats = RowStats._make(forward(*rows, *support, *request, False))
    g = torch.ones(1, 3)
    grads = TokenGrads(None, g, None, g, torch.ones(()).expand(1, 3).contiguous())
    arguments = (*rows, *support, *stats.keep_for_backward(grads), *grads)
    torch.library.opcheck(torch.ops.grpo_kernels.token_stats_backward, arguments)


def test_compiled_fullgraph_equals_eager(backend):
    torch._dynamo.reset()
    logits, tokens = make_case(4, 2, 3, 17)

    def loss(logits):
        stats = token_stats(logits, tokens, **every_statistic(3))
        total = (stats.sum_sq_probs + 0.1 * stats.mean_logit + stats.logprob).sum()
        return total, stats.is_top1, stats.top_logprobs, stats.top_ids

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        total, *others = function(leaf)
        total.backward()
        found.append((total.detach(), *others, leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("K", "error", "message"),
    [
        (V + 1, ValueError, f"top_logprobs must be at most {V}, got {V + 1}"),
        (-1, ValueError, "top_logprobs must be at least 0, got -1"),
        (True, TypeError, "top_logprobs must be an integer, got bool"),
        (2.0, TypeError, "top_logprobs must be an integer, got float"),
    ],
)
def test_errors(K, error, message):
    logits, tokens = make_case(1, 3, V)
    with pytest.raises(error, match=message):
        token_stats(logits, tokens, top_logprobs=K)
