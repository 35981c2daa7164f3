"""Random calls of the public functions, compared with float64 and checked for bitwise laws.

The suite draws a few. To draw many, run with a new seed each time:

    pytest tests/test_fuzz.py -k pytorch --hypothesis-profile=long --hypothesis-seed=1

draws 10,000 calls for the PyTorch backend, and as many wrong ones; `-k triton` draws 1,000 for the
kernels. With a GPU, `-k cuda` runs both backends there, on real kernels.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels
from grpo_kernels import LossConfig, approximate_kl_divergence, kl_divergence, policy_loss
from reference import losses
from tests.helpers.fuzz_cases import Call, calls
from tests.helpers.fuzz_errors import wrong_arguments
from tests.helpers.fuzz_laws import check_laws
from tests.helpers.fuzz_oracle import check_accuracy, results

pytestmark = pytest.mark.filterwarnings("ignore:std():UserWarning")  # std of zero groups
MANY = settings(max_examples=10 * settings.default.max_examples)


def check(call: Call, device: str) -> None:
    ours = results(call, device)
    check_accuracy(call, ours)
    check_laws(call, ours, device)


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
@MANY
@given(call=calls())
def test_random_calls_pytorch(backend, device, call):
    check(call, device)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@given(call=calls(most_rows=(2, 3), most_vocabulary=100))
def test_random_calls_triton(backend, device, call):
    check(call, device)


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
@MANY
@given(call=calls(most_rows=(2, 3)), data=st.data())
def test_wrong_argument_is_named_in_the_error(backend, call, data):
    name, wrong = data.draw(wrong_arguments(call))
    with pytest.raises((ValueError, TypeError), match=name):
        getattr(grpo_kernels, call.name)(**(call.arguments | {name: wrong}))


# Bugs that the fuzz found


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_k3_corrected_gradient_with_cancelling_terms(level):
    """The gradient r·d is a difference of two terms of e^19; autograd in fp32 was 24% off."""
    logprob = torch.tensor([[-20.25]], requires_grad=True)
    config = LossConfig(beta=1.0, kl_estimator="k3_corrected", ratio_level=level)
    ref_logprob = torch.full((1, 1), -1.25)
    loss = policy_loss(logprob, torch.zeros(1), ref_logprob=ref_logprob, config=config).loss
    (gradient,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close(gradient, torch.full((1, 1), -19.0), rtol=1e-6, atol=0)


def test_approximate_kl_rejects_strided_rows(backend):
    """The kernels silently read the memory between such entries."""
    logits = torch.randn(2, 5, 3).transpose(1, 2)
    with pytest.raises(ValueError, match="ref_logits must be contiguous in the last dimension"):
        approximate_kl_divergence(logits, logits)


@pytest.mark.parametrize("function", [kl_divergence, grpo_kernels.cross_entropy_from_logits])
def test_mean_over_zero_tokens_is_zero(backend, function):
    """The mean is 0 for every stride that PyTorch gives to a tensor without entries."""
    empty = torch.zeros(1, 2, 0, 3)
    reference_function = getattr(losses, function.__name__)
    assert function(empty, empty) == reference_function(empty, empty) == 0


@pytest.mark.parametrize("name", ["bias", "ref_bias", "ref_weight"])
def test_wrong_head_type_is_named(name):
    """A list has no requires_grad; a ref_ argument was reported under the policy's name."""
    head = {"ref_hidden": torch.zeros(1, 2), "ref_weight": torch.zeros(3, 2)}
    arguments = {"bias": torch.zeros(3), "ref_bias": torch.zeros(3), **head, name: [0.0, 0.0, 0.0]}
    hidden, weight, tokens = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64)
    config = LossConfig(beta=0.1, aggregation="token_mean")
    with pytest.raises(TypeError, match=f"^{name} must be a tensor"):
        grpo_kernels.linear_grpo_loss(
            hidden, weight, tokens, torch.ones(1), config=config, **arguments
        )


def test_inplace_loss_of_zero_tokens(backend):
    """A stride of 0 means no overlap in an empty tensor."""
    logits = torch.empty_strided((2, 0, 7), (7, 7, 0)).requires_grad_()
    tokens, advantages = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2)
    assert grpo_kernels.grpo_loss(logits, tokens, advantages, inplace=True).loss == 0


def test_token_with_logit_of_minus_infinity_has_no_gradient_there(backend):
    """The one-hot term of its log-prob, which is -inf, was added to the gradient."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    logprob = grpo_kernels.token_stats(logits, torch.tensor([1])).logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    p = torch.softmax(torch.tensor([0.0, 1.0]), dim=-1)
    torch.testing.assert_close(gradient, torch.tensor([[-p[0], 0.0, -p[1]]]))
