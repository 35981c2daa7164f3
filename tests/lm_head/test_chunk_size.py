"""plan_chunks, which chooses the chunk sizes, and pack_tokens, which orders the tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_kernels import pack_tokens
from grpo_kernels.lm_head.chunk_size import (
    LARGE_WORKSPACE,
    MEMORY_SHARE,
    TILE,
    WORKSPACE,
    bytes_per_token,
    plan_chunks,
    workspace_bytes,
)
from grpo_kernels.lm_head.device_rates import A100, DEVICES, H100
from grpo_kernels.lm_head.roofline import ChunkSizes, HeadWork, predict
from grpo_kernels.workspace import row_stride
from tests.helpers.tensors import coin, normal

LLAMA = {"V": 128_256, "H": 2048}
GIB = 1 << 30


def plan_chunk(*arguments, **keywords):
    """The one size of a plan without rates."""
    sizes = plan_chunks(*arguments, **keywords)
    assert sizes.logit_chunk == sizes.weight_chunk
    return sizes.logit_chunk


@pytest.mark.parametrize("N", [1, 500, 8192, 16_384, 65_536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kl", [False, True])
def test_llama_chunk_workspace_is_one_gibibyte(N, dtype, kl):
    size = plan_chunk(N, **LLAMA, dtype=dtype, memory=80 * GIB, kl=kl)
    used = size * bytes_per_token(**LLAMA, dtype=dtype, kl=kl, gradient=True)
    assert used <= WORKSPACE
    if N >= 8192:
        assert used >= 0.75 * WORKSPACE
    else:
        assert size == min(N, size)


def test_llama_chunk_sizes_on_large_device():
    """bf16: 6 bytes per logit with the gradient's, 4 without; fp32: 4."""
    sizes = [
        plan_chunk(8192, **LLAMA, dtype=dtype, memory=80 * GIB, gradient=gradient)
        for dtype, gradient in [
            (torch.bfloat16, True),
            (torch.bfloat16, False),
            (torch.float32, True),
        ]
    ]
    assert sizes == [1280, 2048, 1664]


def test_small_device_gets_small_workspace():
    size = plan_chunk(8192, **LLAMA, dtype=torch.bfloat16, memory=4 * GIB)
    used = size * bytes_per_token(**LLAMA, dtype=torch.bfloat16, kl=False, gradient=True)
    assert size == 256 and used <= 4 * GIB // MEMORY_SHARE
    assert plan_chunk(8192, **LLAMA, dtype=torch.float32, memory=1 << 20) == 1


@given(
    N=st.integers(0, 100_000),
    V=st.integers(1, 300_000),
    H=st.integers(1, 8192),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    memory=st.integers(1 << 28, 1 << 38),
    kl=st.booleans(),
    gradient=st.booleans(),
)
def test_chunks_are_few_and_of_equal_size(N, V, H, dtype, memory, kl, gradient):
    size = plan_chunk(N, V, H, dtype, memory, kl=kl, gradient=gradient)
    assert 1 <= size <= max(1, N)
    token_bytes = bytes_per_token(V, H, dtype, kl=kl, gradient=gradient)
    budget = min(WORKSPACE, memory // MEMORY_SHARE)
    assert size * token_bytes <= budget or size == 1
    count = -(-N // size)
    whole_tiles = budget // token_bytes // TILE * TILE
    largest = whole_tiles or max(1, budget // token_bytes)
    assert count <= -(-N // largest), "more chunks than fit"
    if count > 1:
        last = N - (count - 1) * size
        assert size - last < count * TILE, "the last chunk is too small"


def test_cpu_collects_bf16_gradients_that_all_fit():
    """One product of bf16 rounds once; several would be of operands upcast to fp32."""
    keywords = {"V": 151_936, "H": 896, "memory": 64 * GIB, "weight_grad": True}
    sizes = plan_chunks(2048, dtype=torch.bfloat16, **keywords)
    assert sizes.weight_chunk == 2048 and 512 <= sizes.logit_chunk <= 1024
    assert used_bytes(sizes, 151_936, 896, torch.bfloat16) <= WORKSPACE
    for N, dtype in ((64, torch.bfloat16), (8192, torch.bfloat16), (2048, torch.float32)):
        logit_chunk, weight_chunk = plan_chunks(N, dtype=dtype, **keywords)
        assert logit_chunk == weight_chunk, "all in one chunk, too many tokens, overwritten"
    without = plan_chunks(2048, dtype=torch.bfloat16, **{**keywords, "weight_grad": False})
    assert without == (1024, 1024)


def plan_for_gpu(rates, N, dtype=torch.bfloat16, **keywords):
    keywords = {"weight_grad": True, **keywords}
    return plan_chunks(N, **LLAMA, dtype=dtype, memory=rates.memory, rates=rates, **keywords)


def used_bytes(sizes, V, H, dtype, *, kl=False, gradient=True):
    """Logits of the logit chunk; gradients of them, and hidden states, of the weight chunk."""
    token_bytes = bytes_per_token(V, H, dtype, kl=kl, gradient=gradient)
    wide = max(4, dtype.itemsize)
    logits = (2 if kl else 1) * wide * row_stride(V, torch.float64 if wide == 8 else torch.float32)
    return sizes.logit_chunk * logits + sizes.weight_chunk * (token_bytes - logits)


def test_gpu_collects_gradients_of_several_logit_chunks():
    sizes = plan_for_gpu(H100, 8192)
    assert sizes == (2048, 8192), "one dW product where a single size of 1 GiB has seven"
    assert used_bytes(sizes, **LLAMA, dtype=torch.bfloat16) <= LARGE_WORKSPACE
    # In fp32 the gradient overwrites the logits; without that of a weight nothing is collected.
    for keywords in (
        {"dtype": torch.float32}, {"overwrite": False}, {"weight_grad": False},
        {"weight_grad": False, "gradient": False},
    ):  # fmt: skip
        logit_chunk, weight_chunk = plan_for_gpu(H100, 8192, **keywords)
        assert logit_chunk == weight_chunk, keywords


def test_statistics_take_no_large_workspace():
    """Without a gradient a second GiB would save a few launches only."""
    sizes = plan_for_gpu(H100, 16_384, gradient=False, weight_grad=False)
    used = used_bytes(sizes, **LLAMA, dtype=torch.bfloat16, gradient=False)
    assert WORKSPACE / 2 < used <= WORKSPACE


@given(
    N=st.integers(0, 100_000),
    V=st.integers(1, 300_000),
    H=st.integers(1, 8192),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    rates=st.sampled_from([*DEVICES, H100._replace(memory=24 * GIB), A100._replace(memory=GIB)]),
    kl=st.booleans(),
    gradient=st.sampled_from(["none", "hidden", "weight"]),
)
def test_gpu_plan_fits_and_divides_the_tokens(N, V, H, dtype, rates, kl, gradient):
    keywords = {"kl": kl, "gradient": gradient != "none", "weight_grad": gradient == "weight"}
    sizes = plan_chunks(N, V, H, dtype, rates.memory, rates, **keywords)
    assert 1 <= sizes.logit_chunk <= sizes.weight_chunk <= max(1, N)
    assert sizes.weight_chunk % sizes.logit_chunk == 0 or sizes.weight_chunk == N
    budget = LARGE_WORKSPACE if rates.memory >= 40e9 else workspace_bytes(rates.memory)
    used = used_bytes(sizes, V, H, dtype, kl=kl, gradient=keywords["gradient"])
    assert used <= budget or sizes == (1, 1)
    work = HeadWork(
        max(1, N), V, H, dtype.itemsize, 1 + kl,
        hidden_grad=keywords["gradient"], weight_grad=keywords["weight_grad"],
    )  # fmt: skip
    size = plan_chunk(N, V, H, dtype, rates.memory, kl=kl, gradient=keywords["gradient"])
    single = predict(work, ChunkSizes(size, size), rates).total
    assert predict(work, sizes, rates).total <= 1.15 * single, "much slower than a single size"


@pytest.mark.parametrize("shape", [(3, 5), (15,)])
@pytest.mark.parametrize("kind", ["none", "per sequence", "per token"])
def test_pack_tokens_order_and_counts(shape, kind):
    mask = coin(1, *shape)
    cu_seqlens = torch.tensor([0, 4, 4, 15]) if len(shape) == 1 else None
    advantages = {
        "none": None,
        "per sequence": torch.tensor([1.0, 2.0, 0.0]),
        "per token": normal(2, *shape) * coin(3, *shape),
    }[kind]
    keywords = {"cu_seqlens": cu_seqlens} if kind == "per sequence" else {}
    ours = pack_tokens(mask, advantages, **keywords)
    per_token = torch.ones(shape) if advantages is None else advantages
    if kind == "per sequence":
        lengths = torch.tensor([5, 5, 5]) if cu_seqlens is None else cu_seqlens.diff()
        per_token = advantages.repeat_interleave(lengths).view(shape)
    has_signal = mask & (per_token != 0)
    parts = [x.flatten().nonzero().flatten() for x in (has_signal, mask & ~has_signal, ~mask)]
    assert torch.equal(ours.order, torch.cat(parts))
    assert ours.counts.tolist() == [len(part) for part in parts[:2]]
    assert ours.counts.sum() == mask.sum()
    num_active, num_zero_grad = ours.counts.tolist()
    if kind == "per token":
        assert (advantages.flatten()[ours.order[:num_active]] != 0).all()
        zero_grad = ours.order[num_active : num_active + num_zero_grad]
        assert (advantages.flatten()[zero_grad] == 0).all()
    assert not mask.flatten()[ours.order[num_active + num_zero_grad :]].any()


def test_pack_tokens_integer_and_empty_masks():
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    packing = pack_tokens(mask)
    assert packing.order.tolist() == [1, 2, 3, 0, 4, 5] and packing.counts.tolist() == [3, 0]
    assert pack_tokens(torch.ones(0, 4)).counts.tolist() == [0, 0]
    # A NaN advantage counts as nonzero, so that it reaches the gradient.
    packing = pack_tokens(mask, torch.tensor([torch.nan, 0.0]))
    assert packing.order.tolist()[:3] == [1, 2, 3] and packing.counts.tolist() == [2, 1]


def test_pack_tokens_compile_and_opcheck():
    mask, advantages = coin(1, 3, 5), torch.tensor([1.0, 0.0, 2.0])
    expected = pack_tokens(mask, advantages)
    compiled = torch.compile(pack_tokens, fullgraph=True, backend="aot_eager")(mask, advantages)
    assert all(map(torch.equal, compiled, expected))
    is_active = (advantages != 0)[:, None].expand(3, 5).flatten()
    torch.library.opcheck(torch.ops.grpo_kernels.pack_tokens, (mask.flatten(), is_active))
