"""Argument checks: primitives that raise a TypeError or ValueError and format its message.

A message names the argument, what is expected, and what was passed. A rule that is specific to one
function stands beside that function. Shapes, dtypes and settings are always checked. The values of
a tensor are checked only if `values_are_readable`: on a GPU, reading them would wait for the
device.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

OUT_OF_VOCAB = -2  # an id that gives NaN: of no token, on no rank

_LARGEST = torch.finfo(torch.float64).max
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Names in TRL, verl and Liger, and the arguments or settings here that do the same.
_OTHER_NAMES = {
    "epsilon": "epsilon_low epsilon_high",
    "eps_clip": "epsilon_low epsilon_high",
    "clip_ratio": "epsilon_low epsilon_high",
    "clip_ratio_low": "epsilon_low",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_c": "dual_clip",
    "kl_coef": "beta",
    "kl_loss_coef": "beta",
    "kl_loss_type": "kl_estimator",
    "use_bias_correction_kl": "kl_estimator",
    "loss_agg_mode": "aggregation",
    "importance_sampling_level": "ratio_level",
    "off_policy_mask_threshold": "off_policy_threshold",
    "top_entropy_quantile": "top_entropy",
    "sapo_temperature_pos": "tau_positive",
    "sapo_temperature_neg": "tau_negative",
    "vespo_k_pos": "k_positive",
    "vespo_k_neg": "k_negative",
    "vespo_lambda_pos": "lambda_positive",
    "vespo_lambda_neg": "lambda_negative",
    "vllm_importance_sampling_mode": "importance_mode importance_level",
    "vllm_importance_sampling_clip_min": "importance_floor",
    "vllm_importance_sampling_clip_max": "importance_cap",
    "vllm_importance_sampling_cap": "importance_cap",
    "input_ids": "tokens",
    "completion_ids": "tokens",
    "selected_token_ids": "tokens",
    "labels": "tokens",
    "targets": "tokens",
    "responses": "tokens",
    "hidden_states": "hidden",
    "ref_input": "ref_hidden",
    "chunk_size": "chunk_tokens",
    "rollout_rs": "rejection",
    "m2_threshold": "second_moment",
    "rollout_log_probs": "sampling_logprob",
    "num_items_in_batch": "normalizer",
    "lora": "adapter",
    "rows": "token_rows",
    "weights": "token_weights",
    "beta": "jsd_weight",
    "sampling_mask": "support",
}


def suggest_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Make the TypeError for an unknown keyword name the one that was probably meant.

    A name of TRL, verl or Liger, or a misspelt one, leads to a parameter of the function, or to a
    setting of the LossConfig that it takes as `config`.
    """
    parameters = inspect.signature(function).parameters
    known = frozenset(parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not known.issuperset(kwargs):
            name = next(name for name in kwargs if name not in known)
            default = parameters["config"].default if "config" in known else None
            config = default or next(iter(args), None)
            raise TypeError(
                f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
                + _suggestion(name, kwargs[name], known, config)
            )
        return function(*args, **kwargs)

    return checked


def _suggestion(name: str, value: object, known: frozenset[str], config: Any) -> str:
    """Return "; did you mean ...?", or nothing; config: a LossConfig, or anything else."""
    has_settings = hasattr(config, "objectives")
    settings = {setting.name for setting in fields(config)} if has_settings else set()
    objectives = config.objectives() if has_settings else {}
    plain = re.sub(r"(per_token_)?log_?p(rob)?s?$", "logprob", name)  # old_per_token_logps, ...
    plain = re.sub(r"^\w+_mask$", "mask", plain)  # completion_mask, response_mask, ...
    names = _OTHER_NAMES.get(name, plain).split()
    if not known.issuperset(names) and not settings.issuperset(names):
        names = nearest(plain, sorted(known | settings), cutoff=0.7)
    if name in ("loss", "loss_type", "loss_mode") and str(value) in objectives:
        meant = f"LossConfig.{value}()"
    elif names and not known.issuperset(names):
        meant = f"LossConfig({', '.join(f'{name}=...' for name in names)})"
    else:
        return f"; did you mean {' and '.join(names)}?" if names else ""
    return f"; did you mean {'config=' * ('config' in known)}{meant}?"


def nearest(word: str, choices: Collection[str], cutoff: float = 0.6) -> list[str]:
    """Return the choice most like a misspelt word, in a list that is empty if none is near."""

    def likeness(choice: str) -> float:
        mine, other = word.lower(), choice.lower()
        swapped = sorted(mine) == sorted(other)  # gpro is grpo, not gspo
        return swapped + difflib.SequenceMatcher(None, mine, other).ratio()

    near = [choice for choice in choices if likeness(choice) >= cutoff]
    return [max(near, key=likeness)] if near else []


def expect_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Expect one of the choices, else raise a ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def expect_number(
    name: str,
    value: object,
    *,
    integer: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Expect a finite number within bounds, else raise. A bool is not a number."""
    if not isinstance(value, Integral if integer else Real) or isinstance(value, bool):
        kind = "an integer" if integer else "a number"
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    number: Any = value  # Real declares no comparison
    # Not math.isfinite, which torch.compile does not have for a symbol.
    if not integer and not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name} must be finite, got {number}")
    for holds, text, bound in (
        (at_least is None or number >= at_least, "at least", at_least),
        (above is None or number > above, "greater than", above),
        (at_most is None or number <= at_most, "at most", at_most),
        (below is None or number < below, "less than", below),
    ):
        if not holds:
            raise ValueError(f"{name} must be {text} {bound}, got {number}")


def expect_flag(name: str, value: object) -> None:
    """Expect True or False, else raise a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def expect_tensor(
    name: str,
    value: object,
    *,
    floating: bool = False,
    shape: tuple[int, ...] | None = None,
    dims: Collection[int] | None = None,
    layout: str = "",
    device_of: Tensor | None = None,
) -> None:
    """Expect a tensor with the given properties, else raise.

    Args:
        floating: True for fp16, bf16, fp32 or fp64.
        shape: the exact shape.
        dims: the allowed numbers of dimensions; `layout` describes them in the message, such as
            "[B, T, V] or packed [N, V]".
        device_of: a tensor on the expected device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if floating and value.dtype not in _FLOATING:
        wanted = "fp16, bf16, fp32 or fp64" if value.is_floating_point() else "floating point"
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")
    if dims is not None and value.dim() not in dims:
        raise ValueError(f"{name} must be {layout}, got {shape_of(value)}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {shape_of(value)}")
    if device_of is not None and value.device != device_of.device:
        raise ValueError(f"{name} must be on {device_of.device}, got {value.device}")


def expect_no_tangent(name: str, value: Tensor | None) -> None:
    """Expect a tensor without a forward-mode derivative: the operators would drop it silently."""
    if value is None or torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} must carry no forward-mode derivative (torch.func.jvp, forward_ad): the "
            "operators have reverse mode only, got a dual tensor"
        )


def expect_finite(name: str, tensor: Tensor) -> None:
    """Expect finite values, if they are readable, else raise a ValueError."""
    if values_are_readable(tensor) and not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def expect_mask(mask: Tensor | None, tokens: Tensor) -> None:
    """Expect None, or a mask of these tokens that is bool or holds only 0 and 1, else raise."""
    if mask is None:
        return
    expect_tensor("mask", mask, shape=tokens.shape, device_of=tokens)
    if mask.dtype == torch.bool or not values_are_readable(mask):
        return
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        raise ValueError(f"mask must be bool or hold only 0 and 1, got {mask[wrong][0]}")


def expect_tokens(tokens: Tensor, rows: Tensor, name: str = "logits") -> None:
    """Expect integer ids, one per row of the logits or hidden states `name`, else raise."""
    expect_ids("tokens", tokens)
    if tokens.shape != rows.shape[:-1]:
        raise ValueError(
            f"tokens must have shape {tuple(rows.shape[:-1])}, that of {name} without the "
            f"last dimension, got {shape_of(tokens)}"
        )
    expect_tensor("tokens", tokens, device_of=rows)


def expect_ids(name: str, ids: object) -> None:
    """Expect a tensor of integers, else raise a TypeError."""
    expect_tensor(name, ids)
    assert isinstance(ids, Tensor)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integer ids, got {ids.dtype}")


def expect_token_ids(tokens: Tensor, mask: Tensor | None, V: int) -> None:
    """Expect unmasked ids in [0, V), if they are readable, else raise a ValueError."""
    if not values_are_readable(tokens):
        return
    outside = (tokens < 0) | (tokens >= V)
    if mask is not None:
        outside &= mask != 0
    if outside.any():
        raise ValueError(
            f"tokens must lie in [0, {V}) where they are not masked, got {tokens[outside][0]}"
        )


def expect_temperature(temperature: object, tokens: Tensor, mask: Tensor | None) -> None:
    """Expect a number > 0, or a tensor of them that broadcasts to the tokens, else raise."""
    if not isinstance(temperature, Tensor):
        if not torch.compiler.is_compiling():  # a symbol has no value yet
            expect_number("temperature", temperature, above=0)
        return
    expect_tensor("temperature", temperature, floating=True, device_of=tokens)
    try:
        fits = torch.broadcast_shapes(temperature.shape, tokens.shape) == tokens.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"temperature must broadcast to shape {tuple(tokens.shape)}, "
            f"got {shape_of(temperature)}"
        )
    if not values_are_readable(temperature):
        return
    positive = temperature > 0
    if mask is not None:
        positive = positive | (mask == 0)
    if not positive.all():
        raise ValueError("temperature must be greater than 0 for every unmasked token")


def values_are_readable(tensor: Tensor) -> bool:
    """Return True if reading values needs no device sync: on the CPU, outside torch.compile."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def shape_of(tensor: Tensor) -> str:
    """Format a shape for the "got" of a message."""
    return f"shape {tuple(tensor.shape)}"
