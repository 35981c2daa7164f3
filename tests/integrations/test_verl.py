"""The adapters for verl match its formulas, written out by hand."""

import contextlib
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import LossConfig
from grpo_kernels.integrations import verl, verl_head
from grpo_kernels.integrations.verl_advantages import ESTIMATORS
from tests.helpers.tensors import coin, normal, token_ids

pytestmark = pytest.mark.usefixtures("pytorch_backend")

B, T = 4, 5
MODES = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum",
         "seq-mean-token-sum-norm"]  # fmt: skip
WHOLE = {"dp_size": 2, "batch_num_tokens": 23, "global_batch_size": 7, "loss_scale_factor": 11}


def make_actor(info=None, **changes):
    """The fields of verl's ActorConfig that the losses read."""
    own = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 9.0, "kl_cov_ratio": 0.3}
    settings = {
        "clip_ratio": 0.15,
        "clip_ratio_low": 0.1,
        "clip_ratio_high": 0.3,
        "clip_ratio_c": 1.5,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "policy_loss": SimpleNamespace(**own, ppo_kl_coef=0.7, dro_beta=0.3),
        "global_batch_info": info or {},
    }
    return SimpleNamespace(**settings | changes)


def make_inputs(seed=0):
    """Log-probs far enough apart that every bound is active, advantages and a mask."""
    old = -normal(seed, B, T, dtype=torch.float64).abs()
    new = old + normal(seed + 1, B, T, dtype=torch.float64, std=0.5)
    mask = coin(seed + 2, B, T, p=0.7).long()
    mask[1] = 0  # a fully masked sequence
    return {
        "old_log_prob": old,
        "log_prob": new.requires_grad_(),
        "advantages": normal(seed + 3, B, T, dtype=torch.float64),
        "response_mask": mask,
    }


def ratio_of(old, new):
    return (new - old).exp()


def sequence_mean(x, mask):
    return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]


def clipped(r, A, low=0.1, high=0.3):
    return torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))


def grpo(old, new, A, mask):
    term = clipped(ratio_of(old, new), A)
    return torch.where(A < 0, torch.minimum(term, -1.5 * A), term)


def gspo(old, new, A, mask):
    return clipped(sequence_mean(new - old, mask).exp(), A)


def gspo_token(old, new, A, mask):
    return clipped((sequence_mean(new - old, mask).detach() + new - new.detach()).exp(), A)


def gmpo(old, new, A, mask):
    d = new - old
    bounded = torch.where(A > 0, d.clamp(max=0.3), d.clamp(min=-0.1))
    return -A * sequence_mean(bounded, mask).exp()


def cispo(old, new, A, mask):
    return -ratio_of(old, new).clamp(0.9, 1.3).detach() * A * new


def sapo(old, new, A, mask):
    tau = torch.where(A > 0, 1.0, 1.05)
    return -A * 4 / tau * torch.sigmoid(tau * (ratio_of(old, new) - 1))


def dppo(old, new, A, mask):
    gap = new.exp() - old.exp()
    trusted = torch.where(A > 0, gap <= 0.3, gap >= -0.1)
    return -ratio_of(old, new).clamp(max=1.5).detach() * A * new * trusted


def dppo_kl(old, new, A, mask):
    p, q = new.exp(), old.exp()
    kl = q * (old - new) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    trusted = (kl <= torch.where(A > 0, 0.3, 0.1)) | torch.where(A > 0, p <= q, p >= q)
    return -ratio_of(old, new).clamp(max=1.5).detach() * A * new * trusted.detach()


def dro(old, new, A, mask):
    return -A * new + 0.15 * (new - old) ** 2


def clip_covariance(old, new, A, mask):
    """Every token whose covariance is within the bounds is dropped, as clip_cov is 1."""
    on, r = mask.bool(), ratio_of(old, new)
    covariance = (A - A[on].mean()) * (new - new[on].mean())
    outside = torch.where(A > 0, r > 1.3, r < 0.9)
    dropped = on & ~outside & (covariance > 0.2) & (covariance < 9.0)
    assert dropped.any() and not dropped[on].all()
    return clipped(r, A) * ~dropped


def reinforce(old, new, A, mask):
    return -A * new


def kl_covariance(old, new, A, mask):
    on = mask.bool()
    covariance = ((A - A[on].mean()) * (new - new[on].mean())).masked_fill(~on, -torch.inf)
    chosen = covariance.flatten().topk(int(0.3 * on.sum())).indices
    picked = torch.zeros(B * T, dtype=torch.bool).index_fill(0, chosen, True).view(B, T)
    return -A * ratio_of(old, new) + torch.where(picked, 0.7 * (new - old).abs(), 0.0)


TERMS = {term.__name__: term for term in (
    grpo, gspo, gspo_token, gmpo, cispo, sapo, dppo, dppo_kl, dro, reinforce, clip_covariance,
    kl_covariance,
)}  # fmt: skip


def aggregated(term, mask, mode, info):
    """verl's loss of one rank, of whose gradients the mean over ranks is taken."""
    rank, counts = info.get("dp_size", 1), mask.sum(-1)
    of_sequences = (term * mask).sum(-1)
    tokens = info.get("batch_num_tokens", counts.sum())
    sequences = info.get("global_batch_size", (counts > 0).sum())
    return (
        rank
        * {
            "token-mean": lambda: of_sequences.sum() / tokens,
            "token-sum": lambda: of_sequences.sum(),
            "seq-mean-token-mean": lambda: (of_sequences / counts.clamp(min=1)).sum() / sequences,
            "seq-mean-token-sum": lambda: of_sequences.sum() / sequences,
            "seq-mean-token-sum-norm": lambda: (
                of_sequences.sum() / sequences / info.get("loss_scale_factor", T)
            ),
        }[mode]()
    )


def check(name, mode, info, **weights):
    inputs = make_inputs()
    tensors = list(inputs.values())
    weight = weights.get("rollout_is_weights", torch.ones(B, T, dtype=torch.float64))
    if name == "gmpo":
        weight = sequence_mean((weight + 1e-10).log(), tensors[3]).exp()
    own = "seq-mean-token-mean" if name in verl.SEQUENCE_MEANS else mode
    expected = aggregated(TERMS[name](*tensors) * weight, tensors[3], own, info)
    with pytest.warns(UserWarning) if own != mode else contextlib.nullcontext():
        loss, _ = verl.make_policy_loss(name)(
            **inputs, loss_agg_mode=mode, config=make_actor(info), **weights
        )
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, inputs["log_prob"]) for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("info", [{}, WHOLE])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TERMS)
def test_objectives_match_formulas(name, mode, info):
    check(name, mode, info)


@pytest.mark.parametrize("name", TERMS)
def test_rollout_weights_scale_tokens(name):
    weights = normal(9, B, T, dtype=torch.float64).abs()
    weights[0, :2] = 0
    check(name, "token-mean", WHOLE, rollout_is_weights=weights)


def one_token(name, log_ratio, **actor):
    """Return the gradient of a loss on one token with A = 1 and verl's default clip of 0.2."""
    new = torch.tensor([[log_ratio - 1.0]], requires_grad=True)
    actor = make_actor(**{"clip_ratio_low": 0.2, "clip_ratio_high": 0.2} | actor)
    inputs = {"old_log_prob": torch.tensor([[-1.0]]), "log_prob": new}
    inputs |= {"advantages": torch.ones(1, 1), "response_mask": torch.ones(1, 1)}
    loss, _ = verl.make_policy_loss(name)(**inputs, config=actor)
    return torch.autograd.grad(loss, new)[0].item()


def test_cispo_reads_both_clip_settings():
    assert one_token("cispo", 0.5) == pytest.approx(-1.2)
    assert one_token("cispo", -0.7) == pytest.approx(-0.8)
    assert one_token("cispo", 0.1) == pytest.approx(-math.exp(0.1))
    assert one_token("cispo", 0.5, clip_ratio_low=0, clip_ratio_high=0) == pytest.approx(-1.0)


def test_gmpo_takes_the_geometric_mean_of_the_weights():
    logprob = torch.full((1, 2), -1.0, requires_grad=True)
    inputs = {"old_log_prob": logprob.detach(), "log_prob": logprob}
    inputs |= {"advantages": torch.ones(1, 2), "response_mask": torch.ones(1, 2)}
    loss, _ = verl.make_policy_loss("gmpo")(
        **inputs,
        loss_agg_mode="seq-mean-token-mean",
        config=make_actor(),
        rollout_is_weights=torch.tensor([[4.0, 1.0]]),
    )
    assert loss.item() == pytest.approx(-2.0)


def test_actor_settings_reach_the_config():
    actor = make_actor(clip_ratio_low=None)
    assert verl.read_objective("grpo", actor) == LossConfig.grpo(
        epsilon_low=0.15, epsilon_high=0.3, dual_clip=1.5
    )
    assert verl.read_objective("clip_covariance", actor) == LossConfig.clip_covariance(
        epsilon_low=0.15, epsilon_high=0.3, clip_cov=1.0, clip_cov_low=0.2, clip_cov_high=9.0
    )
    assert verl.read_objective("vespo", actor) == LossConfig.vespo()
    actor.policy_loss.dro_beta = None
    assert verl.read_objective("dro", actor) == LossConfig.dro()


def test_max_completion_length_of_config_is_ignored():
    of_length, plain = (
        verl.make_policy_loss(config)(
            **make_inputs(), loss_agg_mode="token-mean", config=make_actor()
        )
        for config in (LossConfig.dr_grpo(1024), LossConfig.grpo())
    )
    torch.testing.assert_close(of_length, plain)


def test_custom_config():
    inputs = make_inputs()
    own = verl.make_policy_loss(LossConfig.two_sided(epsilon_low=0.05, delta=2.0))
    loss, _ = own(**inputs, loss_agg_mode="token-sum", config=make_actor())
    old, new, A, mask = inputs.values()
    r = ratio_of(old, new)
    term = torch.maximum(-A * r.clamp(max=2.0), -A * r.clamp(0.95, 1.2))
    torch.testing.assert_close(loss, (term * mask).sum())


def test_metrics():
    inputs = make_inputs()
    _, metrics = verl.make_policy_loss("grpo")(**inputs, config=make_actor())
    old, new, A, mask = (x.detach() for x in inputs.values())
    on, r = mask.bool(), ratio_of(old, new)
    outside = torch.where(A < 0, r < 0.9, r > 1.3)
    expected = {
        "actor/pg_clipfrac": outside[on].double().mean(),
        "actor/pg_clipfrac_lower": ((A < 0) & (r > 1.5))[on].double().mean(),
        "actor/ppo_kl": (old - new)[on].mean(),
        "actor/ratio_max": r[on].max(),
    }
    assert all(type(value) is float for value in metrics.values())
    assert all(value != 0 for value in expected.values())
    assert {name: metrics[name] for name in expected} == {
        name: pytest.approx(value.item()) for name, value in expected.items()
    }


def test_all_masked():
    inputs = make_inputs()
    inputs["response_mask"] = torch.zeros(B, T)
    for mode in MODES:
        loss, metrics = verl.make_policy_loss("grpo")(
            **inputs, loss_agg_mode=mode, config=make_actor()
        )
        assert loss == 0 and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verl.make_policy_loss("ppo"), "config must be one of .*'cispo'.*got 'ppo'"),
        (
            lambda: verl.make_policy_loss(LossConfig(beta=0.1)),
            "beta must be 0.0, got 0.1: verl pass",
        ),
        (
            lambda: verl.make_policy_loss(LossConfig.icepop()),
            "importance_mode must be truncate",
        ),
        (
            lambda: verl.make_policy_loss(LossConfig(importance_cap=9.0)),
            "got 9.0: verl weights",
        ),
        (
            lambda: verl.make_policy_loss(LossConfig.ipo()),
            "surrogate='ipo' needs the sampler's log-probs, which verl does not pass",
        ),
        (
            lambda: verl.make_policy_loss("grpo")(
                **make_inputs(), loss_agg_mode="mean", config=make_actor()
            ),
            "loss_agg_mode must be one of .*got 'mean'",
        ),
        (
            lambda: verl.make_policy_loss("grpo")(
                **make_inputs(), config=make_actor({"dp_size": 2})
            ),
            "global_batch_info must have the counts of the whole batch with dp_size=2",
        ),
        (
            lambda: verl_head.linear_cross_entropy(*make_head(), reduction="max"),
            "reduction must be one of .*got 'max'",
        ),
    ],
)
def test_unsupported_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def registered(monkeypatch):
    """Policy losses and estimators that reach a stand-in for verl's registries, by name."""
    found = {}
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    core_algos = sys.modules["verl.trainer.ppo.core_algos"]
    for function in ("register_policy_loss", "register_adv_est"):
        setattr(core_algos, function, lambda name: lambda x: found.setdefault(name, x))
    return found


def test_register(registered):
    names = verl.register(mine=LossConfig.two_sided(epsilon_low=0.05))
    assert (
        set(names)
        == set(registered) - {f"grpo_kernels/{name}" for name in ESTIMATORS}
        == {f"grpo_kernels/{name}" for name in (*verl.OBJECTIVES, "mine")}
    )
    assert registered["grpo_kernels/opo"] is ESTIMATORS["opo"]
    inputs = make_inputs()
    for name, config in {"gspo": "gspo", "mine": LossConfig.two_sided(epsilon_low=0.05)}.items():
        found, _ = registered[f"grpo_kernels/{name}"](**inputs, config=make_actor())
        expected, _ = verl.make_policy_loss(config)(**inputs, config=make_actor())
        assert found == expected


def make_head(V=7, H=3):
    hidden = normal(0, 2, T, H, dtype=torch.float64).requires_grad_()
    weight = normal(1, V, H, dtype=torch.float64).requires_grad_()
    return hidden, weight, token_ids(2, 2, T, V=V)


@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 2, 2 * T).double().view(2, T)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy(reduction, temperature):
    hidden, weight, labels = make_head()
    found = verl_head.linear_cross_entropy(
        hidden, weight, labels, temperature, reduction, impl_backend="triton"
    )
    divisor = temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature
    policy = torch.distributions.Categorical(logits=hidden @ weight.T / divisor)
    logprob = policy.log_prob(labels).flatten()
    logprob = {"none": logprob, "sum": logprob.sum(), "mean": logprob.sum() / 10}[reduction]
    expected = (logprob, policy.entropy().flatten())
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(x[0].sum() + x[1].square().sum(), (hidden, weight))
        for x in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, T)])
def test_fused_linear_for_ppo(shape):
    """Temperatures: a number, one, one per sequence, one per token."""
    hidden, weight, labels = make_head()
    temperature = 0.7 + coin(3, *shape).double() if shape else 0.7
    found = verl_head.FusedLinearForPPO(chunk_size=3, impl_backend="liger")(
        hidden, weight, labels.int(), temperature=temperature
    )
    divisor = torch.as_tensor(temperature).reshape(*shape, *[1] * (3 - len(shape)))
    policy = torch.distributions.Categorical(logits=hidden @ weight.T / divisor)
    expected = (policy.log_prob(labels), policy.entropy())
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(x[0].sum() + x[1].square().sum(), (hidden, weight))
        for x in (found, expected)
    ]
    torch.testing.assert_close(*gradients)
