"""Checks of logits and hidden states, and of what is asked of each row."""

from numbers import Integral

import torch
from torch import Tensor

from ..validation import expect_choice, expect_number, expect_tensor, shape_of, values_are_readable

_CONSUMED = "_grpo_kernels_consumed"


def check_logits(name: str, logits: Tensor) -> None:
    expect_tensor(name, logits, floating=True)
    if logits.dim() not in (2, 3):
        raise ValueError(f"{name} must be [B, T, V] or packed [N, V], got {shape_of(logits)}")
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} must have a vocabulary of at least 1, got {shape_of(logits)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel() > 0:
        raise ValueError(
            f"{name} must be contiguous in the last dimension, got strides {logits.stride()}"
        )
    if getattr(logits, _CONSUMED, False):
        raise ValueError(f"{name} must not be used again after inplace=True, got them again")


def mark_consumed(logits: Tensor) -> None:
    """From now on `check_logits` refuses these logits: their backward puts a gradient there."""
    overlaps = any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True))
    if overlaps and logits.numel() > 0:
        raise ValueError(
            f"logits must not be expanded with inplace=True, got strides {logits.stride()}"
        )
    if not torch.compiler.is_compiling():
        setattr(logits, _CONSUMED, True)


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two logits of one shape on one device."""
    expect_tensor(name, tensor, floating=True)
    expect_tensor(other_name, other, floating=True)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {shape_of(tensor)}"
        )
    expect_tensor(name, tensor, device_of=other)


def check_tokens(tokens: Tensor, rows: Tensor, name: str = "logits") -> None:
    """Integer ids, one for each row of the logits or hidden states of that name."""
    expect_tensor("tokens", tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integer ids, got {tokens.dtype}")
    if tokens.shape != rows.shape[:-1]:
        raise ValueError(
            f"tokens must have shape {tuple(rows.shape[:-1])}, that of {name} without the "
            f"last dimension, got {shape_of(tokens)}"
        )
    expect_tensor("tokens", tokens, device_of=rows)


def check_token_ids(tokens: Tensor, mask: Tensor | None, V: int) -> None:
    """Looks at the ids, on the CPU only."""
    if not values_are_readable(tokens):
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
        if not torch.compiler.is_compiling():  # there it may be a symbol, which has no value yet
            expect_number("temperature", temperature, above=0)
        return
    expect_tensor("temperature", temperature, floating=True)
    expect_tensor("temperature", temperature, device_of=tokens)
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


def check_kl_arguments(kl: str | None, ref_logits: Tensor | None, logits: Tensor) -> None:
    if kl is None:
        if ref_logits is not None:
            raise ValueError("ref_logits is read with kl='forward' or 'reverse' only, got kl=None")
        return
    expect_choice("kl", kl, ("forward", "reverse"))
    if ref_logits is None:
        raise ValueError(f"kl={kl!r} needs ref_logits, got None")
    check_logits("ref_logits", ref_logits)
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits must have shape {tuple(logits.shape)}, got {shape_of(ref_logits)}"
        )
    expect_tensor("ref_logits", ref_logits, device_of=logits)


def check_hidden(hidden: Tensor) -> None:
    expect_tensor("hidden", hidden, floating=True)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be [B, T, H] or packed [N, H], got {shape_of(hidden)}")


def check_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, same_dtype: bool
) -> None:
    """weight [V, H] and bias [V] for hidden [..., H]; the prefix is that of a reference's names."""
    expect_tensor(prefix + "weight", weight, floating=True)
    H = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] < 1:
        raise ValueError(
            f"{prefix}weight must be [V, {H}], where {H} is the size of {prefix}hidden, "
            f"got {shape_of(weight)}"
        )
    parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, part in parts.items():
        expect_tensor(prefix + name, part, floating=True)
        expect_tensor(prefix + name, part, device_of=hidden)
        if same_dtype and part.dtype != hidden.dtype:
            raise TypeError(
                f"{prefix}{name} must have the dtype of {prefix}hidden, {hidden.dtype}, "
                f"got {part.dtype}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias must have shape {tuple(weight.shape[:1])}, got {shape_of(bias)}"
        )


def check_reference_head(hidden: Tensor, weight: Tensor, reference: dict[str, Tensor]) -> None:
    """ref_hidden and ref_weight: the same tokens and vocabulary, of any hidden size."""
    for name in ("ref_hidden", "ref_weight"):
        if reference[name] is None:
            raise ValueError(f"ref_hidden and ref_weight belong together, got no {name}")
    ref_hidden, ref_weight = reference["ref_hidden"], reference["ref_weight"]
    expect_tensor("ref_hidden", ref_hidden, floating=True)
    expect_tensor("ref_hidden", ref_hidden, device_of=hidden)
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_hidden.dim() != hidden.dim():
        raise ValueError(
            f"ref_hidden must have the tokens of hidden, {tuple(hidden.shape[:-1])}, "
            f"got {shape_of(ref_hidden)}"
        )
    expect_tensor("ref_weight", ref_weight)
    if ref_weight.dim() == 2 and ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight must have the vocabulary of weight, {weight.shape[0]}, "
            f"got {shape_of(ref_weight)}"
        )


def check_linear_kl(kl: str | None, reference: dict[str, Tensor | None]) -> None:
    given = [name for name, each in reference.items() if each is not None]
    if kl is not None:
        expect_choice("kl", kl, ("forward", "reverse"))
        if not given:
            raise ValueError(f"kl={kl!r} needs ref_hidden and ref_weight, got None")
    elif given:
        raise ValueError(f"{given[0]} is read with kl='forward' or 'reverse' only, got kl=None")


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    if chunk_tokens is None:
        return
    if not isinstance(chunk_tokens, Integral) or isinstance(chunk_tokens, bool):
        raise TypeError(f"chunk_tokens must be an integer, got {type(chunk_tokens).__name__}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def check_packing(packing: tuple[Tensor, Tensor], mask: Tensor | None, tokens: Tensor) -> None:
    """A TokenPacking of the mask of these tokens."""
    order, counts = packing
    if order.shape != (tokens.numel(),):
        raise ValueError(
            f"packing must be of a mask of {tokens.numel()} tokens, got one of {order.shape[0]}"
        )
    expect_tensor("packing", order, device_of=tokens)
    if not values_are_readable(tokens):
        return
    active = torch.zeros(tokens.numel(), dtype=torch.bool)
    active[order[: counts.sum()]] = True
    expected = torch.ones_like(active) if mask is None else mask.flatten() != 0
    if not active.equal(expected):
        raise ValueError("packing must be pack_tokens of the same mask, got that of another")


def check_packed_advantages(packing: tuple[Tensor, Tensor], advantage: Tensor) -> None:
    """The tokens that the packing says are without a signal have advantage 0."""
    order, counts = packing
    if (
        values_are_readable(advantage)
        and advantage.flatten()[order[counts[0] : counts.sum()]].any()
    ):
        raise ValueError("packing must be pack_tokens of the same advantages, got that of others")


def check_linear_kl_input(
    kl_estimator: str,
    beta: float,
    over_vocabulary: bool,
    ref_logprob: Tensor | None,
    has_reference: bool,
) -> None:
    """What the KL of an objective reads at the hidden level: a reference's head, or log-probs."""
    if over_vocabulary and ref_logprob is not None:
        raise ValueError(
            f"kl_estimator={kl_estimator!r} reads ref_hidden and ref_weight, got ref_logprob"
        )
    if beta != 0 and not has_reference and ref_logprob is None:
        needed = "ref_hidden and ref_weight" if over_vocabulary else "ref_logprob or ref_hidden"
        raise ValueError(f"beta={beta} with kl_estimator={kl_estimator!r} needs {needed}, got None")


def check_vocab_group(vocab_group: object, head: dict[str, Tensor | None]) -> None:
    """A group of ranks, each with its own rows of the head."""
    if not isinstance(vocab_group, torch.distributed.ProcessGroup):
        raise TypeError(
            "vocab_group must be a torch.distributed.ProcessGroup that this rank is in, "
            f"got {type(vocab_group).__name__}"
        )
    for name, part in head.items():
        if hasattr(part, "to_local"):
            raise TypeError(
                f"{name} must be this rank's rows with vocab_group, as {name}.to_local() has them, "
                "got a DTensor"
            )


def check_same_tokens(counts: Tensor) -> None:
    """The ranks of a vocab_group have as many tokens, each of which is one row of all shards."""
    if values_are_readable(counts) and (counts != counts[0]).any():
        raise ValueError(
            "tokens must be the same on every rank of vocab_group, "
            f"got {', '.join(map(str, counts.tolist()))} of them"
        )
