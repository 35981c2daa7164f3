"""A vocabulary-parallel LM head: merged shards in one process, and real process groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_kernels.backends import RowInputs, RowStats, StatsRequest, backend_for
from grpo_kernels.lm_head.vocab_parallel import (
    ON_OTHER_RANK,
    OUT_OF_VOCAB,
    TopLogits,
    as_shard,
    local_ids,
    merge_shards,
)
from grpo_kernels.objective.token_gradients import TokenGrads
from reference import losses
from tests.helpers.tensors import exact_results, make_case, normal, results, upstream_like
from tests.helpers.tolerance import assert_as_accurate

SHARDS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def parts(x, sizes):
    return [None] * len(sizes) if x is None else x.split(sizes, dim=-1)


def shard_results(
    logits, tokens, sizes, temperature, given, *, ref_logits=None, kl=None, softcap=None,
    top_logprobs=0, **sums,
):  # fmt: skip
    """token_stats and its gradient, computed shard by shard and merged.

    logits: [1, T, V]; given: upstream gradients by name of output.
    """
    functions = backend_for(logits)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temperature = torch.full(tokens.shape, temperature, dtype=acc)
    ids = [local_ids(tokens, torch.tensor(sizes), rank) for rank in range(len(sizes))]
    shards = [
        RowInputs(x, own, temperature, None, y, softcap, kl)
        for x, own, y in zip(parts(logits, sizes), ids, parts(ref_logits, sizes), strict=True)
    ]
    found, tops, start = [], [], torch.tensor(0)
    for rows, size in zip(shards, sizes, strict=True):
        request = StatsRequest(**sums, top_logprobs=min(top_logprobs, size))
        stats = as_shard(functions.token_stats_forward(rows, request), rows.tokens)
        if top_logprobs:
            tops.append(
                TopLogits.read(rows.logits, stats.top_ids, stats.top_ids + start, top_logprobs)
            )
        found.append(stats._replace(top_logprobs=None, top_ids=None))
        start = start + size
    stacked = (None if x[0] is None else torch.stack(x) for x in zip(*found, strict=True))
    top = TopLogits(*map(torch.stack, zip(*tops, strict=True))) if tops else None
    merged = merge_shards(RowStats(*stacked), temperature, kl, top, softcap)
    d_logits = torch.full_like(logits, torch.nan)
    grads = TokenGrads(*(given.get(name) for name in TokenGrads._fields))
    for rows, out in zip(shards, parts(d_logits, sizes), strict=True):
        functions.token_stats_backward(rows, merged, grads, out)
    names = (*TokenGrads._fields, "top_logprobs", "top_ids")
    stats = {name: getattr(merged, name) for name in names}
    stats["d_logits"] = d_logits
    return {name: value for name, value in stats.items() if value is not None}


@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**16),
    sizes=SHARDS,
    excluded=st.sets(st.integers(0, 4)),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
    std=st.sampled_from([0.1, 3.0, 40.0]),
    kl=st.sampled_from([None, "forward", "reverse"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    softcap=st.sampled_from([None, 20.0]),
)
@example(0, [3, 1, 9], {0}, 1e4, 40.0, "reverse", torch.float32, None)
@example(1, [12, 12, 12, 12, 12], {1, 4}, -1e4, 3.0, "forward", torch.float32, None)
@example(2, [1, 1], {1}, 0.0, 3.0, "forward", torch.float64, 20.0)
def test_merged_shards_match_unsharded_row(
    backend, seed, sizes, excluded, offset, std, kl, dtype, softcap
):
    V, included = sum(sizes), [i for i in range(len(sizes)) if i not in excluded] or [0]
    offset = offset if dtype == torch.float32 else 0.0  # the fp64 oracle would round it too
    std = min(std, 3.0) if kl else std  # p (ln p - ln q - KL) cancels in an unsharded row too
    logits, _ = make_case(seed, 1, 3, V, dtype=dtype, std=std)
    ref_logits = normal(seed + 7, 1, 3, V, dtype=dtype, std=std)
    for i, (x, y) in enumerate(zip(parts(logits, sizes), parts(ref_logits, sizes), strict=True)):
        x.add_(offset), y.sub_(offset)
        if i not in included:
            x.fill_(-torch.inf), y.fill_(-torch.inf)
    starts = [sum(sizes[:i]) for i in included]
    tokens = torch.tensor([[starts[(seed + t) % len(included)] for t in range(3)]])
    names = ("logprob", "entropy", "kl") if kl else ("logprob", "entropy")
    given = upstream_like(seed + 9, tokens, (*names, "sum_sq_probs", "mean_logit"), dtype=dtype)
    keywords = {"softcap": softcap, **({"ref_logits": ref_logits, "kl": kl} if kl else {})}
    keywords |= {"sum_sq_probs": True, "mean_logit": True, "top_logprobs": min(5, V)}
    ours = shard_results(logits, tokens, sizes, 0.7, given, **keywords)
    keywords["temperature"] = 0.7
    exact = exact_results(logits, tokens, given, **keywords)
    same_dtype = results(losses.token_stats, logits, tokens, given, **keywords)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert_as_accurate(name, value, same_dtype[name], exact[name])


def test_of_equal_logits_in_several_shards_the_smaller_id_comes_first(backend):
    """Also where a shard has fewer entries than K, and where only -inf is left."""
    sizes = [2, 30, 1, 50]
    logits = torch.zeros(1, 4, sum(sizes))
    logits[0, 1] = torch.arange(sum(sizes)) // 3 % 2
    logits[0, 2, :80] = -torch.inf
    logits[0, 3] = -torch.inf
    logits[0, 3, [0, 40, 82]] = torch.tensor([1.0, 2.0, 1.0])
    tokens = torch.tensor([[0, 3, 81, 40]])
    ours = shard_results(logits, tokens, sizes, 1.0, {}, top_logprobs=6)
    exact = exact_results(logits, tokens, {}, top_logprobs=6)
    assert torch.equal(ours["top_ids"], exact["top_ids"])
    torch.testing.assert_close(ours["top_logprobs"].double(), exact["top_logprobs"])


def test_nan_in_one_shard_stays_in_its_row(backend):
    logits, tokens = make_case(3, 1, 2, 9)
    logits[0, 0, 5] = torch.nan
    logits[0, :, :3] = -torch.inf
    tokens = torch.tensor([[7, 8]])
    given = upstream_like(4, tokens)
    ours = shard_results(logits, tokens, [3, 2, 4], 1.0, given)
    for value in ours.values():
        assert value[0, 0].isnan().any() and not value[0, 1].isnan().any()


def test_token_in_excluded_shard_and_token_out_of_vocab(backend):
    logits, _ = make_case(5, 1, 3, 9)
    logits[..., :3] = -torch.inf
    tokens = torch.tensor([[1, 9, -1]])
    ours = shard_results(logits, tokens, [3, 6], 1.0, {"entropy": torch.ones(1, 3)})
    assert ours["logprob"][0, 0] == -torch.inf and ours["logprob"][0, 1:].isnan().all()
    assert ours["entropy"].isfinite().all()


def test_row_with_all_shards_excluded_is_nan(backend):
    logits = torch.full((1, 1, 4), -torch.inf)
    given = {"logprob": torch.ones(1, 1)}
    ours = shard_results(logits, torch.tensor([[1]]), [2, 2], 1.0, given)
    assert ours["logprob"].isnan() and ours["entropy"].isnan()


@pytest.mark.parametrize(("kl", "infinite"), [("reverse", True), ("forward", False)])
def test_kl_with_shard_excluded_by_reference_policy(backend, kl, infinite):
    """The reference policy excludes the first shard; the policy does not."""
    logits, tokens = make_case(6, 1, 2, 8)
    ref_logits = normal(7, 1, 2, 8)
    ref_logits[..., :4] = -torch.inf
    given = {"logprob": torch.ones(1, 2)}
    ours = shard_results(logits, tokens, [4, 4], 1.0, given, ref_logits=ref_logits, kl=kl)
    exact = exact_results(logits, tokens, given, ref_logits=ref_logits, kl=kl)["kl"]
    assert exact.isinf().all() == infinite
    torch.testing.assert_close(ours["kl"].double(), exact, rtol=1e-5, atol=1e-5)


def test_local_ids():
    tokens, sizes = torch.tensor([-1, 0, 2, 3, 5, 6]), torch.tensor([3, 1, 2])
    assert local_ids(tokens, sizes, 1).tolist() == [
        OUT_OF_VOCAB, ON_OTHER_RANK, ON_OTHER_RANK, 0, ON_OTHER_RANK, OUT_OF_VOCAB,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_match_one_process(tmp_path, ranks):
    """Run the cases of torchrun_worker.py: vocabulary-parallel heads, DTensors and FSDP2."""
    tests = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), *sys.path])
    command = [sys.executable, str(tests / "helpers" / "torchrun_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
