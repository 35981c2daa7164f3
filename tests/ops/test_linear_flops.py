"""Matmul FLOPs of the linear ops, counted by the profiler."""

import pytest
import torch

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats, pack_tokens
from tests.helpers.count_flops import count_flops
from tests.helpers.linear import make_linear_case, without_reference
from tests.helpers.tensors import coin, normal

N, V, H = 64, 96, 16
MATMUL = 2 * V * H  # FLOPs of one matmul, per token
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0])


def make_inputs(dtype):
    case = without_reference(make_linear_case(0, 4, N // 4, V=V, H=H, dtype=dtype, bias=False))
    case.pop("bias")
    return case["hidden"].requires_grad_(), case["weight"].requires_grad_(), case["tokens"]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def inputs(request, pytorch_backend):
    return make_inputs(request.param)


def count_loss_flops(inputs, advantages=ADVANTAGES, **keywords):
    """FLOPs of the loss and its backward."""
    return count_flops(lambda: linear_grpo_loss(*inputs, advantages, **keywords).loss.backward())


@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_token_level_loss_takes_three_matmuls(inputs, chunk_tokens):
    assert count_loss_flops(inputs, chunk_tokens=chunk_tokens) == 3 * N * MATMUL


def count_stats_matmuls(inputs, names=("logprob",), **keywords):
    """Matmuls of linear_token_stats, and of the backward of the sum of these statistics."""
    stats = []
    forward = count_flops(lambda: stats.append(linear_token_stats(*inputs, **keywords)))
    total = sum(getattr(stats[0], name).sum() for name in names)
    backward = count_flops(total.backward)
    return forward / (N * MATMUL), backward / (N * MATMUL)


@pytest.mark.parametrize(("chunk_tokens", "matmuls"), [(None, 3), (N, 3), (16, 4)])
def test_sequence_level_loss_makes_the_logits_of_one_chunk_once(inputs, chunk_tokens, matmuls):
    flops = count_loss_flops(inputs, config=LossConfig.gspo(), chunk_tokens=chunk_tokens)
    assert flops == matmuls * N * MATMUL


@pytest.mark.parametrize(("chunk_tokens", "backward"), [(None, 2), (N, 2), (16, 3)])
def test_token_stats_make_the_logits_of_one_chunk_once(inputs, chunk_tokens, backward):
    for names in (("logprob",), ("logprob", "entropy")):
        matmuls = count_stats_matmuls(inputs, names, chunk_tokens=chunk_tokens)
        assert matmuls == (1, backward)
    with torch.no_grad():
        flops = count_flops(lambda: linear_token_stats(*inputs, chunk_tokens=chunk_tokens))
    assert flops == N * MATMUL


def test_frozen_head_takes_two_matmuls(inputs):
    hidden, weight, tokens = inputs
    weight.requires_grad_(False)
    reference = {"ref_hidden": hidden.detach(), "ref_weight": weight, "kl": "reverse"}
    both, all_three = ("logprob", "entropy"), ("logprob", "entropy", "kl")
    # One chunk, whose logits are kept.
    assert count_stats_matmuls(inputs) == (1, 1)
    assert count_stats_matmuls(inputs, both) == (1, 1)
    assert count_stats_matmuls(inputs, all_three, **reference) == (2, 1)
    # Several chunks: forward computes the gradients in the hidden states.
    chunks = {"chunk_tokens": 16}
    assert count_stats_matmuls(inputs, **chunks) == (2, 0)
    assert count_stats_matmuls(inputs, both, entropy_grad=True, **chunks) == (3, 0)
    assert count_stats_matmuls(inputs, ("entropy",), entropy_grad=True, **chunks) == (3, 0)
    assert count_stats_matmuls(inputs, both, **chunks) == (2, 2), "without the hint"
    kl_and_logprob = ("logprob", "kl")
    assert count_stats_matmuls(inputs, kl_and_logprob, **chunks, **reference) == (4, 0)
    # Without a gradient there is nothing to prepare.
    with torch.no_grad():
        assert count_flops(lambda: linear_token_stats(*inputs, **chunks)) == N * MATMUL
    assert count_flops(lambda: linear_token_stats(hidden.detach(), weight, tokens, **chunks)) == (
        N * MATMUL
    )


def test_loss_without_gradient_takes_one_matmul(inputs):
    with torch.no_grad():
        assert count_flops(lambda: linear_grpo_loss(*inputs, ADVANTAGES)) == N * MATMUL


@pytest.mark.parametrize("packed", [False, True])
def test_masked_and_zero_advantage_tokens_skip_matmuls(inputs, packed):
    """Half of the tokens are masked, and 30% of the others have an advantage of 0."""
    mask = torch.zeros(N, dtype=torch.bool)
    mask[normal(1, N).argsort()[: N // 2]] = True
    advantages = normal(2, N)
    num_zero = round(0.3 * mask.sum().item())
    advantages[mask.nonzero()[:num_zero]] = 0.0
    mask, advantages = mask.view(4, -1), advantages.view(4, -1)
    num_active = N // 2 - num_zero
    packing = {"packing": pack_tokens(mask, advantages)} if packed else {}
    flops = count_loss_flops(inputs, advantages, mask=mask, **packing)
    assert flops == (N // 2 + 2 * num_active) * MATMUL
    # A KL or an entropy bonus gives every token a gradient.
    config = LossConfig(entropy_coef=0.1)
    flops = count_loss_flops(inputs, advantages, mask=mask, config=config, **packing)
    assert flops == 3 * (N // 2) * MATMUL


def test_zero_advantage_sequences_skip_matmuls(inputs):
    mask = coin(3, 4, N // 4)
    advantages = torch.tensor([1.0, 0.0, 0.0, -1.0])
    num_active = mask[[0, 3]].sum().item()
    for chunk_tokens, with_grad in ((None, 2), (5, 3)):
        flops = count_loss_flops(
            inputs, advantages, mask=mask, config=LossConfig.gspo(), chunk_tokens=chunk_tokens
        )
        assert flops == (mask.sum().item() + with_grad * num_active) * MATMUL
    inputs[1].requires_grad_(False)
    flops = count_loss_flops(
        inputs, advantages, mask=mask, config=LossConfig.gspo(), chunk_tokens=5
    )
    assert flops == (mask.sum().item() + num_active) * MATMUL


@pytest.mark.parametrize("chunk_tokens", [None, 16])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_loss_with_a_frozen_input(inputs, level, frozen, chunk_tokens):
    hidden, weight, _ = inputs
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    makes_logits_again = level == "sequence" and frozen == "hidden" and chunk_tokens
    for entropy_coef in (0.0, 0.1):
        config = LossConfig(ratio_level=level, entropy_coef=entropy_coef)
        flops = count_loss_flops(inputs, config=config, chunk_tokens=chunk_tokens)
        has_second_vector = level == "sequence" and frozen == "weight" and chunk_tokens
        has_second_vector = has_second_vector and entropy_coef != 0
        assert flops == (3 if makes_logits_again or has_second_vector else 2) * N * MATMUL


def test_full_kl_adds_one_matmul(inputs):
    hidden, weight, _ = inputs
    reference = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
    config = LossConfig(beta=0.1, kl_estimator="reverse")
    assert count_loss_flops(inputs, config=config, **reference) == 4 * N * MATMUL
    with torch.no_grad():
        flops = count_flops(lambda: linear_token_stats(*inputs, kl="forward", **reference))
    assert flops == 2 * N * MATMUL


def test_tokens_with_zero_upstream_gradient_skip_matmuls(inputs):
    """On the CPU, zeros in the upstream gradient are detected."""
    d_logprob = torch.zeros(4, N // 4)
    d_logprob[1, 3:9] = 1.0
    for chunk_tokens, matmuls in ((None, 2), (16, 3)):
        stats = linear_token_stats(*inputs, chunk_tokens=chunk_tokens)
        total = (stats.logprob * d_logprob).sum()
        padded = 6 if chunk_tokens is None else chunk_tokens
        assert count_flops(total.backward) == matmuls * padded * MATMUL
