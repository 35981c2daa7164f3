"""What the chunk loop holds: after its first chunk it asks for no memory of a chunk's size."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats
from grpo_kernels.backends import use
from grpo_kernels.backends.pytorch import softmax
from tests.helpers.tensors import normal

V, H, CHUNK = 4096, 512, 128
LARGE = CHUNK * H * 2  # bytes: the hidden states of a chunk in bf16, the smallest of its tensors
PRODUCTS = ("aten::mm", "aten::addmm")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Eager rows, in blocks so small that their buffers are not mistaken for a chunk's."""
    use("pytorch")
    monkeypatch.setattr(softmax, "BLOCK_BYTES", 2 * V * 4)
    assert 2 * softmax.BLOCK_BYTES < LARGE


def large_allocations(call) -> int:
    """How often the call asks the allocator for LARGE or more.

    Not what a product works in, which is the library's: for bf16 oneDNN takes 300 KiB on an EPYC
    with AVX-512, and nothing on others.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events, sizes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        if event.name == "[memory]":
            sizes.append(event.extra_fields.alloc_size)
        if event.name not in PRODUCTS:
            events += event.children
    assert max(sizes) >= CHUNK * V * 4, "the workspace was not seen"
    return sum(size >= LARGE for size in sizes)


def loss_and_gradient(inputs, config, **reference):
    linear_grpo_loss(*inputs, chunk_tokens=CHUNK, config=config, **reference).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["token", "sequence", "kl", "statistics"])
def test_large_allocations_do_not_grow_with_chunks(dtype, kind):
    weight = normal(1, V, H).to(dtype).requires_grad_()

    def allocations(chunks: int) -> int:
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
        }
        return large_allocations(calls[kind])

    assert allocations(3) == allocations(5)
