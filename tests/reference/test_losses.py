"""Tests of the oracle against formulas written out here, in Python or in plain PyTorch."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels
from grpo_kernels import LossConfig
from reference import losses
from reference.losses import (
    grpo_loss,
    linear_grpo_loss,
    linear_token_stats,
    token_stats,
)

V = 5
KL_KINDS = ["forward", "reverse"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_by_hand(row):
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def test_token_stats_equal_formulas_in_python():
    logits, ref_logits, tokens = randn(4, V), randn(4, V, seed=1), torch.tensor([0, 4, 2, 2])
    for kind in KL_KINDS:
        stats = token_stats(
            logits, tokens, temperature=0.7, softcap=2.0, ref_logits=ref_logits, kl=kind
        )
        for n, token in enumerate(tokens.tolist()):
            p, q = (
                softmax_by_hand([2.0 * math.tanh(x / 2.0) / 0.7 for x in row])
                for row in (logits[n].tolist(), ref_logits[n].tolist())
            )
            entropy = -sum(a * math.log(a) for a in p)
            pairs = list(zip(q, p, strict=True) if kind == "forward" else zip(p, q, strict=True))
            kl = sum(a * math.log(a / b) for a, b in pairs)
            assert stats.logprob[n].item() == pytest.approx(math.log(p[token]), rel=1e-12)
            assert stats.entropy[n].item() == pytest.approx(entropy, rel=1e-12)
            assert stats.kl[n].item() == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_token_stats_gradients_equal_closed_forms(kind):
    logits, ref_logits = randn(3, V).requires_grad_(), randn(3, V, seed=1)
    tokens = torch.tensor([1, 0, 4])
    stats = token_stats(logits, tokens, ref_logits=ref_logits, kl=kind)
    p, q = logits.detach().softmax(-1), ref_logits.softmax(-1)
    gradients = {
        "logprob": F.one_hot(tokens, V) - p,
        "entropy": -p * (p.log() + stats.entropy.detach()[:, None]),
        "kl": p - q if kind == "forward" else p * (p.log() - q.log() - stats.kl.detach()[:, None]),
    }
    for name, expected in gradients.items():
        (grad,) = torch.autograd.grad(getattr(stats, name).sum(), logits, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KL_KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_of_minus_infinity_equal_a_smaller_vocabulary(kind, softcap):
    keep = torch.tensor([False, False, True, True, False, True, True])
    small, small_ref = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    excluded = torch.full((3, 7), -torch.inf, dtype=torch.float64)
    logits = excluded.masked_scatter(keep, small.detach()).requires_grad_()
    ref_logits = excluded.masked_scatter(keep, small_ref)
    common = {"softcap": softcap, "kl": kind}
    padded = token_stats(logits, torch.tensor([2, 3, 6]), ref_logits=ref_logits, **common)
    plain = token_stats(small, torch.tensor([0, 1, 3]), ref_logits=small_ref, **common)
    torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-14)
    sum(x.sum() for x in padded[:3]).backward()
    sum(x.sum() for x in plain[:3]).backward()
    torch.testing.assert_close(logits.grad[:, keep], small.grad, rtol=1e-12, atol=1e-14)
    assert (logits.grad[:, ~keep] == 0).all()


def test_extreme_rows_stay_finite():
    one_hot = torch.tensor([[1e4, 0.0, 0.0]])
    offset = torch.tensor([[-1e4, -1e4, -1e4]])
    logits = torch.cat([one_hot, offset]).requires_grad_()
    stats = token_stats(logits, torch.tensor([0, 1]), ref_logits=logits.roll(1, 0), kl="forward")
    torch.testing.assert_close(stats.entropy, torch.tensor([0.0, math.log(3)]))
    torch.testing.assert_close(stats.logprob, torch.tensor([0.0, -math.log(3)]))
    sum(x.sum() for x in stats[:3]).backward()
    assert logits.grad.isfinite().all()


def test_vocabulary_of_one_gives_zeros():
    stats = token_stats(randn(2, 1), torch.zeros(2).long(), ref_logits=randn(2, 1), kl="reverse")
    assert all((x == 0).all() for x in stats[:3])


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_masked_tokens_have_zero_results_and_gradients(shape):
    mask = torch.tensor([1, 0, 1, 0, 1, 1]).reshape(shape)
    drop = ~mask.bool()
    clean, ref_logits = randn(*shape, V), randn(*shape, V, seed=1)
    tokens, temperature = torch.full(shape, 3), torch.full(shape, 0.8, dtype=torch.float64)
    results = []
    for garbage, token, masked_temperature in [
        (0.0, 0, 1.0),
        (torch.nan, -100, torch.nan),
        (torch.inf, 99, 0),
    ]:
        logits = clean.masked_fill(drop[..., None], garbage).requires_grad_()
        stats = token_stats(
            logits,
            tokens.masked_fill(drop, token),
            temperature=temperature.masked_fill(drop, masked_temperature),
            ref_logits=ref_logits.masked_fill(drop[..., None], garbage),
            kl="reverse",
            mask=mask,
        )
        sum(x.sum() for x in stats[:3]).backward()
        assert all((x[drop] == 0).all() for x in stats[:3])
        assert (logits.grad[drop] == 0).all()
        results.append((*stats[:3], logits.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_temperature_per_token_equals_one_call_per_temperature():
    logits, tokens, temperatures = randn(3, V), torch.tensor([1, 2, 0]), [0.5, 1.0, 2.0]
    together = token_stats(logits, tokens, temperature=torch.tensor(temperatures))
    for n, temperature in enumerate(temperatures):
        alone = token_stats(logits[n : n + 1], tokens[n : n + 1], temperature=temperature)
        torch.testing.assert_close(together.logprob[n], alone.logprob[0])
        torch.testing.assert_close(together.entropy[n], alone.entropy[0])


def test_half_precision_logits_are_computed_in_fp32():
    logits, tokens = randn(3, V).bfloat16(), torch.tensor([1, 2, 0])
    half, single = token_stats(logits, tokens), token_stats(logits.float(), tokens)
    torch.testing.assert_close(half, single, rtol=0, atol=0)
    assert half.logprob.dtype == torch.float32


def test_statistics_not_requested_are_none():
    stats = token_stats(randn(2, V), torch.zeros(2).long(), entropy=False)
    assert stats.entropy is None
    assert stats.kl is None


def make_linear(seed=0):
    hidden, ref_hidden = randn(2, 3, 4, seed=seed), randn(2, 3, 4, seed=seed + 1)
    weight, ref_weight = randn(V, 4, seed=seed + 2), randn(V, 4, seed=seed + 3)
    bias, ref_bias = randn(V, seed=seed + 4), randn(V, seed=seed + 5)
    policy = {"hidden": hidden, "weight": weight, "bias": bias}
    policy = {name: x.requires_grad_() for name, x in policy.items()}
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    return policy, ref, torch.tensor([[0, 1, 4], [2, 2, 3]])


@pytest.mark.parametrize("kind", KL_KINDS)
def test_linear_token_stats_equals_token_stats_of_the_product(kind):
    policy, ref, tokens = make_linear()
    actual = linear_token_stats(**policy, tokens=tokens, **ref, kl=kind, softcap=4.0)
    expected = token_stats(
        F.linear(*policy.values()), tokens, ref_logits=F.linear(*ref.values()), kl=kind, softcap=4.0
    )
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_masked_hidden_states_have_no_effect_on_weight_gradient():
    policy, ref, tokens = make_linear()
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    gradients = []
    for garbage in (0.0, torch.nan):
        leaves = {name: x.detach().clone() for name, x in policy.items()}
        leaves["hidden"][mask == 0] = garbage
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        stats = linear_token_stats(**leaves, tokens=tokens, **ref, kl="reverse", mask=mask)
        sum(x.sum() for x in stats[:3]).backward()
        gradients.append([x.grad for x in leaves.values()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["k3", *KL_KINDS])
def test_grpo_loss_equals_policy_loss_of_token_stats(estimator):
    policy, ref, tokens = make_linear()
    logits, ref_logits = F.linear(*policy.values()), F.linear(*ref.values())
    config = LossConfig(beta=0.1, entropy_coef=0.01, kl_estimator=estimator)
    advantages, mask = torch.tensor([1.0, -0.5]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    common = {"mask": mask, "old_logprob": randn(2, 3).sub(2), "config": config}
    scaling = {"temperature": 0.9, "softcap": 5.0}
    from_logits = grpo_loss(logits, tokens, advantages, ref_logits=ref_logits, **common, **scaling)
    from_hidden = linear_grpo_loss(
        policy["hidden"],
        policy["weight"],
        tokens,
        advantages,
        bias=policy["bias"],
        **ref,
        **common,
        **scaling,
    )
    stats = token_stats(
        logits,
        tokens,
        ref_logits=ref_logits,
        kl=None if estimator == "k3" else estimator,
        mask=mask,
        **scaling,
    )
    ref_logprob = token_stats(ref_logits, tokens, mask=mask, **scaling).logprob
    expected = losses.policy_loss(
        stats.logprob,
        advantages,
        ref_logprob=ref_logprob if estimator == "k3" else None,
        entropy=stats.entropy,
        kl=stats.kl,
        **common,
    )
    torch.testing.assert_close(from_logits, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(from_hidden, expected, rtol=1e-13, atol=1e-13)
    leaves = list(policy.values())
    gradients = [torch.autograd.grad(x.loss, leaves) for x in (from_logits, from_hidden)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


def test_grpo_loss_gradient_passes_gradcheck():
    config = LossConfig(beta=0.1, entropy_coef=0.1, kl_estimator="reverse")
    tokens, ref_logits = torch.tensor([[0, 1, 4], [2, 2, 3]]), randn(2, 3, V, seed=1)
    logits = randn(2, 3, V).requires_grad_()
    old = token_stats(logits, tokens).logprob.detach()

    def loss(x):
        return grpo_loss(
            x,
            tokens,
            torch.tensor([1.0, -1.0]),
            ref_logits=ref_logits,
            old_logprob=old,
            config=config,
        ).loss

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("estimator", ["k3", "reverse"])
def test_missing_reference_policy_is_an_error(estimator):
    config = LossConfig(beta=0.1, kl_estimator=estimator)
    with pytest.raises(ValueError, match=r"needs (ref_logprob|kl)"):
        grpo_loss(randn(1, 2, V), torch.zeros(1, 2).long(), torch.ones(1), config=config)


def test_token_outside_the_vocabulary_is_an_error():
    for token in (-1, V):
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, 5\)"):
            token_stats(randn(1, V), torch.tensor([token]))


SUPPORT = [[2, 0, 4], [], [1], [4, 3, 2, 1, 0]]


def csr(ids):
    offsets = torch.tensor([0, *(len(x) for x in ids)]).cumsum(0)
    return torch.tensor([id for x in ids for id in x], dtype=torch.int64), offsets


@pytest.mark.parametrize("kind", KL_KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_support_equals_a_smaller_vocabulary(kind, softcap):
    """Entry by entry of each token's ids; NaN outside them changes nothing."""
    logits, ref_logits, tokens = randn(4, V), randn(4, V, seed=1), torch.tensor([4, 3, 1, 0])
    outside = torch.ones(4, V, dtype=torch.bool)
    for n, ids in enumerate(SUPPORT):
        outside[n, ids or slice(None)] = False
    common = {"softcap": softcap, "kl": kind, "sum_sq_probs": True, "mean_logit": True}
    leaf = logits.masked_fill(outside, torch.nan).requires_grad_()
    ours = token_stats(
        leaf, tokens, ref_logits=ref_logits.masked_fill(outside, torch.nan),
        support=csr(SUPPORT), is_top1=True, top_logprobs=1, **common,
    )  # fmt: skip
    sum(x.sum() for x in ours[:5]).backward()
    assert (leaf.grad[outside] == 0).all()
    for n, ids in enumerate(SUPPORT):
        ids = torch.tensor(sorted(ids) or list(range(V)))
        small = logits[n : n + 1, ids].requires_grad_()
        expected = token_stats(
            small, (ids == tokens[n]).nonzero()[0], ref_logits=ref_logits[n : n + 1, ids],
            is_top1=True, top_logprobs=1, **common,
        )  # fmt: skip
        sum(x.sum() for x in expected[:5]).backward()
        torch.testing.assert_close(leaf.grad[n, ids], small.grad[0], rtol=1e-12, atol=1e-14)
        assert ours.top_ids[n] == ids[expected.top_ids[0]] and ours.is_top1[n] == expected.is_top1
        for name in ("logprob", "entropy", "kl", "sum_sq_probs", "mean_logit", "top_logprobs"):
            actual = getattr(ours, name)[n]
            torch.testing.assert_close(actual, getattr(expected, name)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ["k3", "reverse"])
def test_support_counts_in_both_policies_of_a_loss(estimator):
    """It is that of logits of -inf outside, at both levels."""
    policy, ref, tokens = make_linear()
    outside = torch.ones(2, 3, V, dtype=torch.bool)
    ids = [[0, 3], [], [1, 4], [0, 2, 1], [2], [4, 3]]
    for entries, kept in zip(outside.view(6, V), ids, strict=True):
        entries[kept or slice(None)] = False
    logits, ref_logits = F.linear(*policy.values()), F.linear(*ref.values())
    config = LossConfig(beta=0.1, entropy_coef=0.1, kl_estimator=estimator)
    common = {"advantages": torch.tensor([1.0, -1.0]), "config": config, "softcap": 5.0}
    dense = grpo_loss(
        logits.masked_fill(outside, -torch.inf), tokens,
        ref_logits=ref_logits.masked_fill(outside, -torch.inf), **common,
    )  # fmt: skip
    common["support"] = csr(ids)
    from_logits = grpo_loss(logits, tokens, ref_logits=ref_logits, **common)
    from_hidden = linear_grpo_loss(**policy, tokens=tokens, **ref, **common)
    for ours in (from_logits, from_hidden):
        torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-13)
        leaves = list(policy.values())
        gradients = [torch.autograd.grad(x.loss, leaves, retain_graph=True) for x in (ours, dense)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([0, 5, 1], [0, 2, 3], r"support.token_ids must lie in \[0, 5\)"),
        ([0, -1, 1], [0, 2, 3], r"support.token_ids must lie in \[0, 5\)"),
        ([0, 0, 1], [0, 2, 3], "support must hold each id of a token once"),
        ([1, 0, 2], [0, 2, 3], "support must hold the sampled token"),
        ([0, 1, 1], [0, 3], "support.offsets must hold 3 ascending numbers from 0 to 3"),
        ([0, 1, 1], [0, 2, 4], "support.offsets must hold 3"),
        ([0, 1, 1], [1, 2, 3], "support.offsets must hold 3"),
        ([0, 1, 1], [0, 4, 3], "support.offsets must hold 3"),
    ],
)
def test_wrong_support_is_an_error(ids, offsets, message):
    support, tokens = (torch.tensor(ids), torch.tensor(offsets)), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        token_stats(randn(2, V), tokens, support=support)


def test_support_of_a_masked_token_is_not_read():
    support, mask = csr([[9, 9, -1], [1, 2]]), torch.tensor([0, 1])
    stats = token_stats(randn(2, V), torch.tensor([-100, 1]), support=support, mask=mask)
    assert stats.logprob[0] == 0 and stats.logprob[1] < 0


# mini-GRPO: the formulas of its README


def masked_mean(per_token, mask):
    return per_token.mean() if mask is None else (per_token * mask).sum() / mask.sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_mini_grpo_values_and_gradients(seed, masked):
    ref_logits, new_logits = randn(2, 3, V, seed=seed), 3 * randn(2, 3, V, seed=seed + 1)
    new_logits.requires_grad_()
    mask = torch.tensor([[1.0, 0, 1], [1, 1, 0]]).double() if masked else None
    p, q = ref_logits.softmax(-1), new_logits.softmax(-1)
    entropy = masked_mean(-(q * q.log()).sum(-1), mask)
    cross_entropy = masked_mean(-(p * q.log()).sum(-1), mask)
    ratio = p.clamp_min(0.1) / q.clamp_min(0.1)
    entries = ratio - ratio.log() - 1
    if mask is not None:
        entries = entries * mask[..., None]
    inputs = (ref_logits, new_logits, mask)
    for actual, expected in [
        (losses.entropy_from_logits(new_logits, mask, detach=False), entropy),
        (losses.cross_entropy_from_logits(*inputs), cross_entropy),
        (
            losses.kl_divergence(*inputs),
            cross_entropy - masked_mean(-(p * p.log()).sum(-1), mask),
        ),
        (losses.approximate_kl_divergence(*inputs, 0.1), entries.mean()),
        (losses.approximate_kl_divergence(*inputs, 0.1, "sum"), entries.sum()),
        (losses.approximate_kl_divergence(*inputs, 0.1, "none"), entries),
    ]:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        gradients = [
            torch.autograd.grad(x.sum(), new_logits, retain_graph=True)[0]
            for x in (actual, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


def test_entropy_is_detached_by_default():
    logits = randn(2, 3, V).requires_grad_()
    assert not losses.entropy_from_logits(logits).requires_grad
    assert losses.entropy_from_logits(logits, detach=False).requires_grad


def test_mini_grpo_is_zero_with_every_token_masked():
    inputs = (randn(2, 3, V), torch.full((2, 3, V), torch.nan), torch.zeros(2, 3))
    assert losses.entropy_from_logits(*inputs[1:]) == 0
    assert losses.cross_entropy_from_logits(*inputs) == 0
    assert losses.kl_divergence(*inputs) == 0
    assert losses.approximate_kl_divergence(*inputs) == 0


# Signatures of the two implementations


def test_policy_loss_has_the_parameters_of_the_package():
    def parameters(function):
        listed = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in listed if p.name != "config"]

    assert parameters(grpo_kernels.policy_loss) == parameters(losses.policy_loss)
