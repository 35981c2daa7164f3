"""Loss, metrics and gradients of a distillation loss, compared with the reference in fp64."""

import torch

from grpo_kernels import HeadAdapter
from tests.helpers.linear import half_gradient_tolerance, relative_error
from tests.helpers.tolerance import assert_as_accurate


def run(function, *tensors, leaves=1, **keywords):
    """Loss, metrics and the gradients of the first tensors, by name."""
    tensors = [x.detach().clone().requires_grad_(i < leaves) for i, x in enumerate(tensors)]
    loss, metrics = function(*tensors, **keywords)
    grads = torch.autograd.grad(2 * loss, tensors[:leaves])
    named = {f"d_{i}": grad for i, grad in enumerate(grads)}
    return {"loss": loss.detach(), **metrics, **named}


def doubled(value):
    """Turn a keyword, or its parts, into fp64."""
    if isinstance(value, HeadAdapter):
        return value._replace(a=value.a.double(), b=value.b.double())
    if isinstance(value, tuple):
        return tuple(map(doubled, value))
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_real else value


def check_against_fp64(function, oracle, *tensors, **keywords):
    """Compare loss, metrics and gradients with the oracle's in fp64; return ours."""
    leaves = keywords.pop("leaves", 1)
    ours = run(function, *tensors, leaves=leaves, **keywords)
    same_dtype = run(oracle, *tensors, leaves=leaves, **keywords)
    keywords = {name: doubled(value) for name, value in keywords.items()}
    exact = run(oracle, *map(doubled, tensors), leaves=leaves, **keywords)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        if name.startswith("d_") and value.dtype in (torch.bfloat16, torch.float16):
            assert relative_error(value, exact[name]) <= half_gradient_tolerance(), name
        else:
            assert_as_accurate(name, value, same_dtype[name], exact[name])
    return ours
