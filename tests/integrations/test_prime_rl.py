"""The adapters for prime-rl match its contract, and formulas by hand."""

import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from grpo_kernels.integrations import prime_rl
from tests.helpers.tensors import coin, normal, token_ids

pytestmark = pytest.mark.usefixtures("pytorch_backend")

N = 9


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture(autouse=True)
def fake_prime_rl(monkeypatch):
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["prime_rl.trainer.rl.loss"].LossOutputs = LossOutputs


def make_inputs(seed=0, **changes):
    inference = -normal(seed, N, dtype=torch.float64).abs()
    trainer = inference + normal(seed + 1, N, dtype=torch.float64, std=0.5)
    given = {
        "trainer_logprobs": trainer.requires_grad_(),
        "inference_logprobs": inference,
        "ref_logprobs": None,
        "advantages": normal(seed + 2, N, dtype=torch.float64),
        "loss_mask": coin(seed + 3, N, p=0.7),
    }
    return LossInputs(**given | changes)


def clipped(inputs, low=0.2, high=0.2):
    r, A = (inputs.trainer_logprobs - inputs.inference_logprobs).exp(), inputs.advantages
    return torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))


def trusted(inputs):
    """prime-rl's default without the KL: 0 where the probability changed too much."""
    new, old, A = inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages
    gap = new.exp() - old.exp()
    inside = torch.where(A > 0, gap <= 0.2, gap >= -0.2)
    return -A * (new - old).exp().clamp(max=20).detach() * new * inside


def capped(inputs):
    new, old = inputs.trainer_logprobs, inputs.inference_logprobs
    return -(new - old).exp().clamp(max=1.2).detach() * inputs.advantages * new


def sequence_clipped(inputs):
    d = inputs.trainer_logprobs - inputs.inference_logprobs
    r = d[inputs.loss_mask].mean().exp()
    A = inputs.advantages
    return torch.maximum(-A * r, -A * r.clamp(0.97, 1.04))


def near_sampler(inputs, adv_tau=0.7, kl_tau=0.3):
    d = inputs.trainer_logprobs - inputs.inference_logprobs
    near = (inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()).abs() <= 0.1
    return torch.where(near, -adv_tau * inputs.advantages * d.exp(), 0.0) + kl_tau * d**2


def pulled_back(inputs):
    d = inputs.trainer_logprobs - inputs.inference_logprobs
    return -inputs.advantages * inputs.trainer_logprobs + (0.15 + 0.2) * d**2


CASES = {
    "grpo": ({}, clipped),
    "dapo": ({}, lambda inputs: clipped(inputs, high=0.28)),
    "dppo": ({"epsilon_low": 0.2, "epsilon_high": 0.2}, trusted),
    "cispo": ({"ratio_cap": 1.2}, capped),
    "gspo": ({"epsilon_low": 0.03, "epsilon_high": 0.04}, sequence_clipped),
    "ipo": ({"adv_tau": 0.7, "kl_tau": 0.3}, near_sampler),
    "dro": ({"proximal_coef": 0.3, "kl_tau": 0.2}, pulled_back),
}


def check(inputs, expected, objective, **settings):
    found = prime_rl.loss(inputs, objective=objective, **settings)
    assert isinstance(found, LossOutputs)
    torch.testing.assert_close(found.loss, expected)
    gradients = [torch.autograd.grad(x, inputs.trainer_logprobs) for x in (found.loss, expected)]
    torch.testing.assert_close(*gradients)
    return found


@pytest.mark.parametrize("objective", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_weighted_sum_over_tokens(objective, weighted):
    weights = normal(7, N, dtype=torch.float64).abs() if weighted else None
    inputs = make_inputs(loss_weights=weights)
    settings, term = CASES[objective]
    terms = term(inputs) * (1.0 if weights is None else weights)
    check(inputs, terms[inputs.loss_mask].sum(), objective, **settings)


def test_ipo_matches_formula():
    inputs = make_inputs()
    near = (inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()).abs() <= 0.1
    assert near[inputs.loss_mask].any() and not near[inputs.loss_mask].all()
    found = check(inputs, near_sampler(inputs, 1.0, 0.001)[inputs.loss_mask].sum(), "ipo")
    torch.testing.assert_close(
        found.metrics["is_masked"], (~near)[inputs.loss_mask].double().mean()
    )


def test_default_loss_of_prime_rl_0_8():
    """Its policy term is -A r while the probability is near, of which ours has the gradient."""
    inputs = make_inputs(loss_weights=normal(7, N, dtype=torch.float64).abs())
    new, old, A = inputs.trainer_logprobs, inputs.inference_logprobs, 0.7 * inputs.advantages
    gap, r = (new.exp() - old.exp()).detach(), (new - old).exp()
    masked = torch.where(A > 0, gap > 0.05, gap < -0.05)
    terms = (-A * r * ~masked + 0.001 * (new - old) ** 2) * inputs.loss_weights
    found = prime_rl.loss(
        inputs, objective="dppo", epsilon_low=0.05, epsilon_high=0.05, adv_tau=0.7, kl_tau=0.001
    )
    losses = (found.loss, terms[inputs.loss_mask].sum())
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in losses))
    mismatch, kept = (r - 1 - r.log()).detach(), inputs.loss_mask & ~masked
    dropped = inputs.loss_mask & masked
    assert dropped.any() and kept.any()
    expected = {
        "masked_mismatch_kl": mismatch[dropped].mean(),
        "unmasked_mismatch_kl": mismatch[kept].mean(),
        "masked_advantage_positive": (A > 0)[dropped].double().mean(),
        "masked_advantage_negative": (A < 0)[dropped].double().mean(),
        "is_masked": dropped.sum() / inputs.loss_mask.sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found.metrics[name], value.double())


def test_samples_add_up_to_batch_mean():
    """prime-rl's compute_loss divides the sum of samples by the tokens of the batch."""
    samples = [make_inputs(seed) for seed in (0, 10, 20)]
    scale = sum(sample.loss_mask.sum() for sample in samples)
    found = sum(prime_rl.loss(sample, objective="dapo").loss for sample in samples) / scale
    terms = torch.cat([clipped(sample, high=0.28)[sample.loss_mask] for sample in samples])
    torch.testing.assert_close(found, terms.mean())


def test_kl_to_reference_policy():
    ref = -normal(5, N, dtype=torch.float64).abs()
    inputs = make_inputs(ref_logprobs=ref)
    d = inputs.trainer_logprobs - ref
    terms = clipped(inputs) + 0.1 * (torch.exp(-d) - 1 + d)
    check(inputs, terms[inputs.loss_mask].sum(), "grpo", beta=0.1)
    check(inputs, clipped(inputs)[inputs.loss_mask].sum(), "grpo")  # ref_logprobs is ignored


def test_zero_weight_keeps_the_clip_of_its_token():
    """GMPO's ratio is a mean over a sequence's tokens, each clipped on one side."""
    gradients = []
    for weight in (0.0, 1e-20):
        inputs = make_inputs(
            advantages=torch.ones(N, dtype=torch.float64),
            loss_mask=torch.ones(N, dtype=torch.bool),
            loss_weights=torch.ones(N, dtype=torch.float64).index_fill(
                0, torch.tensor([2]), weight
            ),
        )
        inputs.trainer_logprobs.data[2] = inputs.inference_logprobs[2] + 3  # far outside the bound
        prime_rl.loss(inputs, objective="gmpo").loss.backward()
        gradients.append(inputs.trainer_logprobs.grad)
    torch.testing.assert_close(*gradients)


def test_metrics():
    inputs = make_inputs()
    metrics = prime_rl.loss(inputs, objective="dppo").metrics
    gap = (inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()).detach()
    high = (inputs.advantages > 0) & (gap > 0.15)
    low = (inputs.advantages < 0) & (gap < -0.15)
    expected = {"is_masked_high": high, "is_masked_low": low, "is_masked": high | low}
    for name, flags in expected.items():
        torch.testing.assert_close(metrics[name], flags[inputs.loss_mask].double().mean())
    assert metrics["is_masked"] > 0
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_all_masked():
    inputs = make_inputs(loss_mask=torch.zeros(N, dtype=torch.bool))
    found = prime_rl.loss(inputs)
    found.loss.backward()
    assert found.loss == 0 and not inputs.trainer_logprobs.grad.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "ppo"}, "objective must be one of 'grpo'.*got 'ppo'"),
        ({"objective": "reads_sequences"}, "objective must be one of"),
        ({"objective": "__init__"}, "objective must be one of"),
        ({"aggregation": "sequence_mean"}, "aggregation must be 'token_mean', got 'sequence_mean'"),
        ({"beta": 0.1}, "ref_logprob"),
        ({"entropy_coef": 0.1}, "entropy_coef must be off, got 0.1: LossInputs has no entropy"),
        ({"adv_tau": -1.0}, "adv_tau must be at least 0, got -1"),
        ({"kl_tau": -1.0}, "kl_tau must be at least 0, got -1"),
        (
            {"objective": "ipo", "kl_tau": 0.1, "sampler_penalty": 0.2},
            "kl_tau is the sampler_penalty of 'ipo': give one of them, got 0.1 and 0.2",
        ),
    ],
)
def test_unsupported_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        prime_rl.loss(make_inputs(), **settings)


def test_weights_scale_the_kl():
    weights, ref = normal(7, N, dtype=torch.float64).abs(), -normal(5, N, dtype=torch.float64).abs()
    inputs = make_inputs(loss_weights=weights, ref_logprobs=ref)
    d = inputs.trainer_logprobs - ref
    terms = weights * (clipped(inputs) + 0.1 * (torch.exp(-d) - 1 + d))
    check(inputs, terms[inputs.loss_mask].sum(), "grpo", beta=0.1)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_head_log_probs_and_entropies(softcap):
    head = prime_rl.FusedOutputLinear(4, 7, chunk_size=3, softcap=softcap).double()
    hidden = normal(0, 2, 5, 4, dtype=torch.float64).requires_grad_()
    labels = token_ids(1, 2, 5, V=7)
    temperature = torch.linspace(0.5, 2, 10, dtype=torch.float64).view(2, 5)
    found = head(hidden, labels, temperature=temperature, sampling_mask=None)
    logits = hidden @ head.weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    policy = torch.distributions.Categorical(logits=logits / temperature[..., None])
    expected = {"logprobs": policy.log_prob(labels), "entropy": policy.entropy()}
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad((x["logprobs"] + x["entropy"].square()).sum(), (hidden, head.weight))
        for x in (found, expected)
    ]  # fmt: skip
    torch.testing.assert_close(*gradients)


def test_head_in_fp32_with_hidden_states_in_bf16():
    head = prime_rl.FusedOutputLinear(4, 7, chunk_size=3)
    hidden = normal(0, 2, 5, 4).bfloat16().requires_grad_()
    found = head(hidden, token_ids(1, 2, 5, V=7), temperature=torch.ones(2, 5))["logprobs"]
    found.sum().backward()
    logits = hidden.double() @ head.weight.bfloat16().double().T
    expected = torch.distributions.Categorical(logits=logits).log_prob(token_ids(1, 2, 5, V=7))
    torch.testing.assert_close(found, expected.float())
    assert (head.weight.grad.dtype, hidden.grad.dtype) == (torch.float32, torch.bfloat16)


def test_head_with_sampling_mask():
    """Log-probs are over the kept tokens; without a usable mask they are over the vocabulary."""
    head = prime_rl.FusedOutputLinear(4, 7, chunk_size=3).double()
    hidden = normal(0, 1, 4, 4, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[3, 0, 6, 2]])
    mask = torch.tensor([[[3, 5, -1], [-1, -1, -1], [1, 2, 4], [6, 2, 0]]], dtype=torch.int32)
    temperature = torch.tensor([[0.5, 1.0, 2.0, 1.5]], dtype=torch.float64)
    found = head(hidden, labels, temperature=temperature, sampling_mask=mask)
    logits = (hidden @ head.weight.T) / temperature[..., None]
    kept = torch.ones(1, 4, 7, dtype=torch.bool)  # the third mask lacks its label
    kept[0, 0], kept[0, 3] = False, False
    kept[0, 0, [3, 5]], kept[0, 3, [6, 2, 0]] = True, True
    expected = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    expected = expected.gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(found["logprobs"], expected)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found["entropy"], entropy.detach())
    leaves = (hidden, head.weight)
    torch.testing.assert_close(
        torch.autograd.grad(found["logprobs"].square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
    )


def test_head_with_sampling_mask_of_other_positions_raises():
    head = prime_rl.FusedOutputLinear(4, 7, chunk_size=None)
    labels = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"the positions of labels, \(1, 2\), got shape \(1, 3"):
        mask = torch.zeros(1, 3, 1, dtype=torch.int64)
        head(torch.zeros(1, 2, 4), labels, torch.ones(1, 2), sampling_mask=mask)


@pytest.mark.parametrize("missing", ["labels", "temperature"])
def test_head_without_labels_or_temperature_raises(missing):
    head = prime_rl.FusedOutputLinear(4, 7, chunk_size=None)
    given = {"labels": torch.zeros(1, 2, dtype=torch.int64), "temperature": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=f"{missing} must be a tensor, got None"):
        head(torch.zeros(1, 2, 4), **given | {missing: None})
