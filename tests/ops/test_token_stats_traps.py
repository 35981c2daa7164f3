"""Inputs of token_stats that break naive implementations: extreme logits, -inf, NaN, sizes."""

import pytest
import torch

from grpo_kernels import token_stats
from tests.helpers.tensors import (
    assert_same_bits,
    check_against_oracle,
    coin,
    exact_results,
    make_case,
    normal,
    results,
    token_ids,
    upstream_like,
)

V = 83  # two whole tiles of the interpreter and a tail
ALL = ("logprob", "entropy", "kl")
INF = torch.inf


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_common_offset_of_1e4(backend, device, offset, kl):
    """The oracle takes the same rounded fp32 logits."""
    logits = normal(1, 4, V, device=device, std=4.0, mean=offset)
    ref_logits = normal(2, 4, V, device=device, std=4.0, mean=-offset)
    tokens = token_ids(3, 4, V=V, device=device)
    case = (logits, tokens, upstream_like(4, tokens, ALL))
    ours = results(token_stats, *case, kl=kl, ref_logits=ref_logits)
    exact = exact_results(*case, kl=kl, ref_logits=ref_logits)
    for name, value in ours.items():
        scale = exact[name].abs().clamp(min=1)
        assert ((value.double() - exact[name]).abs() <= 1e-5 * scale).all(), name


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_bf16_logits_at_llama_vocabulary(backend, device, temperature):
    """128,256 logits of standard deviation 4: the error is below 1e-5."""
    size = 128_256
    logits = normal(1, 2, size, dtype=torch.bfloat16, device=device, std=4.0)
    tokens = torch.tensor([size - 1, 7], device=device)
    ours = results(token_stats, logits, tokens, {}, temperature=temperature)
    exact = exact_results(logits, tokens, {}, temperature=temperature)
    for name in ("logprob", "entropy"):
        assert ((ours[name].double() - exact[name]).abs() <= 1e-5).all(), name


def test_batch_invariance_at_large_vocabulary(backend, device):
    """Wide enough that row blocks and thread blocks are split within the batch."""
    size = 40_001
    logits, tokens = make_case(2, 5, size, device=device)
    upstream = upstream_like(3, tokens)
    batch = results(token_stats, logits, tokens, upstream)
    for row in (slice(0, 1), slice(2, 5)):
        part = {name: g[row] for name, g in upstream.items()}
        alone = results(token_stats, logits[row], tokens[row], part)
        assert_same_bits(alone, {name: value[row] for name, value in batch.items()})


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_large_negative_logits(backend, device, kl):
    logits, tokens = make_case(3, 4, V, device=device)
    logits = -logits.abs() * torch.tensor([[1.0], [10.0], [100.0], [1000.0]], device=device) - 5
    ref_logits = -normal(4, 4, V, device=device).abs() - 100
    ours = check_against_oracle(
        logits, tokens, upstream_like(5, tokens, ALL), kl=kl, ref_logits=ref_logits
    )
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize("peak", [200.0, 1e4, 1e30, 3e38])
def test_one_hot_rows(backend, device, peak):
    logits = torch.zeros(2, V, device=device)
    logits[:, 50] = peak
    tokens = torch.tensor([50, 50], device=device)
    ours = results(token_stats, logits, tokens, upstream_like(5, tokens))
    assert all((value == 0).all() for value in ours.values())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("excluded", [slice(0, 1), slice(0, 32), slice(0, 75), slice(70, V)])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_excluded_entries(backend, device, excluded, softcap, kl):
    """One -inf, leading blocks of -inf, and a padded vocabulary."""
    logits, _ = make_case(6, 3, V, device=device)
    ref_logits = normal(7, 3, V, device=device)
    logits[:, excluded], ref_logits[:, excluded] = -INF, -INF
    tokens = logits.argmax(-1)
    ours = check_against_oracle(
        logits,
        tokens,
        upstream_like(5, tokens, ALL),
        softcap=softcap,
        kl=kl,
        ref_logits=ref_logits,
    )
    assert all(value.isfinite().all() for value in ours.values())
    assert (ours["d_logits"][:, excluded] == 0).all()


def test_single_entry_left(backend, device):
    logits = torch.full((2, V), -INF, device=device)
    logits[:, 60] = -3.0
    tokens = torch.tensor([60, 60], device=device)
    for softcap in (None, 5.0):
        ours = results(token_stats, logits, tokens, upstream_like(5, tokens), softcap=softcap)
        assert all((value == 0).all() for value in ours.values())


def test_logprob_of_excluded_token_is_minus_infinity(backend, device):
    logits, tokens = make_case(6, 2, V, device=device)
    logits[0, tokens[0]] = -INF
    ours = check_against_oracle(logits, tokens, {})
    assert ours["logprob"][0] == -INF and ours["entropy"].isfinite().all()


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_kl_is_infinite_where_other_policy_excludes_an_entry(backend, device, kl):
    logits, tokens = make_case(6, 3, V, device=device)
    ref_logits = normal(7, 3, V, device=device)
    (logits if kl == "forward" else ref_logits)[1, 40] = -INF
    tokens[:] = 3
    ours = results(
        token_stats, logits, tokens, upstream_like(5, tokens), kl=kl, ref_logits=ref_logits
    )
    assert ours["kl"][1] == INF and ours["kl"][[0, 2]].isfinite().all()
    assert ours["d_logits"].isfinite().all()


def test_excluded_entry_has_no_gradient_of_an_infinite_forward_kl(backend, device):
    logits, tokens = make_case(6, 3, V, device=device)
    ref_logits = normal(7, 3, V, device=device)
    logits[1, 40] = -INF
    expected = logits.softmax(-1) - ref_logits.softmax(-1)
    expected[1, 40] = 0
    logits.requires_grad_()
    token_stats(logits, tokens, kl="forward", ref_logits=ref_logits).kl.sum().backward()
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("broken", ["logits", "ref_logits"])
def test_nan_stays_in_its_row(backend, device, broken):
    logits, tokens = make_case(8, 4, V, device=device)
    keywords = {"kl": "reverse", "ref_logits": normal(9, 4, V, device=device)}
    upstream = upstream_like(5, tokens, ALL)
    expected = results(token_stats, logits, tokens, upstream, **keywords)
    target = logits if broken == "logits" else keywords["ref_logits"]
    target[2, 5] = torch.nan
    ours = results(token_stats, logits, tokens, upstream, **keywords)
    others = torch.tensor([0, 1, 3], device=device)
    assert_same_bits(
        {name: value[others] for name, value in ours.items()},
        {name: value[others] for name, value in expected.items()},
    )
    assert ours["kl"][2].isnan()
    if broken == "logits":
        assert ours["logprob"][2].isnan() and ours["entropy"][2].isnan()
    else:
        assert ours["logprob"][2] == expected["logprob"][2]


@pytest.mark.parametrize("shape", [(0, V), (0, 3, V), (2, 0, V)])
def test_no_tokens(backend, device, shape):
    logits = torch.zeros(shape, device=device)
    tokens = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    temperature = torch.ones(shape[:-1], device=device)
    keywords = {"kl": "forward", "ref_logits": logits, "temperature": temperature}
    ours = results(token_stats, logits, tokens, upstream_like(5, tokens, ALL), **keywords)
    assert ours["logprob"].shape == tokens.shape and ours["d_logits"].shape == shape


def test_vocabulary_of_one(backend, device):
    logits = normal(1, 3, 1, device=device, std=100.0)
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    ours = results(
        token_stats, logits, tokens, upstream_like(5, tokens, ALL), kl="reverse", ref_logits=-logits
    )
    assert all((value == 0).all() for value in ours.values())


def test_all_tokens_masked(backend, device):
    logits = torch.full((2, 3, V), torch.nan, device=device)
    tokens = torch.full((2, 3), -100, device=device)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    keywords = {"mask": mask, "kl": "reverse", "ref_logits": logits}
    ours = results(token_stats, logits, tokens, upstream_like(5, tokens, ALL), **keywords)
    assert all((value == 0).all() for value in ours.values())


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_zero_upstream_gradient_gives_zero_gradient(backend, device, kl):
    logits, tokens = make_case(10, 4, V, device=device)
    scale = torch.tensor([1.0, 0.0, 2.0, 0.0], device=device)
    upstream = {name: scale * g for name, g in upstream_like(5, tokens, ALL).items()}
    ours = check_against_oracle(
        logits, tokens, upstream, kl=kl, ref_logits=normal(7, 4, V, device=device)
    )
    assert (ours["d_logits"][scale == 0] == 0).all()


def test_uninitialised_memory_has_no_effect(backend, device):
    """Deterministic mode fills every torch.empty with NaN."""
    logits, tokens = make_case(11, 2, 3, V, device=device)
    mask = coin(12, 2, 3, device=device)
    case = (logits, tokens, upstream_like(5, tokens, ALL))
    keywords = {"kl": "reverse", "ref_logits": normal(7, 2, 3, V, device=device), "mask": mask}
    expected = results(token_stats, *case, **keywords)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        assert_same_bits(results(token_stats, *case, **keywords), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_softcap_precision_for_small_logits(backend, device):
    """1 - e^-v cancels for small v; a low temperature amplifies the error."""
    logits, tokens = make_case(21, 4, V, device=device, std=0.05)
    temperature = 0.01
    upstream = upstream_like(5, tokens, ("logprob", "entropy"))
    upstream = {name: temperature * g for name, g in upstream.items()}
    check_against_oracle(logits, tokens, upstream, temperature=temperature, softcap=30.0)
