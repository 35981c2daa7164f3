"""Inputs of the linear ops that break naive implementations."""

import pytest
import torch

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats
from reference import losses
from tests.helpers.linear import (
    check_linear,
    linear_results,
    make_linear_case,
    relative_error,
    without_reference,
)
from tests.helpers.tensors import assert_same_bits, coin, normal, upstream_like

ALL = ("logprob", "entropy", "kl")


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_masked_tokens_have_no_effect(backend, chunk_tokens):
    case, mask = make_linear_case(1, 3, 4), coin(2, 3, 4)
    upstream = upstream_like(3, case["tokens"], ALL)
    keywords = {"mask": mask, "kl": "reverse", "chunk_tokens": chunk_tokens}
    temperature = 0.5 + normal(4, 3, 4).abs()
    clean = linear_results(linear_token_stats, case, upstream, temperature=temperature, **keywords)
    for garbage, token in ((torch.nan, -100), (torch.inf, 10**6)):
        dirty = dict(case)
        for name in ("hidden", "ref_hidden"):
            dirty[name] = case[name].masked_fill(~mask[..., None], garbage)
        dirty["tokens"] = case["tokens"].masked_fill(~mask, token)
        ours = linear_results(
            linear_token_stats, dirty, upstream,
            temperature=temperature.masked_fill(~mask, garbage), **keywords,
        )  # fmt: skip
        assert_same_bits(ours, clean)


def test_bias_of_minus_infinity_equals_smaller_vocabulary(backend):
    """A padded vocabulary whose first block is all padding."""
    case = make_linear_case(2, 2, 3, V=24, dtype=torch.float64)
    upstream = upstream_like(3, case["tokens"], ALL)
    small = linear_results(linear_token_stats, case, upstream, kl="forward")
    padded = dict(case)
    for name in ("weight", "ref_weight"):
        padded[name] = torch.cat((normal(9, 20, case[name].shape[1]).double(), case[name]))
    for name in ("bias", "ref_bias"):
        padding = torch.full((20,), -torch.inf, dtype=torch.float64)
        padded[name] = torch.cat((padding, case[name]))
    padded["tokens"] = case["tokens"] + 20
    ours = linear_results(linear_token_stats, padded, upstream, kl="forward")
    for name in (*ALL, "d_hidden"):
        torch.testing.assert_close(ours[name], small[name], rtol=1e-10, atol=1e-12)
    for name in ("d_weight", "d_bias"):
        assert (ours[name][:20] == 0).all()
        torch.testing.assert_close(ours[name][20:], small[name], rtol=1e-10, atol=1e-12)


def test_common_offset_of_logits(backend):
    """A bias of +1e4 rounds the logits to 5e-4 in fp32; the oracle takes the rounded logits."""
    case = without_reference(make_linear_case(3, 2, 4, V=50))
    logits = (case["hidden"] @ case["weight"].T + (case["bias"] + 1e4)).double()
    case["bias"] = case["bias"] + 1e4
    ours = linear_token_stats(**case)
    exact = losses.token_stats(logits, case["tokens"])
    assert (ours.entropy - exact.entropy).abs().max() < 1e-5
    assert (ours.logprob - exact.logprob).abs().max() < 1e-5


def test_nan_hidden_state_stays_in_its_row(backend):
    case = without_reference(make_linear_case(4, 2, 4))
    clean = linear_token_stats(**case)
    case["hidden"][1, 2] = torch.nan
    ours = linear_token_stats(**case)
    is_nan = torch.zeros(2, 4, dtype=torch.bool)
    is_nan[1, 2] = True
    assert ours.logprob[is_nan].isnan().all() and ours.entropy[is_nan].isnan().all()
    assert torch.equal(ours.logprob[~is_nan], clean.logprob[~is_nan])


def test_one_hot_rows(backend):
    case = without_reference(make_linear_case(5, 2, 4, std=300.0, bias=False))
    ours = check_linear(linear_token_stats, case, {}, ())
    assert (ours["entropy"] < 1e-3).any()
    ours = linear_results(linear_token_stats, case, upstream_like(3, case["tokens"]))
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_no_tokens(backend, shape, chunk_tokens):
    case = without_reference(make_linear_case(6, *shape))
    ours = linear_results(
        linear_token_stats, case, upstream_like(3, case["tokens"]), chunk_tokens=chunk_tokens
    )
    assert ours["logprob"].shape == shape and ours["d_hidden"].shape == (*shape, 8)
    assert (ours["d_weight"] == 0).all() and (ours["d_bias"] == 0).all()
    if len(shape) == 2:
        weight = case["weight"].requires_grad_()
        advantages = torch.ones(shape[0])
        loss, _ = linear_grpo_loss(case["hidden"], weight, case["tokens"], advantages)
        loss.backward()
        assert loss == 0 and (weight.grad == 0).all()


def test_extreme_log_ratios_give_finite_gradient(backend):
    case = without_reference(make_linear_case(7, 2, 3, bias=False))
    case.pop("bias")
    hidden, weight, tokens = (case[name] for name in ("hidden", "weight", "tokens"))
    hidden.requires_grad_()
    for shift in (-100.0, 100.0):
        old = linear_token_stats(hidden.detach(), weight, tokens).logprob + shift
        config = LossConfig(beta=0.1)
        loss, _ = linear_grpo_loss(
            hidden, weight, tokens, torch.tensor([1.0, -1.0]), old_logprob=old, ref_logprob=old,
            config=config,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.isfinite() and gradient.isfinite().all()


def test_fp16_gradients_do_not_underflow(backend):
    """The loss scale arrives with backward, after the gradient was computed."""
    case = without_reference(make_linear_case(8, 2, 4, dtype=torch.float16, bias=False))
    case.pop("bias")
    hidden, weight, tokens = (case[name] for name in ("hidden", "weight", "tokens"))
    leaf = weight.clone().requires_grad_()
    scale = 2.0**20
    keywords = {"advantages": torch.tensor([1.0, -1.0]), "normalizer": scale}
    keywords["config"] = LossConfig()
    loss, _ = linear_grpo_loss(hidden, leaf, tokens, **keywords)
    (scale * loss).backward()
    wide = weight.double().requires_grad_()
    exact, _ = losses.linear_grpo_loss(hidden.double(), wide, tokens, **keywords)
    (scale * exact).backward()
    assert relative_error(leaf.grad, wide.grad) < 8e-3


def test_strided_hidden_states_and_weights(backend):
    case = without_reference(make_linear_case(9, 2, 4, bias=False))
    wide = normal(1, 2, 5, 8)
    wide[:, :-1] = case["hidden"]
    strided = case | {"hidden": wide[:, :-1], "weight": case["weight"].T.contiguous().T}
    upstream = upstream_like(3, case["tokens"])
    expected = linear_results(linear_token_stats, case, upstream)
    ours = linear_results(linear_token_stats, strided, upstream)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name])


def test_uninitialised_memory_has_no_effect(backend):
    case = make_linear_case(10, 3, 4, dtype=torch.bfloat16)
    keywords = {"kl": "reverse", "mask": coin(1, 3, 4), "chunk_tokens": 5}
    upstream = upstream_like(3, case["tokens"], ALL)
    expected = linear_results(linear_token_stats, case, upstream, **keywords)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    try:
        ours = linear_results(linear_token_stats, case, upstream, **keywords)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(ours, expected)
