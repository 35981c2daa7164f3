"""grpo_loss against the reference implementation: value, gradient and metrics over configs."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_kernels import LossConfig, grpo_loss, policy_loss, token_stats
from reference import losses
from tests.helpers.grpo_loss import CONFIGS, B, T, make_inputs, run
from tests.helpers.loss_configs import loss_configs
from tests.helpers.tensors import normal


def check_against_reference(logits, tokens, advantages, config, **keywords):
    case = (logits, tokens, advantages, 1.7)
    loss, metrics, gradient = run(grpo_loss, *case, config=config, **keywords)
    exact_loss, exact_metrics, exact = run(losses.grpo_loss, *case, config=config, **keywords)
    tight = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(loss, exact_loss, **tight)
    torch.testing.assert_close(gradient, exact, **tight)
    assert metrics.keys() == exact_metrics.keys()
    for name, value in metrics.items():
        assert value.dim() == 0 and not value.requires_grad, name
        torch.testing.assert_close(value, exact_metrics[name], **tight)
    return loss, metrics, gradient


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_gradient_and_metrics_match_reference(backend, name):
    logits, tokens, advantages, keywords = make_inputs(11, B, T)
    _, metrics, gradient = check_against_reference(
        logits, tokens, advantages, CONFIGS[name], temperature=0.8, **keywords
    )
    assert (gradient[~keywords["mask"]] == 0).all() and gradient.abs().sum() > 0
    assert {"kl", "entropy", "policy_loss", "num_tokens"} <= metrics.keys()


@pytest.mark.parametrize("name", ["grpo", "every term", "gspo", "beta, k3"])
def test_packed_input_matches_reference_and_padded_batch(backend, name):
    logits, tokens, advantages, keywords = make_inputs(2, 5, sequences=2)
    config, cu_seqlens = CONFIGS[name], torch.tensor([0, 2, 5])
    keywords["mask"] = torch.tensor([True, True, True, False, True])
    loss, metrics, gradient = check_against_reference(
        logits, tokens, advantages, config, cu_seqlens=cu_seqlens, softcap=20.0, **keywords
    )
    rows = torch.tensor([[0, 1, 1], [2, 3, 4]])  # the last of the first row is padding
    padded = {key: value[rows] for key, value in keywords.items()}
    padded["mask"][0, 2] = False
    padded_loss, padded_metrics, padded_gradient = run(
        grpo_loss,
        logits[rows],
        tokens[rows],
        advantages,
        1.7,
        config=config,
        softcap=20.0,
        **padded,
    )
    torch.testing.assert_close(loss, padded_loss)
    torch.testing.assert_close(metrics, padded_metrics)
    torch.testing.assert_close(gradient, padded_gradient.flatten(0, 1)[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("name", ["nll", "nll, gspo"])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_nll_outside_of_the_mask(backend, name, per_sequence):
    logits, tokens, advantages, keywords = make_inputs(3, B, T)
    weight = torch.tensor([0.7, 0.0]) if per_sequence else torch.tensor([[0.0, 2, -1], [0, 0, 3]])
    spread = weight[:, None].expand(B, T) if per_sequence else weight
    keywords |= {"mask": torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), "nll_weight": weight}
    _, _, gradient = check_against_reference(logits, tokens, advantages, CONFIGS[name], **keywords)
    masked = ~keywords["mask"]
    assert (gradient[masked & (spread == 0)] == 0).all()
    # Of a masked token: 1.7·0.3·weight/count·(p - onehot), nothing from the policy or the entropy.
    expected = logits.softmax(-1) - torch.nn.functional.one_hot(tokens, logits.shape[-1])
    expected = 1.7 * 0.3 / int((spread != 0).sum()) * spread.double().unsqueeze(-1) * expected
    torch.testing.assert_close(gradient[masked], expected[masked], rtol=1e-9, atol=1e-12)


def test_nll_alone_is_cross_entropy(backend):
    logits, tokens, _, _ = make_inputs(4, B, T)
    nothing, weight = torch.zeros(B, T), torch.ones(B)
    loss, metrics, gradient = run(
        grpo_loss, logits, tokens, nothing, mask=nothing, nll_weight=weight,
        config=LossConfig(nll_coef=1.0),
    )  # fmt: skip
    leaf = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(metrics["nll_loss"], expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_ratio_exactly_on_both_clip_bounds_keeps_its_gradient(backend):
    logits, tokens, _, _ = make_inputs(7, B, T)
    advantages = torch.tensor([0.7, -0.7], dtype=logits.dtype)
    config = LossConfig(epsilon_low=0.0, epsilon_high=0.0)  # without old_logprob r is exactly 1
    _, _, gradient = check_against_reference(logits, tokens, advantages, config)
    _, _, expected = run(
        losses.grpo_loss, logits, tokens, advantages, 1.7, config=LossConfig(surrogate="reinforce")
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert gradient.abs().sum() > 0


LN2 = math.log(2.0)
# The log-prob is -ln 2: (config, argument that meets the bound, its value, advantage, d_logprob)
ON_BOUND = [
    (LossConfig(delta=2.0), "old_logprob", -2 * LN2, -1.0, 2.0),
    (LossConfig(dual_clip=2.0), "old_logprob", -2 * LN2, -1.0, 2.0),
    (LossConfig(epsilon_high=1.0), "old_logprob", -2 * LN2, 1.0, -2.0),
    (LossConfig(epsilon_low=0.5), "old_logprob", 0.0, -1.0, 0.5),
    (LossConfig(surrogate="ratio"), "old_logprob", -LN2 - 20, 1.0, -math.exp(20)),
    (LossConfig(surrogate="ratio"), "old_logprob", -LN2 + 20, 1.0, -math.exp(-20)),
    (LossConfig.dppo(epsilon_high=0.25, ratio_cap=9.0), "old_logprob", -2 * LN2, 1.0, -2.0),
    (LossConfig.dppo(epsilon_low=0.5, ratio_cap=9.0), "old_logprob", 0.0, -1.0, 0.5),
    (
        LossConfig.ipo(epsilon_high=0.25, sampler_penalty=0.0),
        "sampling_logprob",
        -2 * LN2,
        1.0,
        -2.0,
    ),
    (LossConfig.ipo(epsilon_low=0.5, sampler_penalty=0.0), "sampling_logprob", 0.0, 1.0, -0.5),
    (LossConfig.rollout_is(epsilon_high=1.0), "sampling_logprob", -2 * LN2, 1.0, 0.0),
    (LossConfig.rollout_is(epsilon_low=0.5), "sampling_logprob", 0.0, 1.0, 0.0),
    (
        LossConfig(importance_cap=2.0, importance_mode="mask"),
        "sampling_logprob",
        -2 * LN2,
        1.0,
        -2.0,
    ),
    (LossConfig(beta=1.0), "ref_logprob", 20 - LN2, 0.0, 1 - math.exp(20)),
    (LossConfig(beta=1.0, kl_estimator="abs"), "ref_logprob", -LN2, 0.0, 0.0),
    *(  # a binary KL that rounding makes negative
        (
            LossConfig.dppo_kl(epsilon_low=0.0, ratio_cap=9.0),
            "old_logprob",
            -LN2 - x,
            -1.0,
            math.exp(x),
        )
        for x in (1e-8, 1e-13, 1e-15)
    ),
]


@pytest.mark.parametrize(("config", "name", "value", "advantage", "d_logprob"), ON_BOUND)
def test_gradient_exactly_on_a_bound(backend, config, name, value, advantage, d_logprob):
    logits = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    given = {name: torch.tensor([[value]], dtype=torch.float64)}
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, _ = grpo_loss(logits, torch.tensor([[0]]), advantages, config=config, **given)
    loss.backward()
    expected = d_logprob * torch.tensor([[[0.5, -0.5]]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=0)


def test_corrected_k3_does_not_cancel_in_fp32(backend):
    """Its gradient is r·d: of the two terms of the product rule e^19 would be left to cancel."""
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    config = LossConfig(beta=1.0, kl_estimator="k3_corrected")
    ref_logprob = torch.tensor([[19.0 - LN2]])
    loss, _ = grpo_loss(
        logits, torch.tensor([[0]]), torch.zeros(1), ref_logprob=ref_logprob, config=config
    )
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[-9.5, 9.5]]]))


@pytest.mark.parametrize("advantages", ["per sequence", "per token"])
@pytest.mark.parametrize("optional", ["nothing", "ref_logprob"])
def test_optional_inputs_match_reference(backend, advantages, optional):
    logits, tokens, per_sequence, _ = make_inputs(11, B, T)
    given = per_sequence if advantages == "per sequence" else normal(9, B, T, dtype=torch.float64)
    keywords = {}
    if optional == "ref_logprob":
        keywords["ref_logprob"] = -normal(8, B, T, dtype=torch.float64).abs()
    config = LossConfig(beta=0.1 if keywords else 0.0, entropy_coef=0.02)
    check_against_reference(logits, tokens, given, config, **keywords)


@given(seed=st.integers(0, 2**31), config=loss_configs(), per_token=st.booleans())
@settings(max_examples=12)
@example(0, LossConfig.gspo(kl_estimator="reverse", beta=0.2, entropy_coef=0.1), False)
def test_any_config_matches_reference(backend, seed, config, per_token):
    logits, tokens, advantages, keywords = make_inputs(seed, B, T)
    if per_token:
        advantages = normal(seed + 6, B, T, dtype=torch.float64)
    check_against_reference(logits, tokens, advantages, config, **keywords)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_micro_batches_add_up_to_batch(backend, aggregation):
    logits, tokens, advantages, keywords = make_inputs(11, B, T)
    config = LossConfig(aggregation=aggregation, entropy_coef=0.1, beta=0.1)
    whole_loss, _, whole = run(grpo_loss, logits, tokens, advantages, config=config, **keywords)
    num_tokens = keywords["mask"].sum()
    normalizer = num_tokens if aggregation == "token_mean" else B
    total, gradients = 0.0, []
    for sequences in (slice(0, 1), slice(1, 2)):
        batch = {name: value[sequences] for name, value in keywords.items()}
        loss, _, gradient = run(
            grpo_loss, logits[sequences], tokens[sequences], advantages[sequences], config=config,
            normalizer=normalizer, entropy_normalizer=num_tokens, **batch,
        )  # fmt: skip
        total, gradients = total + loss, [*gradients, gradient]
    torch.testing.assert_close(total, whole_loss)
    torch.testing.assert_close(torch.cat(gradients), whole)


def test_grpo_loss_equals_policy_loss_of_token_stats(backend):
    """Bitwise, in fp32."""
    logits, tokens, advantages, keywords = make_inputs(5, B, T, dtype=torch.float32)
    config = LossConfig(beta=0.1, kl_estimator="reverse", entropy_coef=0.1)
    ref_logits = keywords.pop("ref_logits")
    loss, _ = grpo_loss(
        logits, tokens, advantages, config=config, ref_logits=ref_logits, **keywords
    )
    stats = token_stats(logits, tokens, mask=keywords["mask"], kl="reverse", ref_logits=ref_logits)
    again, _ = policy_loss(
        stats.logprob, advantages, entropy=stats.entropy, kl=stats.kl, config=config, **keywords
    )
    assert loss.dtype == torch.float32 and torch.equal(loss, again)


def test_all_tokens_masked(backend):
    logits, tokens, advantages, keywords = make_inputs(11, B, T)
    keywords["mask"] = torch.zeros(B, T, dtype=torch.bool)
    config = LossConfig(beta=0.1, kl_estimator="forward", entropy_coef=0.1)
    loss, metrics, gradient = run(
        grpo_loss, logits * torch.nan, tokens - 1000, advantages, config=config, **keywords
    )
    assert loss == 0 and (gradient == 0).all()
    assert all((value == 0).all() for value in metrics.values())


def test_zero_advantage_gives_zero_gradient(backend):
    logits, tokens, advantages, keywords = make_inputs(11, B, T)
    _, _, gradient = run(grpo_loss, logits, tokens, advantages * 0, **keywords)
    assert (gradient == 0).all()


def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    logits, tokens, advantages, keywords = make_inputs(8, B, T, dtype=torch.float32)
    config = LossConfig(beta=0.1, kl_estimator="reverse", entropy_coef=0.1)
    compiled = torch.compile(grpo_loss, backend="aot_eager", fullgraph=True)
    expected = run(grpo_loss, logits, tokens, advantages, config=config, **keywords)
    actual = run(compiled, logits, tokens, advantages, config=config, **keywords)
    torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


def test_config_may_be_built_in_a_compiled_function(backend):
    torch._dynamo.reset()
    logits, tokens, advantages, _ = make_inputs(8, B, T, dtype=torch.float32)

    def compute_loss(logits):
        return grpo_loss(logits, tokens, advantages, config=LossConfig.gspo(delta=3)).loss

    compiled = torch.compile(compute_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), compute_loss(logits))
    torch._dynamo.reset()
