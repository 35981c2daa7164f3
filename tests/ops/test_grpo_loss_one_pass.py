"""grpo_loss with loss and gradient in one launch, against policy_loss of token_stats."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss, policy_loss, token_stats
from grpo_kernels.ops import grpo_loss as operators
from tests.helpers.loss_configs import per_token_configs
from tests.helpers.tensors import coin, make_case, normal

CONFIGS = per_token_configs()
GIVEN = ["mask", "old_logprob", "sampling_logprob", "ref_logprob"]


@pytest.fixture
def one_launch(monkeypatch):
    return count_launches(monkeypatch)


def count_launches(monkeypatch):
    """Return a list that grows by one with every one-pass launch."""
    launched = []
    forward_ = operators._forward_

    def counting(*arguments):
        launched.append(1)
        return forward_(*arguments)

    monkeypatch.setattr(operators, "_forward_", counting)
    return launched


def inputs(seed, names, B=2, T=3, V=37, dtype=torch.float64, spread=0.5):
    logits, tokens = make_case(seed, B, T, V, dtype=dtype)
    with torch.no_grad():
        logprob = token_stats(logits, tokens, entropy=False).logprob
    given = {
        name: logprob + normal(seed + i, B, T, dtype=logprob.dtype, std=spread)
        for i, name in enumerate(GIVEN[1:], 3)
        if name in names
    }
    if "mask" in names:
        given["mask"] = coin(seed + 2, B, T, p=0.7)
    chosen = coin(seed + 9, B, T, p=0.5) & given.get("mask", torch.ones(B, T).bool())
    given["nll_weight"] = normal(seed + 10, B, T) * chosen
    return logits, tokens, normal(seed + 8, B, dtype=logprob.dtype), given


def in_two_steps(logits, tokens, advantages, *, mask=None, config, rows=None, **given):
    """policy_loss of token_stats with autograd; `rows` are the keywords of token_stats."""
    stats = token_stats(logits, tokens, mask=mask, **(rows or {}))
    return policy_loss(
        stats.logprob, advantages, entropy=stats.entropy, mask=mask, config=config, **given
    )


def check(one_launch, logits, tokens, advantages, config, rows=None, tolerance=1e-10, **given):
    leaf, other = (logits.detach().clone().requires_grad_() for _ in range(2))
    loss, metrics = grpo_loss(leaf, tokens, advantages, config=config, **given, **(rows or {}))
    (1.7 * loss).backward()
    expected, expected_metrics = in_two_steps(
        other, tokens, advantages, config=config, rows=rows, **given
    )
    (1.7 * expected).backward()
    assert len(one_launch) == 1
    close = {"rtol": tolerance, "atol": tolerance * 1e-2}
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(leaf.grad, other.grad, **close)
    torch.testing.assert_close(metrics, expected_metrics, **close)
    return leaf.grad


@given(
    seed=st.integers(0, 2**31),
    config=CONFIGS,
    names=st.sets(st.sampled_from(GIVEN)),
    spread=st.sampled_from([0.3, 3.0, 15.0]),
)
@settings(max_examples=15)
@example(1, LossConfig(beta=2.0, kl_estimator="k3_corrected"), {"old_logprob", "ref_logprob"}, 15.0)
@example(1, LossConfig(beta=2.0, kl_estimator="k3", delta=1.5), set(GIVEN), 30.0)
@example(2, LossConfig(beta=0.04, kl_estimator="abs", dual_clip=1.1), set(GIVEN), 0.3)
def test_any_config_matches_policy_loss_of_token_stats(backend, seed, config, names, spread):
    names = names | ({"ref_logprob"} if config.beta else set())
    names = names | ({"sampling_logprob"} if config.needs_sampling else set())
    logits, tokens, advantages, given = inputs(seed, names, spread=spread)
    tolerance = (
        1e-10 if config.kl_estimator != "k3_corrected" else 1e-7
    )  # autograd's own error with ratios of e^20
    with pytest.MonkeyPatch.context() as patch:
        check(count_launches(patch), logits, tokens, advantages, config,
              tolerance=tolerance, **given)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles_match_policy_loss_of_token_stats(backend, one_launch, dtype):
    """Whole tiles and a tail, with a temperature per token and a softcap."""
    logits, tokens, advantages, given = inputs(4, GIVEN, V=333, dtype=dtype)
    logits[0, 0, :150] = -torch.inf
    tokens[0, 0] = 200
    config = LossConfig(beta=0.1, entropy_coef=0.1)
    rows = {"softcap": 20.0, "temperature": torch.tensor([[0.7, 1.0, 1.3]]).expand(2, 3)}
    gradient = check(
        one_launch, logits, tokens, advantages, config, rows,
        tolerance=2e-5 if dtype == torch.float32 else 1e-2, **given,
    )  # fmt: skip
    assert (gradient[0, 0, :150] == 0).all()


def test_masked_garbage_and_nan_row_stay_in_their_rows(backend, one_launch):
    logits, tokens, advantages, given = inputs(6, GIVEN, dtype=torch.float32)
    given["mask"] = torch.tensor([[True, True, False], [True, True, True]])
    config = LossConfig(beta=0.1, entropy_coef=0.1)
    clean = check(one_launch, logits, tokens, advantages, config, tolerance=2e-5, **given)
    logits[0, 2], tokens[0, 2] = torch.nan, -100
    logits[1, 1, 5] = torch.nan
    for name in ("old_logprob", "ref_logprob", "sampling_logprob"):
        given[name][0, 2] = torch.nan
    leaf = logits.clone().requires_grad_()
    grpo_loss(leaf, tokens, advantages, config=config, **given).loss.backward()
    is_nan = torch.zeros(2, 3, dtype=torch.bool)
    is_nan[1, 1] = True
    assert (leaf.grad[0, 2] == 0).all() and leaf.grad[is_nan].isnan().all()
    torch.testing.assert_close(leaf.grad[~is_nan], clean[~is_nan] / 1.7)


def test_nan_row_with_zero_advantage_has_zero_gradient(backend, one_launch):
    logits, tokens, _, _ = inputs(6, (), dtype=torch.float32)
    logits[0, 1, 4] = torch.nan
    advantages = normal(3, 2, 3)
    advantages[0, 1] = 0
    leaf = logits.requires_grad_()
    grpo_loss(leaf, tokens, advantages).loss.backward()
    assert len(one_launch) == 1 and (leaf.grad[0, 1] == 0).all()
    assert leaf.grad.isfinite().all() and (leaf.grad[1] != 0).any()


@pytest.mark.parametrize("num_rows", [1, 5])
def test_batch_invariance(backend, one_launch, num_rows):
    logits, tokens, _, given = inputs(7, GIVEN[1:], 1, 6, V=333, dtype=torch.float32)
    advantages = normal(3, 1, 6)
    config = LossConfig(beta=0.1, entropy_coef=0.1, aggregation="token_mean")

    def gradient(rows):
        leaf = logits[:, rows].clone().requires_grad_()
        batch = {name: value[:, rows] for name, value in given.items()}
        batch |= {"normalizer": 6, "config": config}
        grpo_loss(leaf, tokens[:, rows], advantages[:, rows], **batch).loss.backward()
        return leaf.grad

    assert torch.equal(gradient(slice(0, num_rows)), gradient(slice(None))[:, :num_rows])


@pytest.mark.parametrize(
    "case",
    [
        {"config": LossConfig.gspo()},
        {"config": LossConfig(beta=0.1, kl_estimator="reverse"), "ref_logits": True},
        {"dtype": torch.float16},
        {"grad": False},
    ],
    ids=["sequence level", "KL over the vocabulary", "fp16", "no gradient"],
)
def test_unsupported_configs_fall_back_to_two_passes(backend, one_launch, case):
    logits, tokens, advantages, _ = inputs(7, (), dtype=case.get("dtype", torch.float32))
    keywords = {"ref_logits": logits + 1} if "ref_logits" in case else {}
    config = case.get("config", LossConfig())
    logits.requires_grad_(case.get("grad", True))
    loss = grpo_loss(logits, tokens, advantages, config=config, **keywords).loss
    assert not one_launch and loss.requires_grad is case.get("grad", True)


def test_no_tokens(backend, one_launch):
    logits = torch.zeros(2, 0, 7, requires_grad=True)
    tokens = torch.zeros(2, 0, dtype=torch.int64)
    loss = grpo_loss(logits, tokens, torch.ones(2)).loss
    loss.backward()
    assert loss == 0 and logits.grad.shape == logits.shape


@pytest.mark.parametrize("backend", ["triton", "pytorch"], indirect=True)
def test_nan_sampling_logprob_reaches_gradient(backend):
    logits = normal(1, 1, 3, 20).requires_grad_()
    sampling = torch.tensor([[-1.0, torch.nan, -2.0]])
    tokens, old = torch.zeros(1, 3).long(), torch.full((1, 3), -1.5)
    loss, _ = grpo_loss(logits, tokens, torch.ones(1), old_logprob=old, sampling_logprob=sampling)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 1].isnan().all()
    assert gradient[0, [0, 2]].isfinite().all()


def test_numpy_numbers_in_config():
    config = LossConfig(epsilon_low=np.float64(0.2), importance_cap=np.float32(3.0))
    assert config == LossConfig(importance_cap=3.0)
    assert repr(config) == repr(LossConfig(importance_cap=3.0))
    logits = normal(1, 1, 3, 20).requires_grad_()
    grpo_loss(logits, torch.zeros(1, 3).long(), torch.ones(1), config=config).loss.backward()
    assert LossConfig.dr_grpo(np.int64(512)) == LossConfig.dr_grpo(512)


@pytest.mark.parametrize("name", ["normalizer", "entropy_normalizer"])
def test_normalizer_dtype_does_not_change_loss_dtype(name):
    logits = normal(1, 1, 3, 20).requires_grad_()
    given = {"normalizer": 6, "entropy_normalizer": 6} | {name: torch.tensor(6.0).double()}
    config = LossConfig(aggregation="token_mean", entropy_coef=0.1)
    loss, _ = grpo_loss(logits, torch.zeros(1, 3).long(), torch.ones(1), config=config, **given)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("compute_loss", ["logits", "hidden"])
def test_compile_with_changing_coefficients(compute_loss):
    """dynamo turns a float that changes into a symbol, which cannot be encoded as text."""
    torch._dynamo.reset()
    logits, tokens, advantages, given = inputs(4, ["mask", "ref_logprob"], dtype=torch.float32)
    head = torch.eye(logits.shape[-1])

    def loss(logits, config):
        if compute_loss == "logits":
            return grpo_loss(logits, tokens, advantages, config=config, **given).loss
        return linear_grpo_loss(logits, head, tokens, advantages, config=config, **given).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for coefficient in (0.01, 0.02):
        config = LossConfig(entropy_coef=coefficient, beta=coefficient)
        leaf, other = (logits.clone().requires_grad_() for _ in range(2))
        compiled(leaf, config).backward()
        loss(other, config).backward()
        torch.testing.assert_close(leaf.grad, other.grad)
    torch._dynamo.reset()
