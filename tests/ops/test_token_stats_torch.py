"""token_stats in PyTorch: gradcheck, opcheck, compile, autocast, activation checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import grpo_kernels  # registers the operators
from grpo_kernels import token_stats
from grpo_kernels.backends import RowInputs, RowStats, StatsRequest
from grpo_kernels.backends.row_support import RowSupport
from grpo_kernels.objective.token_gradients import TokenGrads
from tests.helpers.tensors import coin, exact_results, make_case, normal, results, upstream_like

ALL = ("logprob", "entropy", "kl")


@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(backend, kl, softcap):
    logits, tokens = make_case(1, 2, 5, dtype=torch.float64, std=1.5)
    keywords = {"kl": kl, "ref_logits": normal(3, 2, 5, dtype=torch.float64) if kl else None}
    temperature = torch.tensor([0.7, 1.6], dtype=torch.float64)

    def outputs(logits):
        stats = token_stats(logits, tokens, temperature=temperature, softcap=softcap, **keywords)
        return tuple(stat for stat in stats if stat is not None)

    torch.autograd.gradcheck(outputs, logits.requires_grad_(), fast_mode=True)


def test_slow_gradcheck_and_zero_gradient_of_masked_tokens(backend):
    logits, tokens = make_case(2, 2, 4, dtype=torch.float64)
    mask = torch.tensor([True, False])

    def outputs(logits):
        return token_stats(logits, tokens, mask=mask)[:2]

    torch.autograd.gradcheck(outputs, logits.requires_grad_(), fast_mode=False)


def forward_arguments(dtype=torch.float32, kl="reverse"):
    logits, tokens = make_case(3, 1, 3, 7, dtype=dtype)
    ref_logits = normal(4, 1, 3, 7, dtype=dtype) if kl else None
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.full((1, 3), 1.3, dtype=acc)
    mask = torch.tensor([[True, False, True]])
    rows = (logits, tokens, temperature, mask, ref_logits, None, kl)
    return *rows, *RowSupport(), *StatsRequest(), False


@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
def test_opcheck_forward(backend, kl):
    logits, *others = forward_arguments(kl=kl)
    operator = torch.ops.grpo_kernels.token_stats_forward
    torch.library.opcheck(operator, (logits.requires_grad_(), *others))


@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
def test_opcheck_backward(backend, kl):
    arguments = forward_arguments(kl=kl)
    rows = arguments[: len(RowInputs._fields)]
    stats = RowStats._make(torch.ops.grpo_kernels.token_stats_forward(*arguments))
    g = torch.ones(1, 3)
    grads = TokenGrads(g, g, g if kl else None)
    arguments = (*rows, *RowSupport(), *stats.keep_for_backward(grads), *grads)
    torch.library.opcheck(torch.ops.grpo_kernels.token_stats_backward, arguments)
    torch.library.opcheck(torch.ops.grpo_kernels.token_stats_backward_, arguments)


def test_stride_0_gradient_equals_dense_gradient(backend):
    """The gradient of a sum is an expanded scalar."""
    logits, tokens = make_case(5, 2, 3, 7)
    stats = token_stats(logits.requires_grad_(), tokens)
    (gradient,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), logits)
    ones = torch.ones(2, 3)
    dense = results(token_stats, logits, tokens, {"logprob": ones, "entropy": ones})
    assert torch.equal(gradient, dense["d_logits"])


@pytest.mark.parametrize("kl", [None, "reverse"])
def test_compiled_fullgraph_equals_eager_without_recompiling(backend, kl):
    torch._dynamo.reset()
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    def loss(logits, tokens, mask, temperature, ref_logits):
        stats = token_stats(
            logits, tokens, mask=mask, temperature=temperature, kl=kl, ref_logits=ref_logits
        )
        total = (stats.logprob * 0.5 - 0.1 * stats.entropy).sum()
        return total if kl is None else total + stats.kl.sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for T in (3, 4, 6):
        logits, tokens = make_case(T, 2, T, 17)
        mask = coin(T, 2, T)
        temperature = normal(T, 2, T).abs() + 0.5
        ref_logits = normal(T + 1, 2, T, 17) if kl else None
        gradients = []
        for function in (loss, compiled):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, tokens, mask, temperature, ref_logits)
            value.backward()
            gradients.append((value.detach(), leaf.grad))
        assert torch.equal(gradients[0][1], gradients[1][1])
        torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert len(compiles) == 1
    torch._dynamo.reset()


def test_autocast_does_not_change_results(backend):
    for dtype in (torch.float32, torch.bfloat16):
        logits, tokens = make_case(6, 2, 3, 40, dtype=dtype)
        upstream = upstream_like(7, tokens)
        expected = results(token_stats, logits, tokens, upstream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = results(token_stats, logits, tokens, upstream)
        for name, value in ours.items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name]), name


def test_retain_graph(backend):
    logits, tokens = make_case(8, 3, 20)
    logits.requires_grad_()
    loss = token_stats(logits, tokens).logprob.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_second_derivative_raises(backend):
    logits, tokens = make_case(8, 3, 20)
    logits.requires_grad_()
    loss = token_stats(logits, tokens).logprob.sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_activation_checkpointing(backend):
    hidden = normal(9, 2, 3, 8).requires_grad_()
    weight = normal(10, 33, 8)
    _, tokens = make_case(11, 2, 3, 33)

    def loss(hidden):
        stats = token_stats(hidden @ weight.T, tokens)
        return (stats.logprob + 0.1 * stats.entropy).sum()

    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    (ours,) = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), hidden)
    assert torch.equal(ours, expected)


def test_saved_tensors_are_inputs_and_row_scalars(backend):
    logits, tokens = make_case(12, 4, 500)
    ref_logits = normal(13, 4, 500)
    inputs = {logits.data_ptr(), ref_logits.data_ptr()}
    sizes = []

    def pack(tensor):
        if tensor.data_ptr() not in inputs:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_stats(logits.requires_grad_(), tokens, kl="reverse", ref_logits=ref_logits)
    assert max(sizes) <= 2 * 4


def test_only_logits_are_differentiable(backend):
    logits, tokens = make_case(14, 3, 20)
    ref_logits = normal(15, 3, 20).requires_grad_()
    upstream = upstream_like(16, tokens, ALL)
    keywords = {"kl": "reverse", "ref_logits": ref_logits}
    stats = token_stats(logits, tokens, **keywords)
    assert not any(stat.requires_grad for stat in stats if stat is not None)
    ours = results(token_stats, logits, tokens, upstream, **keywords)
    exact = exact_results(logits, tokens, upstream, **keywords)
    torch.testing.assert_close(ours["d_logits"].double(), exact["d_logits"], rtol=1e-5, atol=1e-5)
    assert ref_logits.grad is None
    assert grpo_kernels.token_stats is token_stats
