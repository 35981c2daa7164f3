"""Accuracy of bf16 and peak memory at the size of a real vocabulary."""

import pytest
import torch

import grpo_kernels
from benchmarks.core.memory import peak_tensor_bytes
from grpo_kernels import linear_grpo_loss, linear_token_stats
from grpo_kernels.backends.pytorch import softmax
from grpo_kernels.lm_head import chunk_size, matmul
from reference import losses
from tests.helpers.linear import relative_error
from tests.helpers.tensors import normal, token_ids

MIB = 1 << 20


def make_head(N, V, H, *, dtype=torch.bfloat16, std=4.0):
    """Hidden states, weight and tokens; `std` is the standard deviation of the logits."""
    hidden = normal(0, N, H, dtype=dtype)
    weight = normal(1, V, H, dtype=dtype, std=std / H**0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), token_ids(2, N, V=V)


@pytest.mark.slow
def test_bf16_accuracy_at_vocabulary_65_536(pytorch_backend):
    """Logits have std 4; rounding them to bf16 would cost 1.4e-2 of log-prob."""
    hidden, weight, tokens = make_head(64, 65_536, 256)
    d_logprob, d_entropy = normal(3, 64), normal(4, 64)

    def results(module, *leaves):
        stats = module.linear_token_stats(*leaves, tokens)
        total = (stats.logprob * d_logprob).sum() + (stats.entropy * d_entropy).sum()
        return stats, torch.autograd.grad(total, leaves)

    exact, exact_gradients = results(
        losses, *(leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    )
    ours, gradients = results(grpo_kernels, hidden, weight)
    errors = {
        name: (getattr(ours, name) - getattr(exact, name)).square().mean().sqrt().item()
        for name in ("logprob", "entropy")
    }
    errors |= {
        name: relative_error(gradient, like)
        for name, gradient, like in zip(
            ("d_hidden", "d_weight"), gradients, exact_gradients, strict=True
        )
    }
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert errors["logprob"] <= 1e-5 and errors["entropy"] <= 5e-5
    assert errors["d_hidden"] <= 4e-3 and errors["d_weight"] <= 4e-3


@pytest.fixture
def workspace(pytorch_backend, monkeypatch):
    """A small workspace, so that a small problem has many chunks."""
    monkeypatch.setattr(softmax, "BLOCK_BYTES", MIB)
    monkeypatch.setattr(chunk_size, "WORKSPACE", 4 * MIB)
    return 4 * MIB


def statistics(hidden, weight, tokens):
    with torch.no_grad():
        linear_token_stats(hidden, weight, tokens)


def statistics_and_gradient(hidden, weight, tokens):
    stats = linear_token_stats(hidden, weight, tokens)
    (stats.logprob - stats.entropy).sum().backward()


def loss_and_gradient(hidden, weight, tokens):
    keywords = {"cu_seqlens": torch.tensor([0, len(tokens)])}
    linear_grpo_loss(hidden, weight, tokens, normal(3, len(tokens)), **keywords).loss.backward()


MODES = {
    "statistics": statistics,
    "loss": loss_and_gradient,
    "both": statistics_and_gradient,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_does_not_hold_all_logits(workspace, mode, dtype):
    """Memory grows with the hidden states, not with tokens times vocabulary."""
    V, H = 8192, 32
    accumulated = {"statistics": 0, "loss": 2, "both": 2}[mode] * V * H * 4
    blocks = 8 * MIB  # row blocks of the PyTorch backend, about six at a time
    for N in (256, 2048):
        inputs = make_head(N, V, H, dtype=dtype)
        peak = peak_tensor_bytes(lambda inputs=inputs: MODES[mode](*inputs))
        states = 4 * N * H * 4  # compacted hidden states, and their gradient in two dtypes
        print(f"{mode}, N = {N}: {peak / MIB:.1f} MiB, all logits {N * V * 4 / MIB:.0f} MiB")
        assert peak <= workspace + accumulated + blocks + states
        assert N < 2048 or peak < N * V * 4 / 3


def test_default_workspace_size():
    assert chunk_size.WORKSPACE == 1 << 30


@pytest.mark.parametrize("chunk_tokens", [None, 8])  # one chunk, and several that accumulate
def test_bf16_matmul_fallback_on_cpu_without_bf16_units(pytorch_backend, monkeypatch, chunk_tokens):
    hidden, weight, tokens = make_head(24, 300, 16)
    monkeypatch.setattr(matmul, "TILE_BYTES", 4 * 16 * 64)  # five tiles, the last one narrow
    gradients = []
    for has_units in (True, False):
        monkeypatch.setattr(matmul, "has_bf16_units", lambda has_units=has_units: has_units)
        stats = linear_token_stats(hidden, weight, tokens, chunk_tokens=chunk_tokens)
        total = stats.logprob.sum() + stats.entropy.sum()
        gradients.append(torch.autograd.grad(total, (hidden, weight)))
    for native, upcast in zip(*gradients, strict=True):
        assert upcast.dtype == torch.bfloat16
        # The same products are summed in another order and rounded to bf16 once.
        assert (native.float() - upcast.float()).norm() <= 4e-3 * native.float().norm()
