"""Argument checks: the one place where error messages are written.

A shape, a dtype or a setting is always checked. What a tensor holds is checked only where looking
costs nothing: eagerly on the CPU, never on a GPU, where it would wait for the device.
"""

import math
from collections.abc import Collection
from numbers import Integral, Real

import torch
from torch import Tensor

_CONSUMED = "_grpo_kernels_consumed"


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be less than {below}, got {value}")


def check_max_completion_length(value: object, aggregation: str) -> None:
    if aggregation != "fixed_length":
        if value is not None:
            raise ValueError(
                "max_completion_length is read by aggregation='fixed_length' only, "
                f"got {value!r} with aggregation={aggregation!r}"
            )
        return
    if value is None:
        raise ValueError("aggregation='fixed_length' needs max_completion_length, got None")
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"max_completion_length must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"max_completion_length must be at least 1, got {value}")


def check_logprob(logprob: Tensor) -> None:
    _check_floating("logprob", logprob)
    if logprob.dim() not in (1, 2):
        raise ValueError(f"logprob must be [B, T] or packed [N], got {_shape(logprob)}")


def check_per_token(name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    """A floating-point tensor with one value per token, or None."""
    if tensor is None:
        return
    _check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {_shape(tensor)}")


def check_mask(mask: Tensor | None, shape: torch.Size) -> None:
    if mask is None:
        return
    _check_tensor("mask", mask)
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}, got {_shape(mask)}")
    if mask.dtype != torch.bool and _may_look(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must be bool or hold only 0 and 1")


def check_advantages(advantages: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> None:
    _check_tensor("advantages", advantages)
    allowed = [shape]
    if len(shape) == 2:
        allowed.append(shape[:1])
    elif cu_seqlens is not None:
        allowed.append(torch.Size([cu_seqlens.shape[0] - 1]))
    if advantages.shape not in allowed:
        expected = " or ".join(str(tuple(each)) for each in allowed)
        raise ValueError(f"advantages must have shape {expected}, got {_shape(advantages)}")


def check_cu_seqlens(
    cu_seqlens: Tensor | None, shape: torch.Size, ratio_level: str, aggregation: str
) -> None:
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens belongs to packed [N] input, got [B, T] input")
        return
    if cu_seqlens is None:
        if (ratio_level, aggregation) != ("token", "token_mean"):
            raise ValueError(
                f"packed [N] input needs cu_seqlens with ratio_level={ratio_level!r} and "
                f"aggregation={aggregation!r}, got None"
            )
        return
    _check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [sequences + 1], got {_shape(cu_seqlens)}")
    if not _may_look(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != shape[0] or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to {shape[0]} tokens, got {cu_seqlens.tolist()}"
        )


def check_normalizers(
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    entropy_coef: float,
    aggregation: str,
) -> None:
    for name, value in (
        ("normalizer", normalizer),
        ("entropy_normalizer", entropy_normalizer),
    ):
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(f"{name} must be a number or a 0-dim tensor, got {_shape(value)}")
        elif value is not None and not torch.compiler.is_compiling():
            # Under torch.compile the number is a symbol, and a comparison would recompile for it.
            check_number(name, value, above=0)
    if entropy_coef == 0 or normalizer is None or aggregation == "token_mean":
        return
    if entropy_normalizer is None:
        raise ValueError(
            f"normalizer with entropy_coef={entropy_coef} and aggregation={aggregation!r} needs "
            "entropy_normalizer, the number of tokens that the mean entropy divides by, got None"
        )


def check_kl_input(
    kl_estimator: str,
    beta: float,
    over_vocabulary: bool,
    ref_logprob: Tensor | None,
    kl: Tensor | None,
) -> None:
    wanted, given = ("kl", kl) if over_vocabulary else ("ref_logprob", ref_logprob)
    unread, stray = ("ref_logprob", ref_logprob) if over_vocabulary else ("kl", kl)
    if beta != 0 and given is None:
        raise ValueError(f"beta={beta} with kl_estimator={kl_estimator!r} needs {wanted}, got None")
    if stray is not None:
        raise ValueError(f"kl_estimator={kl_estimator!r} reads {wanted}, got {unread}")


def check_entropy_input(entropy_coef: float, entropy: Tensor | None) -> None:
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy, got None")


def check_rewards(rewards: Tensor) -> None:
    _check_tensor("rewards", rewards)
    if rewards.dtype == torch.bool or rewards.is_complex():
        raise TypeError(f"rewards must hold real numbers, got {rewards.dtype}")
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [B, G], got {_shape(rewards)}")
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must hold at least 2 completions per prompt, got {_shape(rewards)}: "
            "a group of 1 has no standard deviation"
        )
    if _may_look(rewards) and not rewards.isfinite().all():
        raise ValueError("rewards must be finite, got NaN or infinity")


def check_logits(name: str, logits: Tensor) -> None:
    _check_floating(name, logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"{name} must be [B, T, V] or packed [N, V], got {_shape(logits)}")
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} must have a vocabulary of at least 1, got {_shape(logits)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in the last dimension, got strides {logits.stride()}"
        )
    if getattr(logits, _CONSUMED, False):
        raise ValueError(f"{name} must not be used again after inplace=True, got them again")


def mark_consumed(logits: Tensor) -> None:
    """From now on `check_logits` refuses these logits: their backward puts a gradient there."""
    if any(n > 1 and stride == 0 for n, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"logits must not be expanded with inplace=True, got strides {logits.stride()}"
        )
    if not torch.compiler.is_compiling():
        setattr(logits, _CONSUMED, True)


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two logits of one shape on one device."""
    _check_floating(name, tensor)
    _check_floating(other_name, other)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {_shape(tensor)}"
        )
    _check_device(name, tensor, other)


def check_tokens(tokens: Tensor, logits: Tensor) -> None:
    _check_tensor("tokens", tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integer ids, got {tokens.dtype}")
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens must have shape {tuple(logits.shape[:-1])}, that of logits without the "
            f"vocabulary, got {_shape(tokens)}"
        )
    _check_device("tokens", tokens, logits)


def check_token_ids(tokens: Tensor, mask: Tensor | None, V: int) -> None:
    """Looks at the ids, on the CPU only."""
    if not _may_look(tokens):
        return
    outside = (tokens < 0) | (tokens >= V)
    if mask is not None:
        outside &= mask != 0
    if outside.any():
        raise ValueError(
            f"tokens must lie in [0, {V}) where they are not masked, got {tokens[outside][0]}"
        )


def check_temperature(temperature: float | Tensor, tokens: Tensor, mask: Tensor | None) -> None:
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, above=0)
        return
    _check_floating("temperature", temperature)
    _check_device("temperature", temperature, tokens)
    try:
        fits = torch.broadcast_shapes(temperature.shape, tokens.shape) == tokens.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"temperature must broadcast to shape {tuple(tokens.shape)}, got {_shape(temperature)}"
        )
    if not _may_look(temperature):
        return
    positive = temperature > 0
    if mask is not None:
        positive = positive | (mask == 0)
    if not positive.all():
        raise ValueError("temperature must be greater than 0 for every unmasked token")


def check_kl_arguments(kl: str | None, ref_logits: Tensor | None, logits: Tensor) -> None:
    if kl is None:
        if ref_logits is not None:
            raise ValueError("ref_logits is read with kl='forward' or 'reverse' only, got kl=None")
        return
    check_choice("kl", kl, ("forward", "reverse"))
    if ref_logits is None:
        raise ValueError(f"kl={kl!r} needs ref_logits, got None")
    check_logits("ref_logits", ref_logits)
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits must have shape {tuple(logits.shape)}, got {_shape(ref_logits)}"
        )
    _check_device("ref_logits", ref_logits, logits)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_floating(name: str, tensor: Tensor) -> None:
    _check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {tensor.device}")


def _may_look(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
