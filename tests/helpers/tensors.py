"""Seeded inputs of token_stats, its results and gradient, and the comparison to fp64."""

import torch

from grpo_kernels import token_stats
from reference import losses
from tests.helpers.tolerance import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float32, device="cpu", std=1.0, mean=0.0):
    """Normal numbers, drawn in fp64 on the CPU so that a seed gives the same on every device."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return (x * std + mean).to(device=device, dtype=dtype)


def token_ids(seed, *shape, V, device="cpu"):
    return torch.randint(0, V, shape, generator=generator(seed)).to(device)


def coin(seed, *shape, device="cpu", p=0.6):
    return (torch.rand(shape, generator=generator(seed)) < p).to(device)


def make_case(seed, *shape, dtype=torch.float32, device="cpu", std=3.0):
    """Logits of this shape, and one token per row."""
    logits = normal(seed, *shape, dtype=dtype, device=device, std=std)
    return logits, token_ids(seed + 1, *shape[:-1], V=shape[-1], device=device)


def upstream_like(seed, tokens, names=("logprob", "entropy"), dtype=torch.float32):
    """One random upstream gradient per named output."""
    return {
        name: normal(seed + i, *tokens.shape, dtype=dtype, device=tokens.device)
        for i, name in enumerate(names)
    }


def results(function, logits, tokens, upstream, **keywords):
    """Outputs of a token_stats by name, and the gradient under `upstream` as "d_logits"."""
    logits = logits.detach().requires_grad_()
    stats = function(logits, tokens, **keywords)._asdict()
    stats = {name: value for name, value in stats.items() if value is not None}
    if upstream:
        outputs = [stats[name] for name in upstream]
        gradients = [g.to(stats[name].dtype) for name, g in upstream.items()]
        (stats["d_logits"],) = torch.autograd.grad(outputs, logits, gradients)
    return {name: value.detach() for name, value in stats.items()}


def exact_results(logits, tokens, upstream, **keywords):
    """Results of the reference implementation in fp64, from the same numbers."""

    def double(value):
        is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if is_real else value

    keywords = {name: double(value) for name, value in keywords.items()}
    upstream = {name: double(value) for name, value in upstream.items()}
    return results(losses.token_stats, logits.double(), tokens, upstream, **keywords)


def check_against_oracle(logits, tokens, upstream, **keywords):
    """Compare token_stats with the reference in fp64 and in the dtype of the logits.

    Returns our results.
    """
    ours = results(token_stats, logits, tokens, upstream, **keywords)
    same_dtype = results(losses.token_stats, logits, tokens, upstream, **keywords)
    exact = exact_results(logits, tokens, upstream, **keywords)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert_as_accurate(name, value, same_dtype[name], exact[name])
    return ours


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
