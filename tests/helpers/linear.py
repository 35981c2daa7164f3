"""Inputs of the hidden level from a seed, its results and gradients, and the comparison to fp64."""

import torch

from grpo_kernels import backends as rows
from reference import losses
from tests.helpers.tensors import normal, token_ids
from tests.helpers.tolerance import assert_as_accurate

LEAVES = ("hidden", "weight", "bias")


def half_gradient():
    """The relative error allowed where the gradient's operands are bf16.

    Triton's interpreter truncates to bf16, a GPU rounds: errors of one sign, twice as large.
    """
    interpreted = rows.HAS_TRITON and rows.INTERPRETED
    return 8e-3 if interpreted else 4e-3


def make_linear_case(
    seed, *leading, V=37, H=8, dtype=torch.float32, std=2.0, ref_H=5, bias=True, device="cpu"
):
    """The tensors of a linear_token_stats with every optional one but the mask, by name."""
    case = {
        "hidden": normal(seed, *leading, H, dtype=dtype),
        "weight": normal(seed + 1, V, H, dtype=dtype, std=std / H**0.5),
        "tokens": token_ids(seed + 2, *leading, V=V),
        "bias": normal(seed + 3, V, dtype=dtype, std=0.5) if bias else None,
        "ref_hidden": normal(seed + 4, *leading, ref_H, dtype=dtype),
        "ref_weight": normal(seed + 5, V, ref_H, dtype=dtype, std=std / ref_H**0.5),
        "ref_bias": normal(seed + 6, V, dtype=dtype, std=0.5) if bias else None,
    }
    return {name: each if each is None else each.to(device) for name, each in case.items()}


def without_reference(case):
    return {name: value for name, value in case.items() if not name.startswith("ref_")}


def doubled(value):
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_real else value


def linear_results(function, case, upstream, leaves=LEAVES, **keywords):
    """Outputs by name, and as "d_<leaf>" the gradients under `upstream`, by name of output."""
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
    """The reference in fp64, from the very same numbers."""
    case = {name: doubled(value) for name, value in case.items()}
    keywords = {name: doubled(value) for name, value in keywords.items()}
    upstream = {name: doubled(value) for name, value in upstream.items()}
    return linear_results(losses.linear_token_stats, case, upstream, leaves, **keywords)


def relative_error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def check_linear(function, case, upstream, leaves=LEAVES, **keywords):
    """A linear_token_stats against the reference in fp64, under the tolerance rule; our results."""
    ours = linear_results(function, case, upstream, leaves, **keywords)
    same_dtype = linear_results(losses.linear_token_stats, case, upstream, leaves, **keywords)
    exact = exact_linear_results(case, upstream, leaves, **keywords)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        if name.startswith("d_") and value.dtype in (torch.bfloat16, torch.float16):
            assert value.dtype == same_dtype[name].dtype and value.shape == exact[name].shape
            assert relative_error(value, exact[name]) <= half_gradient(), name
        else:
            assert_as_accurate(name, value, same_dtype[name], exact[name])
    return ours
