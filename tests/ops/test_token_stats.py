"""token_stats against the reference in fp64: values and gradients, dtypes and strides."""

import pytest
import torch

from grpo_kernels import token_stats
from tests.helpers.tensors import (
    DTYPES,
    assert_same_bits,
    check_against_oracle,
    coin,
    exact_results,
    make_case,
    normal,
    results,
    upstream_like,
)

V = 83  # two whole tiles of the interpreter and a tail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
def test_outputs_and_gradient_are_as_accurate_as_torch(backend, device, dtype, kl):
    logits, tokens = make_case(1, 2, 3, V, dtype=dtype, device=device)
    upstream = upstream_like(
        5, tokens, ("logprob", "entropy", "kl") if kl else ("logprob", "entropy")
    )
    ref_logits = normal(9, 2, 3, V, dtype=dtype, device=device, std=3.0) if kl else None
    check_against_oracle(logits, tokens, upstream, kl=kl, ref_logits=ref_logits, temperature=0.7)


@pytest.mark.parametrize("output", ["logprob", "entropy", "kl"])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_gradient_of_each_output(backend, device, kl, output):
    logits, tokens = make_case(2, 5, V, device=device)
    ref_logits = normal(9, 5, V, device=device, std=3.0)
    check_against_oracle(
        logits, tokens, upstream_like(5, tokens, (output,)), kl=kl, ref_logits=ref_logits
    )


@pytest.mark.parametrize("softcap", [None, 2.5, 30.0])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (1, 3), (2, 3)])
def test_temperature_and_softcap(backend, device, shape, softcap):
    logits, tokens = make_case(3, 2, 3, V, device=device, std=5.0)
    temperature = normal(4, *shape, device=device).abs() + 0.5
    ref_logits = normal(9, 2, 3, V, device=device, std=3.0)
    check_against_oracle(
        logits,
        tokens,
        upstream_like(5, tokens, ("logprob", "entropy", "kl")),
        temperature=temperature,
        softcap=softcap,
        kl="reverse",
        ref_logits=ref_logits,
    )


def test_temperature_that_requires_grad(backend, device):
    logits, tokens = make_case(3, 3, V, device=device)
    temperature = torch.full((3,), 1.3, device=device, requires_grad=True)
    logits.requires_grad_()
    token_stats(logits, tokens, temperature=temperature).logprob.sum().backward()
    assert temperature.grad is None and logits.grad is not None


@pytest.mark.parametrize("leading", [(4,), (1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 300])
def test_leading_shapes_and_vocabulary_sizes(backend, device, leading, size):
    logits, tokens = make_case(4, *leading, size, device=device)
    check_against_oracle(logits, tokens, upstream_like(5, tokens))


def test_without_entropy(backend, device):
    logits, tokens = make_case(5, 4, V, device=device)
    ours = check_against_oracle(
        logits, tokens, upstream_like(5, tokens, ("logprob",)), entropy=False
    )
    assert ours.keys() == {"logprob", "d_logits"}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_token_dtypes_and_strides(backend, device, dtype):
    logits, tokens = make_case(6, 2, 4, V, device=device)
    strided = tokens.to(dtype).T.contiguous().T
    check_against_oracle(logits, strided, upstream_like(5, tokens))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_masked_tokens_get_zeros(backend, device, dtype):
    logits, tokens = make_case(7, 3, 4, V, device=device)
    mask = coin(8, 3, 4, device=device)
    assert mask.any() and not mask.all()
    ref_logits = normal(9, 3, 4, V, device=device)
    upstream = upstream_like(5, tokens, ("logprob", "entropy", "kl"))
    ours = check_against_oracle(
        logits, tokens, upstream, mask=mask.to(dtype), kl="forward", ref_logits=ref_logits
    )
    assert all((value[~mask] == 0).all() for value in ours.values())


def test_strided_logits(backend, device):
    """logits[:, :-1] of a model, and reference logits with other strides."""
    wide, tokens = make_case(10, 2, 4, V + 7, device=device)
    logits, tokens = wide[:, :-1, :V], tokens[:, 1:] % V
    ref_logits = normal(9, 3, 2, V, device=device).transpose(0, 1)
    assert not logits.is_contiguous() and not ref_logits.is_contiguous()
    upstream = upstream_like(5, tokens, ("logprob", "entropy", "kl"))
    ours = check_against_oracle(
        logits, tokens, upstream, kl="reverse", ref_logits=ref_logits, temperature=1.2
    )
    dense = results(
        token_stats,
        logits.contiguous(),
        tokens,
        upstream,
        kl="reverse",
        ref_logits=ref_logits.contiguous(),
        temperature=1.2,
    )
    assert_same_bits(ours, dense)


def test_strided_packed_logits(backend, device):
    wide, tokens = make_case(10, 7, V + 3, device=device)
    check_against_oracle(wide[::2, 3:], tokens[::2] % V, upstream_like(5, tokens[::2]))


@pytest.mark.parametrize("layout", ["expanded", "column", "sliced"])
def test_strided_upstream_gradients(backend, device, layout):
    logits, tokens = make_case(11, 3, 4, V, device=device)
    upstream = {
        "expanded": lambda: normal(1, 1, 1, device=device).expand(3, 4),
        "column": lambda: normal(2, 4, 3, device=device).T,
        "sliced": lambda: normal(3, 3, 8, device=device)[:, ::2],
    }[layout]()
    assert not upstream.is_contiguous()
    check_against_oracle(logits, tokens, {"logprob": upstream, "entropy": upstream * 1.5})
    check_against_oracle(logits, tokens, {"entropy": upstream})


def test_sum_of_outputs_backpropagates_stride_0_gradient(backend, device):
    logits, tokens = make_case(12, 2, 3, V, device=device)
    logits.requires_grad_()
    stats = token_stats(logits, tokens)
    (stats.logprob.sum() + 0.1 * stats.entropy.mean()).backward()
    ones = torch.ones(2, 3, device=device)
    exact = exact_results(logits.detach(), tokens, {"logprob": ones, "entropy": ones * 0.1 / 6})
    torch.testing.assert_close(logits.grad.double(), exact["d_logits"], rtol=1e-6, atol=1e-6)
