"""A NaN in an unmasked log-prob or hidden state reaches the gradient wherever autograd's would."""

import pytest
import torch

from grpo_kernels import LossConfig, backends, grpo_loss, linear_grpo_loss
from grpo_kernels.objective.kl_estimators import VOCABULARY_KL
from reference import losses
from tests.helpers.grpo_loss import CONFIGS, make_inputs
from tests.helpers.tensors import normal

INPUTS = ["old_logprob", "sampling_logprob", "ref_logprob"]


def nan_rows(function, inputs, keywords):
    """Which tokens have a NaN in their gradient, and whether the loss is NaN."""
    leaf = inputs[0].detach().clone().requires_grad_()
    loss = function(leaf, *inputs[1:], **keywords).loss
    loss.backward()
    return loss.isnan().item(), leaf.grad.isnan().any(-1)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_nan_is_where_that_of_autograd_is(pytorch_backend, config, name):
    """The kernels are compared with PyTorch's backend below."""
    logits, tokens, advantages, given = make_inputs(3, 2, 3, dtype=torch.float32)
    given["ref_logprob"] = given["old_logprob"] - 0.1
    given["mask"] = torch.tensor([[True, True, False], [True, True, True]])
    given["nll_weight"] = given["nll_weight"] if CONFIGS[config].nll_coef else None
    given["config"] = CONFIGS[config]
    if CONFIGS[config].kl_estimator in VOCABULARY_KL:
        del given["ref_logprob"]
        if name == "ref_logprob":
            given["ref_logits"][0, 1, 3] = torch.nan
    else:
        del given["ref_logits"]
    if name in given:
        given[name] = given[name].clone()
        given[name][0, 1] = torch.nan
    inputs = (logits, tokens, advantages)
    expected = nan_rows(losses.grpo_loss, inputs, given)
    found = nan_rows(grpo_loss, inputs, given)
    # The reference drops a token whose importance weight is NaN; here it stays visible.
    assert found[0] or not expected[0]
    # Where the surrogate's gradient is 0, autograd never multiplies it by a weight of NaN.
    expected[1][0, 1] |= found[1][0, 1]
    assert torch.equal(found[1], expected[1])


def test_nan_of_a_hidden_state_reaches_its_gradient(backend):
    hidden, weight = normal(1, 1, 4, 5), normal(2, 9, 5)
    hidden[0, 1, 0] = torch.nan
    tokens = torch.tensor([[1, 3, 5, 7]])
    old = torch.full((1, 4), -2.2)
    mask = torch.tensor([[True, True, True, False]])
    inputs = (hidden, weight, tokens, torch.ones(1))
    keywords = {"old_logprob": old, "mask": mask, "config": LossConfig()}
    for function in (losses.linear_grpo_loss, linear_grpo_loss):
        is_nan, rows = nan_rows(function, inputs, keywords)
        assert is_nan and rows.tolist() == [[False, True, False, False]]


SPECIAL = [
    (name, x) for name in (*INPUTS, "advantages") for x in (torch.inf, -torch.inf, torch.nan)
]


@pytest.mark.skipif(not backends.INTERPRETED, reason="both backends on one device")
@pytest.mark.parametrize("config", CONFIGS)
def test_infinite_losses_have_the_same_gradient_in_both_backends(config):
    """Each sequence has one special number, at its first token."""
    B = len(SPECIAL)
    logits, tokens, advantages, given = make_inputs(3, B, 2, sequences=B, dtype=torch.float32)
    given["ref_logprob"] = given["old_logprob"] - 0.1
    del given["mask"]
    given["nll_weight"] = given["nll_weight"] if CONFIGS[config].nll_coef else None
    del given["ref_logprob" if CONFIGS[config].kl_estimator in VOCABULARY_KL else "ref_logits"]
    values = given | {"advantages": advantages.unsqueeze(-1).repeat(1, 2)}
    for row, (name, value) in enumerate(SPECIAL):
        if values.get(name) is not None:
            values[name] = values[name].clone()
            values[name][row, 0] = value
    advantages = values.pop("advantages")
    found = []
    for backend in ("pytorch", "triton"):
        leaf = logits.clone().requires_grad_()
        with backends.use(backend):
            grpo_loss(leaf, tokens, advantages, config=CONFIGS[config], **values).loss.backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", INPUTS[:2])
def test_advantage_of_zero_has_no_gradient_beside_a_nan(backend, name):
    logits, tokens, _, given = make_inputs(3, 2, 3, dtype=torch.float32)
    keywords = {key: given[key].clone() for key in INPUTS[:2]}
    keywords[name][0] = torch.nan
    leaf = logits.clone().requires_grad_()
    advantages = torch.tensor([0.0, 1.0])
    grpo_loss(leaf, tokens, advantages, config=LossConfig(), **keywords).loss.backward()
    assert (leaf.grad[0] == 0).all() and leaf.grad[1].isfinite().all()
