"""The floating-point operations of the matrix products actually issued, counted by the profiler."""

import pytest
import torch

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats, pack_tokens
from grpo_kernels.backends import use
from tests.helpers.count_flops import count_flops
from tests.helpers.linear import make_linear_case, without_reference
from tests.helpers.tensors import coin, normal

N, V, H = 64, 96, 16
PRODUCT = 2 * V * H  # operations of one product, for one token


def make_inputs(dtype):
    case = without_reference(make_linear_case(0, 4, N // 4, V=V, H=H, dtype=dtype, bias=False))
    case.pop("bias")
    return case["hidden"].requires_grad_(), case["weight"].requires_grad_(), case["tokens"]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def inputs(request, monkeypatch):
    use("pytorch")  # the products are the same, the rest is faster
    return make_inputs(request.param)


def token_level(inputs, advantages, **keywords):
    def call():
        linear_grpo_loss(*inputs, advantages, **keywords).loss.backward()

    return call


LIVE = torch.tensor([1.0, -1.0, 0.5, 2.0])


@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_token_level_loss_takes_three_matmuls(inputs, chunk_tokens):
    call = token_level(inputs, LIVE, chunk_tokens=chunk_tokens)
    assert count_flops(call) == 3 * N * PRODUCT


def test_sequence_level_loss_takes_four_matmuls(inputs):
    call = token_level(inputs, LIVE, config=LossConfig.gspo())
    assert count_flops(call) == 4 * N * PRODUCT


def test_token_stats_take_one_matmul_and_three_in_backward(inputs):
    with torch.no_grad():
        assert count_flops(lambda: linear_token_stats(*inputs)) == N * PRODUCT
    assert count_flops(lambda: linear_token_stats(*inputs)) == N * PRODUCT
    stats = linear_token_stats(*inputs)
    assert count_flops(lambda: (stats.logprob + stats.entropy).sum().backward()) == 3 * N * PRODUCT


def test_loss_without_gradient_takes_one_matmul(inputs):
    with torch.no_grad():
        assert count_flops(lambda: linear_grpo_loss(*inputs, LIVE)) == N * PRODUCT


@pytest.mark.parametrize("packed", [False, True])
def test_masked_and_zero_advantage_tokens_skip_matmuls(inputs, packed):
    """Half of the tokens masked, and 30% of the others without a signal."""
    mask = torch.zeros(N, dtype=torch.bool)
    mask[normal(1, N).argsort()[: N // 2]] = True
    advantages = normal(2, N)
    inert = round(0.3 * mask.sum().item())
    advantages[mask.nonzero()[:inert]] = 0.0
    mask, advantages = mask.view(4, -1), advantages.view(4, -1)
    live = N // 2 - inert
    packing = {"packing": pack_tokens(mask, advantages)} if packed else {}
    call = token_level(inputs, advantages, mask=mask, **packing)
    assert count_flops(call) == (N // 2 + 2 * live) * PRODUCT
    # A KL or an entropy bonus acts on every token.
    config = LossConfig(entropy_coef=0.1)
    call = token_level(inputs, advantages, mask=mask, config=config, **packing)
    assert count_flops(call) == 3 * (N // 2) * PRODUCT


def test_zero_advantage_sequences_skip_matmuls(inputs):
    mask = coin(3, 4, N // 4)
    advantages = torch.tensor([1.0, 0.0, 0.0, -1.0])
    live = mask[[0, 3]].sum().item()
    call = token_level(inputs, advantages, mask=mask, config=LossConfig.gspo())
    assert count_flops(call) == (mask.sum().item() + 3 * live) * PRODUCT


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_takes_no_gradient_matmul(inputs, level, frozen):
    hidden, weight, tokens = inputs
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    call = token_level((hidden, weight, tokens), LIVE, config=LossConfig(ratio_level=level))
    assert count_flops(call) == (2 if level == "token" else 3) * N * PRODUCT


def test_full_kl_adds_one_matmul(inputs):
    hidden, weight, _ = inputs
    reference = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
    config = LossConfig(beta=0.1, kl_estimator="reverse")
    call = token_level(inputs, LIVE, config=config, **reference)
    assert count_flops(call) == 4 * N * PRODUCT
    with torch.no_grad():
        call = lambda: linear_token_stats(*inputs, kl="forward", **reference)  # noqa: E731
        assert count_flops(call) == 2 * N * PRODUCT


def test_tokens_with_zero_upstream_gradient_skip_matmuls(inputs):
    """Looking is free on the CPU: an upstream gradient of 0 is seen."""
    stats = linear_token_stats(*inputs)
    reached = torch.zeros(4, N // 4)
    reached[1, 3:9] = 1.0
    assert count_flops(lambda: (stats.logprob * reached).sum().backward()) == 3 * 6 * PRODUCT
