"""The chunk loop: the rows that it passes to the backends, and to the products of gradients."""

import pytest
import torch

import grpo_kernels
from grpo_kernels import HeadAdapter, LossConfig
from grpo_kernels.lm_head import backward_plan, chunk_loop, head_gradient
from grpo_kernels.lm_head.backward_plan import BackwardPlan
from grpo_kernels.lm_head.chunk_loop import ChunkedLMHead, Logits
from grpo_kernels.lm_head.inputs import prepare_inputs
from grpo_kernels.lm_head.roofline import ChunkSizes
from grpo_kernels.lm_head.row_groups import RowGroups
from grpo_kernels.workspace import ROW_BYTES, Workspace
from reference import losses
from tests.helpers.linear import (
    doubled,
    half_gradient_tolerance,
    make_linear_case,
    relative_error,
)
from tests.helpers.tensors import normal

N, H = 7, 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("V", [33, 34, 64])
def test_rows_of_logits_and_gradient_start_at_multiples_of_16_bytes(V, is_kept, dtype):
    hidden, weight = normal(1, N, H).to(dtype), normal(2, V, H).to(dtype)
    inputs = prepare_inputs(
        hidden, weight, torch.zeros(N, dtype=torch.long),
        kl="reverse", ref_hidden=hidden, ref_weight=weight,
    )  # fmt: skip
    kept = None
    if is_kept:
        logits, ref_logits, _ = BackwardPlan((N, V), ()).allocate(inputs)
        kept = Logits(logits, ref_logits).select(torch.arange(N).flip(0))
    head = ChunkedLMHead(inputs, N, None if is_kept else 3, wanted=[True] * 5, logits=kept)
    for chunk in head.chunks(RowGroups.of(torch.arange(N), None)):
        rows = [*chunk.rows.logits[0], *chunk.rows.ref_logits[0], *chunk.d_logits]
        assert all(row.data_ptr() % ROW_BYTES == 0 and row.stride() == (1,) for row in rows)
        expected = hidden[chunk.groups.row_idx].float() @ weight.float().T
        torch.testing.assert_close(chunk.rows.logits[0], expected)


@pytest.fixture
def two_sizes(monkeypatch):
    """Logits of two rows at a time, their gradients of six: chunks of 2, 2, 2 | 2, 2, 1."""
    monkeypatch.setattr(chunk_loop, "plan_chunks", lambda *_, **__: ChunkSizes(2, 6))
    monkeypatch.setattr(backward_plan, "workspace_bytes", lambda _: 0)  # no logits are kept
    return (6, 5)


TOKENS, VOCAB = 11, 37
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5])
CU_SEQLENS = torch.tensor([0, 4, 9, TOKENS])
CONFIG = LossConfig(beta=0.1, kl_estimator="reverse", entropy_coef=0.05)


def statistics(package, hidden, weight, tokens, bias, adapter, reference):
    keywords = {"bias": bias, "adapter": adapter, "kl": "forward", **reference}
    stats = package.linear_token_stats(hidden, weight, tokens, softcap=8.0, **keywords)
    return (stats.logprob + 0.3 * stats.entropy - 0.2 * stats.kl).sum()


def loss(package, hidden, weight, tokens, bias, adapter, reference):
    return package.linear_grpo_loss(
        hidden, weight, tokens, ADVANTAGES.to(bias.dtype), bias=bias, adapter=adapter,
        cu_seqlens=CU_SEQLENS, config=CONFIG, **reference,
    ).loss  # fmt: skip


def one_launch(package, hidden, weight, tokens, bias, adapter, reference):
    return package.linear_grpo_loss(
        hidden, weight, tokens, ADVANTAGES.to(bias.dtype), bias=bias, adapter=adapter,
        cu_seqlens=CU_SEQLENS, config=LossConfig(),
    ).loss  # fmt: skip


def gradients(package, function, dtype, adapter_dtype=torch.float32):
    """A number and the gradients of all leaves; of the reference from the same numbers in fp64."""
    case = make_linear_case(3, TOKENS, V=VOCAB, H=16, dtype=dtype)
    case["a"] = normal(20, 3, 16, dtype=adapter_dtype, std=0.25)
    case["b"] = normal(21, VOCAB, 3, dtype=adapter_dtype)
    if package is losses:
        case = {name: doubled(x) for name, x in case.items()}
    leaves = {name: case[name].requires_grad_() for name in ("hidden", "weight", "bias", "a", "b")}
    reference = {name: x for name, x in case.items() if name.startswith("ref_")}
    adapter = HeadAdapter(case["a"], case["b"], 0.7)
    total = function(
        package, case["hidden"], case["weight"], case["tokens"], case["bias"], adapter, reference
    )
    found = torch.autograd.grad(total, list(leaves.values()))
    return {"value": total.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", [statistics, loss, one_launch])
def test_gradients_collected_over_several_chunks(backend, two_sizes, monkeypatch, function, dtype):
    rows_of_products = []
    add = head_gradient.add_weight_gradient

    def spy(total, d_logits, states, *arguments, **keywords):
        if states.shape[1] == 16:  # H: not that of the bias, nor that of the adapter
            rows_of_products.append(len(d_logits))
        add(total, d_logits, states, *arguments, **keywords)

    monkeypatch.setattr(head_gradient, "add_weight_gradient", spy)
    ours = gradients(grpo_kernels, function, dtype, torch.promote_types(dtype, torch.float32))
    again = gradients(grpo_kernels, function, dtype, torch.promote_types(dtype, torch.float32))
    assert rows_of_products == [*two_sizes, *two_sizes]
    exact = gradients(losses, function, dtype, torch.promote_types(dtype, torch.float32))
    is_half = dtype in (torch.float16, torch.bfloat16)
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
        limit = half_gradient_tolerance() if is_half else {4: 2e-6, 8: 1e-12}[dtype.itemsize]
        assert relative_error(value, exact[name]) <= (1e-5 if name == "value" else limit), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_logits_exist_for_the_logit_chunk_only(two_sizes, monkeypatch, dtype):
    sizes = {}
    rows = Workspace.rows

    def spy(workspace, name, n, V, row_dtype):
        sizes[name] = max(n, sizes.get(name, 0))
        return rows(workspace, name, n, V, row_dtype)

    monkeypatch.setattr(Workspace, "rows", spy)
    gradients(grpo_kernels, loss, dtype, dtype)
    assert sizes == {"logits": 2, "ref_logits": 2, "d_logits": 6}
