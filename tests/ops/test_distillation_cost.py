"""linear_distillation_loss: 8·n·V·H operations for n unmasked tokens, and memory flat in N."""

import pytest
import torch

from grpo_kernels import linear_distillation_loss
from grpo_kernels.lm_head import chunk_size
from tests.helpers.count_flops import count_flops
from tests.helpers.peak_memory import peak_memory
from tests.helpers.tensors import coin, normal

V, H, TEACHER_H = 2048, 16, 24
DIVERGENCES = ("reverse", "forward", "jsd")
pytestmark = pytest.mark.usefixtures("pytorch_backend")


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    monkeypatch.setattr(chunk_size, "WORKSPACE", 1 << 20)


def loss_and_gradient(divergence, N, *, dtype=torch.float32, mask=None):
    """Return a call that computes the loss of N tokens and its gradient in both leaves."""
    hidden, weight = normal(1, N, H).to(dtype), normal(2, V, H).to(dtype)
    teacher = normal(3, N, TEACHER_H).to(dtype), normal(4, V, TEACHER_H).to(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def call():
        output = linear_distillation_loss(*leaves, *teacher, divergence=divergence, mask=mask)
        return torch.autograd.grad(output.loss, leaves)

    return call


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_flops_of_unmasked_tokens_in_several_chunks(divergence):
    N = 256
    mask = coin(5, N)
    n = int(mask.sum())
    assert 0 < n < N
    # Logits, d_hidden and d_weight of the student; logits of the teacher.
    expected = 3 * (2 * n * V * H) + 2 * n * V * TEACHER_H
    assert count_flops(loss_and_gradient(divergence, N, mask=mask)) == expected


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [
        ("reverse", torch.float32),
        ("forward", torch.bfloat16),
        ("jsd", torch.float32),
        ("jsd", torch.bfloat16),
    ],
)
def test_peak_memory_is_flat_in_tokens(divergence, dtype):
    """A token adds its d_hidden in two dtypes and 32 numbers, not its two rows of logits."""
    few, many = 512, 2048
    peaks = [
        peak_memory(loss_and_gradient(divergence, tokens, dtype=dtype)) for tokens in (few, many)
    ]
    assert peaks[1] - peaks[0] <= (many - few) * 4 * (2 * H + 32)
    assert peaks[1] < many * V * 4 / 6
