"""The chunk loop allocates its large tensors once, whatever the number of chunks."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats
from grpo_kernels.backends.pytorch import softmax
from tests.helpers.tensors import normal

V, H, CHUNK = 4096, 512, 128
LARGE = CHUNK * H * 2  # bytes of a chunk's smallest tensor, its hidden states in bf16
MATMULS = ("aten::mm", "aten::addmm")


@pytest.fixture(autouse=True)
def small_blocks(pytorch_backend, monkeypatch):
    """Make row blocks smaller than any tensor of a chunk."""
    monkeypatch.setattr(softmax, "BLOCK_BYTES", 2 * V * 4)
    assert 2 * softmax.BLOCK_BYTES < LARGE


def allocations(call) -> list[int]:
    """Bytes of each allocation during the call.

    Scratch memory inside a matmul belongs to the library and does not count: oneDNN takes 300 KiB
    for bf16 on an EPYC with AVX-512.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events, sizes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        if event.name == "[memory]":
            sizes.append(event.extra_fields.alloc_size)
        if event.name not in MATMULS:
            events += event.children
    assert max(sizes) >= CHUNK * V * 4, "the workspace was not seen"
    return sizes


def loss_and_gradient(inputs, config, **reference):
    linear_grpo_loss(*inputs, chunk_tokens=CHUNK, config=config, **reference).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["token", "sequence", "kl", "statistics", "frozen"])
def test_large_allocations_do_not_grow_with_chunks(dtype, kind):
    weight = normal(1, V, H).to(dtype).requires_grad_(kind != "frozen")

    def large_allocations(chunks: int) -> int:
        N = chunks * CHUNK - 7
        hidden = normal(2, 1, N, H).to(dtype).requires_grad_()
        inputs = (hidden, weight, torch.zeros(1, N, dtype=torch.long), torch.ones(1))
        reference = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
        calls = {
            "token": lambda: loss_and_gradient(inputs, LossConfig()),
            "sequence": lambda: loss_and_gradient(inputs, LossConfig.gspo()),
            "kl": lambda: loss_and_gradient(
                inputs, LossConfig(beta=0.1, kl_estimator="reverse"), **reference
            ),
            "statistics": lambda: linear_token_stats(*inputs[:3], chunk_tokens=CHUNK),
            "frozen": lambda: linear_token_stats(
                *inputs[:3], chunk_tokens=CHUNK, entropy_grad=True
            ),
        }
        return sum(size >= LARGE for size in allocations(calls[kind]))

    assert large_allocations(3) == large_allocations(5)


def test_frozen_weight_is_cast_once():
    hidden = normal(2, 2 * CHUNK, H).bfloat16().requires_grad_()
    weight, tokens = normal(1, V, H), torch.zeros(2 * CHUNK, dtype=torch.long)
    sizes = allocations(lambda: linear_token_stats(hidden, weight, tokens, chunk_tokens=CHUNK))
    assert sizes.count(V * H * 2) == 1
