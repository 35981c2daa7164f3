"""linear_token_stats against the reference in fp64: values, gradients, chunks and masks."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from grpo_kernels import linear_token_stats, pack_tokens, token_stats
from tests.helpers.linear import (
    check_linear,
    exact_linear_results,
    half_gradient_tolerance,
    linear_results,
    make_linear_case,
    relative_error,
    without_reference,
)
from tests.helpers.tensors import DTYPES, assert_same_bits, coin, make_case, normal, upstream_like

ALL = ("logprob", "entropy", "kl")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_outputs_and_gradients_are_as_accurate_as_torch(backend, device, dtype, kl, chunk_tokens):
    case = make_linear_case(3, 2, 5, dtype=dtype, device=device)
    if kl is None:
        case = without_reference(case)
    upstream = upstream_like(9, case["tokens"], ALL if kl else ALL[:2])
    mask = coin(8, 2, 5, device=device)
    check_linear(linear_token_stats, case, upstream, kl=kl, mask=mask, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_policy_in_another_dtype(backend, device, dtype):
    """Rounding its hidden states and weight to bf16 would cost 2e-3 of KL."""
    case = make_linear_case(3, 2, 5, dtype=dtype, device=device)
    wide = make_linear_case(3, 2, 5, device=device)
    case |= {name: wide[name] for name in wide if name.startswith("ref_")}
    ours = linear_results(linear_token_stats, case, {}, kl="forward")["kl"]
    exact = exact_linear_results(case, {}, kl="forward")["kl"]
    assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("shape", [(2, 5), (7,)])
@pytest.mark.parametrize("per_token", [False, True])
def test_temperature_softcap_and_packed_input(backend, shape, per_token):
    case = make_linear_case(4, *shape)
    temperature = 0.5 + normal(1, *shape).abs() if per_token else 0.7
    check_linear(
        linear_token_stats,
        case,
        upstream_like(2, case["tokens"], ALL),
        temperature=temperature,
        softcap=3.0,
        kl="reverse",
        chunk_tokens=3,
    )


@pytest.mark.parametrize("names", [("logprob",), ("entropy",), ("kl",), ("entropy", "kl")])
def test_gradient_of_some_outputs(backend, names):
    case = make_linear_case(5, 2, 4)
    check_linear(linear_token_stats, case, upstream_like(3, case["tokens"], names), kl="forward")


@pytest.mark.parametrize("leaves", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_frozen_inputs_get_no_gradient(backend, leaves):
    case = without_reference(make_linear_case(6, 2, 4))
    upstream = upstream_like(3, case["tokens"]) if leaves else {}
    ours = check_linear(linear_token_stats, case, upstream, leaves)
    whole = linear_results(linear_token_stats, case, upstream_like(3, case["tokens"]))
    assert_same_bits(ours, {name: whole[name] for name in ours})


def test_without_bias_and_without_entropy(backend):
    case = without_reference(make_linear_case(7, 3, 4, bias=False))
    ours = check_linear(
        linear_token_stats, case, upstream_like(3, case["tokens"], ("logprob",)), entropy=False
    )
    assert "entropy" not in ours


def test_tied_weight_adds_both_gradients(backend):
    case = without_reference(make_linear_case(8, 2, 4, bias=False, dtype=torch.float64))
    embedding = case["weight"].clone().requires_grad_()
    ids = case["tokens"].roll(1, -1)
    linear_token_stats(embedding[ids], embedding, case["tokens"]).logprob.sum().backward()
    logits = embedding.detach().requires_grad_()
    dense = token_stats(logits[ids] @ logits.T, case["tokens"]).logprob.sum()
    (expected,) = torch.autograd.grad(dense, logits)
    torch.testing.assert_close(embedding.grad, expected, rtol=1e-10, atol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    B=st.integers(0, 3),
    T=st.integers(1, 4),
    V=st.sampled_from([1, 2, 17, 64, 100]),
    H=st.sampled_from([1, 3, 16]),
    chunk_tokens=st.sampled_from([None, 1, 2, 3, 16]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    kl=st.sampled_from([None, "forward", "reverse"]),
)
@example(0, 0, 3, 5, 4, None, 0.5, "reverse")
@example(1, 2, 1, 1, 1, 1, 0.0, "forward")
def test_any_shape_mask_and_chunk_size(backend, seed, B, T, V, H, chunk_tokens, masked, kl):
    case = make_linear_case(seed, B, T, V=V, H=H, dtype=torch.float64)
    if kl is None:
        case = without_reference(case)
    mask = coin(seed, B, T, p=1 - masked)
    upstream = upstream_like(seed, case["tokens"], ALL if kl else ALL[:2], torch.float64)
    keywords = {"kl": kl, "mask": mask, "chunk_tokens": chunk_tokens}
    ours = linear_results(linear_token_stats, case, upstream, **keywords)
    exact = exact_linear_results(case, upstream, **keywords)
    for name, value in ours.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-11)
        if name == "d_hidden" or name in ALL:
            assert (value[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunk_size_changes_rounding_only(backend, dtype):
    case = make_linear_case(10, 3, 7, dtype=dtype)
    upstream = upstream_like(3, case["tokens"], ALL)
    exact = exact_linear_results(case, upstream, kl="reverse")
    for chunk_tokens in (None, 1, 4, 16, 64):
        ours = linear_results(
            linear_token_stats, case, upstream, kl="reverse", chunk_tokens=chunk_tokens
        )
        for name, value in ours.items():
            half = name.startswith("d_") and dtype == torch.bfloat16
            assert relative_error(value, exact[name]) <= (
                half_gradient_tolerance() if half else 1e-6
            ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixed_chunk_size_is_batch_invariant(backend, device, dtype):
    """Three tokens alone, padded to a matmul of 8 rows, equal the same among 11 others."""
    case = make_linear_case(11, 14, V=65, H=24, dtype=dtype, device=device)
    upstream = upstream_like(3, case["tokens"], ALL)
    keywords = {"kl": "forward", "chunk_tokens": 8}
    whole = linear_results(linear_token_stats, case, upstream, **keywords)
    for rows in (slice(0, 3), slice(6, 9), slice(13, 14)):
        part = dict(case)
        for name in ("hidden", "tokens", "ref_hidden"):
            part[name] = case[name][rows]
        incoming = {name: g[rows] for name, g in upstream.items()}
        alone = linear_results(linear_token_stats, part, incoming, **keywords)
        for name in (*ALL, "d_hidden"):
            assert torch.equal(alone[name], whole[name][rows]), name


def test_fixed_chunk_size_is_mask_invariant(backend):
    case = make_linear_case(12, 2, 7, V=65, H=24)
    upstream = upstream_like(3, case["tokens"], ALL)
    mask = coin(5, 2, 7)
    keywords = {"kl": "reverse", "chunk_tokens": 4}
    whole = linear_results(linear_token_stats, case, upstream, **keywords)
    ours = linear_results(linear_token_stats, case, upstream, mask=mask, **keywords)
    for name in (*ALL, "d_hidden"):
        assert torch.equal(ours[name][mask], whole[name][mask]), name


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_repeated_runs_are_bitwise_equal(backend, device, chunk_tokens):
    case = make_linear_case(13, 3, 5, dtype=torch.bfloat16, device=device)
    mask = coin(1, 3, 5, device=device)
    keywords = {"kl": "reverse", "mask": mask, "chunk_tokens": chunk_tokens}
    upstream = upstream_like(3, case["tokens"], ALL)
    first = linear_results(linear_token_stats, case, upstream, **keywords)
    assert_same_bits(linear_results(linear_token_stats, case, upstream, **keywords), first)


def test_precomputed_packing_is_bitwise_equal(backend):
    case, mask = make_linear_case(14, 2, 6), coin(4, 2, 6)
    upstream = upstream_like(3, case["tokens"], ALL)
    keywords = {"kl": "reverse", "mask": mask, "chunk_tokens": 4}
    expected = linear_results(linear_token_stats, case, upstream, **keywords)
    ours = linear_results(linear_token_stats, case, upstream, packing=pack_tokens(mask), **keywords)
    assert_same_bits(ours, expected)


def test_half_precision_logits_are_not_rounded(backend):
    """The log-prob is computed from fp32 logits, which bf16 cannot represent."""
    logits, tokens = make_case(1, 4, 33, dtype=torch.float64)
    eye = torch.eye(33, dtype=torch.bfloat16)
    # Two bf16 parts whose sum needs 16 bits of mantissa; the matmul adds them.
    high = logits.bfloat16()
    low = (logits - high.double()).bfloat16()
    hidden, weight = torch.cat((high, low), dim=-1), torch.cat((eye, eye), dim=-1)
    exact = token_stats(high.double() + low.double(), tokens)
    ours = linear_token_stats(hidden, weight, tokens)
    for name in ("logprob", "entropy"):
        error = (getattr(ours, name).double() - getattr(exact, name)).abs().max()
        assert error < 4e-6, name


def test_matches_token_stats_of_logits(backend):
    case = without_reference(make_linear_case(15, 2, 5, bias=False))
    logits = case["hidden"].flatten(0, 1) @ case["weight"].T
    expected = token_stats(logits.view(2, 5, -1), case["tokens"])
    ours = linear_token_stats(case["hidden"], case["weight"], case["tokens"])
    assert torch.equal(ours.logprob, expected.logprob)
    assert torch.equal(ours.entropy, expected.entropy)
