"""Seeded inputs of linear_token_stats, its results and gradients, and the comparison to fp64."""

import torch

from grpo_kernels import backends
from reference import losses
from tests.helpers.tensors import normal, token_ids
from tests.helpers.tolerance import assert_as_accurate

LEAVES = ("hidden", "weight", "bias")


def half_gradient_tolerance():
    """Relative error allowed in a half-precision gradient.

    It is twice as large in Triton's interpreter, which truncates to bf16 where a GPU rounds.
    """
    interpreted = backends.HAS_TRITON and backends.INTERPRETED
    return 8e-3 if interpreted else 4e-3


def make_linear_case(
    seed, *leading, V=37, H=8, dtype=torch.float32, std=2.0, ref_H=5, bias=True, device="cpu"
):
    """All tensor arguments of a linear_token_stats but the mask, by name."""
    case = {
        "hidden": normal(seed, *leading, H, dtype=dtype),
        "weight": normal(seed + 1, V, H, dtype=dtype, std=std / H**0.5),
        "tokens": token_ids(seed + 2, *leading, V=V),
        "bias": normal(seed + 3, V, dtype=dtype, std=0.5) if bias else None,
        "ref_hidden": normal(seed + 4, *leading, ref_H, dtype=dtype),
        "ref_weight": normal(seed + 5, V, ref_H, dtype=dtype, std=std / ref_H**0.5),
        "ref_bias": normal(seed + 6, V, dtype=dtype, std=0.5) if bias else None,
    }
    return {name: x if x is None else x.to(device) for name, x in case.items()}


def without_reference(case):
    return {name: value for name, value in case.items() if not name.startswith("ref_")}


def doubled(value):
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_real else value


def linear_results(function, case, upstream, leaves=LEAVES, **keywords):
    """Outputs by name, and the gradients under `upstream` as "d_<leaf>"."""
    case = dict(case)
    for name in leaves:
        if case[name] is not None:
            case[name] = case[name].detach().clone().requires_grad_()
    hidden, weight, tokens = (case.pop(name) for name in ("hidden", "weight", "tokens"))
    stats = function(hidden, weight, tokens, **case, **keywords)._asdict()
    stats = {name: value for name, value in stats.items() if value is not None}
    if upstream:
        total = sum((stats[name] * g.to(stats[name].dtype)).sum() for name, g in upstream.items())
        total.backward()
        inputs = {"hidden": hidden, "weight": weight, "bias": case["bias"]}
        for name in leaves:
            if inputs[name] is not None:
                stats[f"d_{name}"] = inputs[name].grad
    return {name: value if value is None else value.detach() for name, value in stats.items()}


def exact_linear_results(case, upstream, leaves=LEAVES, **keywords):
    """Results of the reference implementation in fp64, from the same numbers."""
    case = {name: doubled(value) for name, value in case.items()}
    keywords = {name: doubled(value) for name, value in keywords.items()}
    upstream = {name: doubled(value) for name, value in upstream.items()}
    return linear_results(losses.linear_token_stats, case, upstream, leaves, **keywords)


def relative_error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def check_linear(function, case, upstream, leaves=LEAVES, **keywords):
    """Compare a linear_token_stats with the reference in fp64 under the tolerance rule.

    Returns our results.
    """
    ours = linear_results(function, case, upstream, leaves, **keywords)
    same_dtype = linear_results(losses.linear_token_stats, case, upstream, leaves, **keywords)
    exact = exact_linear_results(case, upstream, leaves, **keywords)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        if name.startswith("d_") and value.dtype in (torch.bfloat16, torch.float16):
            assert value.dtype == same_dtype[name].dtype and value.shape == exact[name].shape
            assert relative_error(value, exact[name]) <= half_gradient_tolerance(), name
        else:
            assert_as_accurate(name, value, same_dtype[name], exact[name])
    return ours
