"""Whole drawn calls of the public functions against float64, and what must hold to the last bit.

The suite draws a few. For many, at random, run with another seed each time:

    pytest tests/test_fuzz.py -k pytorch --hypothesis-profile=long --hypothesis-seed=1

draws 10,000 calls for the PyTorch backend, and as many wrong ones; `-k interpreted` draws 1,000 for
the kernels. Where there is a GPU, `-k cuda` runs both backends there, on real kernels.
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

pytestmark = pytest.mark.filterwarnings("ignore:std():UserWarning")  # of no group at all
MANY = settings(max_examples=10 * settings.default.max_examples)


def check(call: Call, device: str) -> None:
    ours = results(call, device)
    check_accuracy(call, ours)
    check_laws(call, ours, device)


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
@MANY
@given(call=calls())
def test_drawn_calls_are_exact_and_lawful_in_the_eager_room(backend, device, call):
    check(call, device)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@given(call=calls(most_rows=(2, 3), most_vocabulary=100))
def test_drawn_calls_are_exact_and_lawful_in_interpreted_or_real_kernels(backend, device, call):
    check(call, device)


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
@MANY
@given(call=calls(most_rows=(2, 3)), data=st.data())
def test_a_wrong_argument_is_an_error_that_names_it(backend, call, data):
    name, wrong = data.draw(wrong_arguments(call))
    with pytest.raises((ValueError, TypeError), match=name):
        getattr(grpo_kernels, call.name)(**(call.arguments | {name: wrong}))


# What the fuzz found


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_of_k3_corrected_is_exact_where_its_terms_cancel(level):
    """r·d of two terms of e^19; autograd's own in fp32 were 24% off."""
    logprob = torch.tensor([[-20.25]], requires_grad=True)
    config = LossConfig(beta=1.0, kl_estimator="k3_corrected", ratio_level=level)
    ref_logprob = torch.full((1, 1), -1.25)
    loss = policy_loss(logprob, torch.zeros(1), ref_logprob=ref_logprob, config=config).loss
    (gradient,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close(gradient, torch.full((1, 1), -19.0), rtol=1e-6, atol=0)


def test_approximate_kl_refuses_rows_with_gaps(backend):
    """The kernels read the neighbours of such entries, and said nothing."""
    logits = torch.randn(2, 5, 3).transpose(1, 2)
    with pytest.raises(ValueError, match="ref_logits must be contiguous in the last dimension"):
        approximate_kl_divergence(logits, logits)


@pytest.mark.parametrize("function", [kl_divergence, grpo_kernels.cross_entropy_from_logits])
def test_no_tokens_at_all_have_a_mean_of_zero(backend, function):
    """The mean is 0 for every stride that PyTorch gives to a tensor without entries."""
    nothing = torch.zeros(1, 2, 0, 3)
    reference_function = getattr(losses, function.__name__)
    assert function(nothing, nothing) == reference_function(nothing, nothing) == 0


@pytest.mark.parametrize("name", ["bias", "ref_bias", "ref_weight"])
def test_a_head_that_is_not_one_is_named(name):
    """A list had no requires_grad; a reference's was named as if it were the policy's."""
    head = {"ref_hidden": torch.zeros(1, 2), "ref_weight": torch.zeros(3, 2)}
    arguments = {"bias": torch.zeros(3), "ref_bias": torch.zeros(3), **head, name: [0.0, 0.0, 0.0]}
    hidden, weight, tokens = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64)
    config = LossConfig(beta=0.1, aggregation="token_mean")
    with pytest.raises(TypeError, match=f"^{name} must be a tensor"):
        grpo_kernels.linear_grpo_loss(
            hidden, weight, tokens, torch.ones(1), config=config, **arguments
        )


def test_no_tokens_at_all_can_be_consumed(backend):
    """A stride of 0 is no overlap there."""
    logits = torch.empty_strided((2, 0, 7), (7, 7, 0)).requires_grad_()
    tokens, advantages = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2)
    assert grpo_kernels.grpo_loss(logits, tokens, advantages, inplace=True).loss == 0


def test_a_token_of_an_excluded_entry_has_no_gradient_there(backend):
    """The one-hot term of its log-prob, which is -inf, was added to it."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    logprob = grpo_kernels.token_stats(logits, torch.tensor([1])).logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    p = torch.softmax(torch.tensor([0.0, 1.0]), dim=-1)
    torch.testing.assert_close(gradient, torch.tensor([[-p[0], 0.0, -p[1]]]))
