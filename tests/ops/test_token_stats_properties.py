"""Properties of token_stats on random small inputs: invariances and bounds."""

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_kernels import token_stats
from tests.helpers.tensors import (
    assert_same_bits,
    check_against_oracle,
    coin,
    generator,
    make_case,
    normal,
    results,
    upstream_like,
)

SEEDS = st.integers(0, 2**31)
ROWS = st.integers(1, 5)
VOCABULARIES = st.integers(1, 130)
KL = st.sampled_from([None, "forward", "reverse"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
few = settings(max_examples=8)


def make_all(seed, N, V, kl=None, dtype=torch.float32, device="cpu", std=3.0):
    """Logits, tokens, upstream gradients of every output, and keywords."""
    logits, tokens = make_case(seed, N, V, dtype=dtype, device=device, std=std)
    names = ("logprob", "entropy", "kl") if kl else ("logprob", "entropy")
    keywords = {"temperature": normal(seed + 7, N, device=device).abs() + 0.5}
    if kl:
        ref_logits = normal(seed + 8, N, V, dtype=dtype, device=device, std=std)
        keywords |= {"kl": kl, "ref_logits": ref_logits}
    return logits, tokens, upstream_like(seed + 2, tokens, names), keywords


def select_rows(index, logits, tokens, upstream, keywords):
    """Index the rows of every per-row argument."""
    upstream = {name: g[index] for name, g in upstream.items()}
    keywords = {k: v[index] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    return logits[index], tokens[index], upstream, keywords


def run(logits, tokens, upstream, keywords):
    return results(token_stats, logits, tokens, upstream, **keywords)


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL, softcap=st.sampled_from([None, 3.0]))
def test_any_input_is_as_accurate_as_torch(backend, seed, N, V, kl, softcap):
    logits, tokens, upstream, keywords = make_all(seed, N, V, kl)
    mask = coin(seed + 9, N)
    check_against_oracle(logits, tokens, upstream, softcap=softcap, mask=mask, **keywords)


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL, shift=st.integers(-64, 64))
@few
def test_shift_invariance(backend, seed, N, V, kl, shift):
    """Bitwise, for logits on a grid where the shift itself does not round."""
    logits, tokens, upstream, keywords = make_all(seed, N, V, kl)
    logits = (logits * 128).round() / 128
    expected = run(logits, tokens, upstream, keywords)
    assert_same_bits(run(logits + shift, tokens, upstream, keywords), expected)
    if kl:
        shifted_ref = {"ref_logits": ((keywords["ref_logits"] * 128).round() / 128)}
        expected = run(logits, tokens, upstream, keywords | shifted_ref)
        shifted_ref = {"ref_logits": shifted_ref["ref_logits"] - shift}
        assert_same_bits(run(logits, tokens, upstream, keywords | shifted_ref), expected)


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL)
@few
def test_gradient_of_row_sums_to_zero(backend, seed, N, V, kl):
    gradient = run(*make_all(seed, N, V, kl))["d_logits"].double()
    scale = gradient.abs().sum(-1) + 1
    assert (gradient.sum(-1).abs() <= 2e-6 * scale).all()


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL, dtype=DTYPES)
@few
def test_permuted_rows(backend, seed, N, V, kl, dtype):
    case = make_all(seed, N, V, kl, dtype)
    order = torch.randperm(N, generator=generator(seed))
    expected = {name: value[order] for name, value in run(*case).items()}
    assert_same_bits(run(*select_rows(order, *case)), expected)


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL)
@few
def test_permuted_vocabulary(backend, seed, N, V, kl):
    logits, tokens, upstream, keywords = make_all(seed, N, V, kl)
    expected = run(logits, tokens, upstream, keywords)
    order = torch.randperm(V, generator=generator(seed))
    if kl:
        keywords["ref_logits"] = keywords["ref_logits"][:, order]
    actual = run(logits[:, order], order.argsort()[tokens], upstream, keywords)
    expected["d_logits"] = expected["d_logits"][:, order]
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=4e-6, atol=8e-6)


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL, dtype=DTYPES, first=st.integers(0, 7))
@few
def test_batch_invariance(backend, seed, N, V, kl, dtype, first):
    case = make_all(seed, N, V, kl, dtype)
    first %= N
    expected = {name: value[first : first + 1] for name, value in run(*case).items()}
    assert_same_bits(run(*select_rows(slice(first, first + 1), *case)), expected)


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL)
@few
def test_repeated_runs_are_bitwise_equal(backend, seed, N, V, kl):
    case = make_all(seed, N, V, kl)
    assert_same_bits(run(*case), run(*case))


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL, softcap=st.sampled_from([None, 3.0]))
@few
def test_masked_equals_compacted(backend, seed, N, V, kl, softcap):
    logits, tokens, upstream, keywords = make_all(seed, N, V, kl)
    mask = coin(seed + 9, N)
    rows = mask.nonzero().squeeze(-1)
    masked = run(logits, tokens, upstream, keywords | {"mask": mask, "softcap": softcap})
    logits, tokens, upstream, keywords = select_rows(rows, logits, tokens, upstream, keywords)
    compacted = run(logits, tokens, upstream, keywords | {"softcap": softcap})
    assert_same_bits({name: value[mask] for name, value in masked.items()}, compacted)
    assert all((value[~mask] == 0).all() for value in masked.values())


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES, kl=KL)
@few
def test_masked_tokens_have_no_effect(backend, seed, N, V, kl):
    logits, tokens, upstream, keywords = make_all(seed, N, V, kl)
    mask = coin(seed + 9, N)
    keywords["mask"] = mask
    expected = run(logits, tokens, upstream, keywords)
    masked = ~mask
    logits, tokens = logits.clone(), tokens.clone()
    logits[masked, ::2], logits[masked, 1::2], tokens[masked] = torch.nan, torch.inf, -100
    upstream = {name: torch.where(masked, torch.nan, g) for name, g in upstream.items()}
    keywords["temperature"] = torch.where(masked, torch.inf, keywords["temperature"])
    if kl:
        keywords["ref_logits"] = keywords["ref_logits"].masked_fill(masked[:, None], torch.nan)
    assert_same_bits(run(logits, tokens, upstream, keywords), expected)


@given(seed=SEEDS, N=ROWS, V=st.integers(2, 130), kl=KL, lead=st.integers(0, 129))
@example(seed=0, N=2, V=100, kl="reverse", lead=64)
@example(seed=0, N=2, V=100, kl="forward", lead=99)
def test_excluded_entries_have_no_effect(backend, seed, N, V, kl, lead):
    """Entries of -inf, in a leading block and at random, equal a row without these entries."""
    logits, tokens, upstream, keywords = make_all(seed, N, V, kl)
    included = coin(seed + 9, V)
    included[: lead % V] = False
    included[-1] = True
    ids = included.nonzero().squeeze(-1)
    tokens = tokens % len(ids)
    excluded = logits.masked_fill(~included, -torch.inf)
    if kl:
        ref_logits = keywords["ref_logits"]
        keywords["ref_logits"] = ref_logits.masked_fill(~included, -torch.inf)
    actual = run(excluded, ids[tokens], upstream, keywords)
    if kl:
        keywords["ref_logits"] = ref_logits[:, ids].contiguous()
    expected = run(logits[:, ids].contiguous(), tokens, upstream, keywords)
    assert (actual["d_logits"][:, ~included] == 0).all()
    actual["d_logits"] = actual["d_logits"][:, ids]
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=4e-6, atol=8e-6)


@given(seed=SEEDS, N=ROWS, V=VOCABULARIES)
@few
def test_entropy_and_kl_bounds(backend, seed, N, V):
    logits, tokens, _, keywords = make_all(seed, N, V, "forward")
    for kl in ("forward", "reverse"):
        stats = run(logits, tokens, {}, keywords | {"kl": kl})
        assert (stats["entropy"] >= -1e-6).all()
        assert (stats["entropy"] <= math.log(V) + 1e-5).all()
        assert (stats["logprob"] <= 1e-6).all() and (stats["kl"] >= -1e-6).all()
        same = run(
            logits, tokens, {"kl": torch.ones(N)}, keywords | {"kl": kl, "ref_logits": logits}
        )
        assert (same["kl"].abs() <= 1e-6).all() and (same["d_logits"].abs() <= 2e-6).all()
