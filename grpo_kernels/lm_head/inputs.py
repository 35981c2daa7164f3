"""Arguments of the hidden level, checked, flattened and gathered once."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends.interface import StatsRequest, accumulation_dtype, scalar_tensor
from ..backends.row_support import RowSupport, check_support, prepare_support
from ..sampling_support import TokenSupport
from ..validation import (
    OUT_OF_VOCAB,
    expect_choice,
    expect_ids,
    expect_mask,
    expect_no_tangent,
    expect_number,
    expect_temperature,
    expect_tensor,
    expect_tokens,
    shape_of,
    values_are_readable,
)
from .vocab_parallel import local_tokens, unshard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


HIDDEN_LAYOUT = "[B, T, H] or packed [N, H]"


class HeadAdapter(NamedTuple):
    """A low-rank adapter (LoRA) of an LM head: logits += scale · (hidden aᵀ) bᵀ.

    Its products are in fp32 (fp64 for fp64 hidden states), whatever its dtype, and cost r / H of
    the head's. The merged weight + scale · b a is never made. Several adapters are one, with their
    `a` and `b` concatenated along r.

    a: [r, H], floating point; lora_A.weight in PEFT.
    b: [V, r], floating point; lora_B.weight in PEFT. With a vocab_group, this rank's rows.
    scale: a finite number, not differentiated.
    """

    a: Tensor
    b: Tensor
    scale: float


class HeadTensors(NamedTuple):
    """The tensors that logits are made of, or the gradient in each; None where there is none."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]
    adapter_a: Tensor | None  # [r, H]
    adapter_b: Tensor | None  # [V, r]


class LMHeadInputs(NamedTuple):
    """Hidden states, the LM head that reads them, and what is asked of each token."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]; with a vocab_group this rank's rows
    bias: Tensor | None  # [V]
    adapter_a: Tensor | None  # [r, H]
    adapter_b: Tensor | None  # [V, r]; with a vocab_group this rank's rows
    tokens: Tensor  # [M], int64; with a vocab_group the ids of this rank's rows
    token_rows: Tensor | None  # [M], int64: the row of hidden of each token; None: its own, M = N
    temperature: Tensor  # [M], in the accumulation dtype
    ref_hidden: Tensor | None  # [N, H of the reference policy]; None without kl
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    vocab_tokens: Tensor | None  # [M], int64: ids in the vocabulary; None: those in `tokens`
    vocab_start: Tensor | None  # [], int64; with a vocab_group the id of this rank's first row
    vocab_ids: Tensor | None  # [V], int64: rows of the whole head that are here; None: all
    support_ids: Tensor | None  # this and the next two: RowSupport, its ids are rows of `weight`
    support_ranges: Tensor | None
    support_sizes: Tensor | None
    adapter_scale: float
    softcap: float | None
    entropy: bool  # this and the next four: StatsRequest
    sum_sq_probs: bool
    mean_logit: bool
    is_top1: bool
    top_logprobs: int
    kl: str | None
    matmul_dtype: torch.dtype  # of the operands of the products
    vocab_group: str | None  # name of the process group whose ranks hold shards of the vocabulary

    @property
    def leaves(self) -> HeadTensors:
        """The tensors that may have a gradient: the first fields, in the same order."""
        return HeadTensors(*(getattr(self, name) for name in HeadTensors._fields))

    @property
    def request(self) -> StatsRequest:
        """The statistics that are asked for."""
        return StatsRequest(*(getattr(self, name) for name in StatsRequest._fields))

    @property
    def support(self) -> RowSupport:
        """The ids that each token was drawn among."""
        return RowSupport(*(getattr(self, f"support_{name}") for name in RowSupport._fields))

    def ids_of_columns(self, columns: Tensor) -> Tensor:
        """Map columns of the logits to ids in the vocabulary."""
        ids = columns if self.vocab_ids is None else self.vocab_ids[columns]
        return ids if self.vocab_start is None else ids + self.vocab_start

    @property
    def ref_matmul_dtype(self) -> torch.dtype:
        """Dtype of the operands of the reference policy's product: none of its digits is lost."""
        assert self.ref_hidden is not None
        under_autocast = self.hidden.dtype != self.matmul_dtype
        if under_autocast or self.ref_hidden.dtype == self.matmul_dtype:
            return self.matmul_dtype
        return self.temperature.dtype

    @property
    def grad_dtype(self) -> torch.dtype:
        """Dtype of the finished d_hidden and d_weight: fp32, or that of the operands on a CPU.

        fp16 does not hold a gradient that a GradScaler has yet to multiply.
        """
        is_unrounded = self.hidden.device.type == "cuda" or self.matmul_dtype == torch.float16
        return self.temperature.dtype if is_unrounded else self.matmul_dtype

    @property
    def grad_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the finished gradients of `leaves`."""
        return (self.grad_dtype,) * 2 + (self.temperature.dtype,) * 3


def prepare_inputs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    request: StatsRequest = StatsRequest(),
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: str | None = None,
    mask: Tensor | None = None,
    adapter: HeadAdapter | None = None,
    token_rows: Tensor | None = None,
    support: TokenSupport | None = None,
    vocab_group: "ProcessGroup | None" = None,
) -> LMHeadInputs:
    """Check the arguments, flatten tokens to [M], gather DTensors, drop what is not read."""
    expect_tensor("hidden", hidden, floating=True, dims=(2, 3), layout=HIDDEN_LAYOUT)
    device = hidden.device
    is_autocast = torch.is_autocast_enabled(device.type)
    check_head("", hidden, weight, bias)
    for name, leaf in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        expect_no_tangent(name, leaf)
    if adapter is not None:
        _check_adapter(adapter, hidden, weight)
        expect_no_tangent("adapter.a", adapter.a)
        expect_no_tangent("adapter.b", adapter.b)
    check_tokens(tokens, token_rows, hidden)
    expect_mask(mask, tokens)
    expect_temperature(temperature, tokens, mask)
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    _check_kl(kl, reference)
    if softcap is not None:
        expect_number("softcap", softcap, above=0)
    if vocab_group is not None:
        adapter_b = None if adapter is None else adapter.b
        rows = {"weight": weight, "bias": bias, "adapter.b": adapter_b, **reference}
        _check_vocab_group(vocab_group, rows)
    K, V = request.top_logprobs, weight.shape[0]
    request.check(V if vocab_group is None else None)  # local_tokens knows the size
    weight, bias = unshard(weight), None if bias is None else unshard(bias)
    if adapter is not None:
        adapter = adapter._replace(a=unshard(adapter.a), b=unshard(adapter.b))
    if kl is None:
        ref_hidden = ref_weight = ref_bias = None
    else:
        check_reference_head(hidden, weight, ref_hidden, ref_weight, ref_bias)
        assert ref_hidden is not None and ref_weight is not None
        ref_hidden = ref_hidden.detach().flatten(0, -2)
        ref_weight = unshard(ref_weight.detach())
        ref_bias = None if ref_bias is None else unshard(ref_bias.detach())

    dtype = accumulation_dtype(hidden.dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(dtype)
    else:
        temperature = scalar_tensor(temperature, dtype, device)
    temperature = temperature.expand(tokens.shape).reshape(tokens.numel())
    flat_tokens, group_name = tokens.to(torch.int64).flatten(), None
    flat_mask = None if mask is None else mask.flatten() != 0
    vocab_tokens = vocab_start = vocab_size = None
    if vocab_group is not None:
        group_name = vocab_group.group_name
        vocab_tokens = flat_tokens
        flat_tokens, vocab_start, vocab_size = local_tokens(
            flat_tokens, flat_mask, V, K, group_name
        )
    num_rows, exists = hidden.shape[:-1].numel(), None
    if token_rows is not None:
        token_rows = token_rows.to(torch.int64)
        _check_token_rows(token_rows, temperature, mask, num_rows)
        exists = (token_rows >= 0) & (token_rows < num_rows)
        token_rows = torch.where(exists, token_rows, 0)
    row_support = RowSupport()
    if support is not None:
        check_support(support, tokens)
        drawn = flat_tokens if vocab_tokens is None else vocab_tokens
        if vocab_size is None:
            vocab_size = torch.full((), V, device=device)
        row_support, drawn = prepare_support(
            support, drawn, flat_mask, vocab_size, token_rows, num_rows
        )
        flat_tokens = torch.where(drawn == OUT_OF_VOCAB, OUT_OF_VOCAB, flat_tokens)
        if vocab_start is not None:
            row_support = row_support.shard(vocab_start, V)
    if exists is not None:  # a row that does not exist gives NaN on a GPU, as a token id does
        flat_tokens = torch.where(exists, flat_tokens, OUT_OF_VOCAB)
    uses_autocast = is_autocast and hidden.dtype != torch.float64
    return LMHeadInputs(
        hidden.flatten(0, -2),
        weight,
        bias,
        None if adapter is None else adapter.a,
        None if adapter is None else adapter.b,
        flat_tokens,
        token_rows,
        temperature,
        ref_hidden,
        ref_weight,
        ref_bias,
        vocab_tokens,
        vocab_start,
        None,
        *row_support,
        1.0 if adapter is None else adapter.scale,
        softcap,
        *request,
        kl,
        torch.get_autocast_dtype(device.type) if uses_autocast else hidden.dtype,
        group_name,
    )


def check_tokens(tokens: Tensor, token_rows: Tensor | None, hidden: Tensor) -> None:
    """Check token ids: one per row of hidden or, with token_rows, any number [M]."""
    if token_rows is None:
        expect_tokens(tokens, hidden, "hidden")
        return
    expect_tensor("tokens", tokens, dims=(1,), layout="packed [M] with token_rows")
    expect_ids("tokens", tokens)
    expect_tensor("tokens", tokens, device_of=hidden)
    expect_ids("token_rows", token_rows)
    expect_tensor("token_rows", token_rows, shape=tokens.shape, device_of=hidden)


def _check_token_rows(
    token_rows: Tensor, temperature: Tensor, mask: Tensor | None, num_rows: int
) -> None:
    """Check, where the values are readable, that the rows exist and have one temperature each."""
    if not values_are_readable(token_rows):
        return
    kept = slice(None) if mask is None else mask != 0
    rows, temperature = token_rows[kept], temperature[kept]
    outside = (rows < 0) | (rows >= num_rows)
    if outside.any():
        raise ValueError(
            f"token_rows must lie in [0, {num_rows}), the rows of hidden, where tokens are not "
            f"masked, got {rows[outside][0]}"
        )
    of_row = temperature.new_zeros(num_rows)
    of_row[rows] = temperature
    differs = of_row[rows] != temperature
    if differs.any():
        raise ValueError(
            "temperature must be the same for all tokens of a row of hidden, got several for row "
            f"{rows[differs][0]}"
        )


def check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check weight [V, H] and bias [V] of a head; `prefix` names the reference policy's."""
    expect_tensor(prefix + "weight", weight, floating=True)
    H = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] < 1:
        raise ValueError(
            f"{prefix}weight must be [V, {H}], where {H} is the size of {prefix}hidden, "
            f"got {shape_of(weight)}"
        )
    expect_tensor(prefix + "weight", weight, device_of=hidden)
    if bias is not None:
        expect_tensor(
            prefix + "bias", bias, floating=True, shape=weight.shape[:1], device_of=hidden
        )


def _check_adapter(adapter: object, hidden: Tensor, weight: Tensor) -> None:
    """Check that the adapter fits hidden [..., H] and weight [V, H]; any dtypes are allowed."""
    if not isinstance(adapter, HeadAdapter):
        raise TypeError(f"adapter must be a HeadAdapter(a, b, scale), got {type(adapter).__name__}")
    expect_tensor("adapter.a", adapter.a, floating=True, device_of=hidden)
    H = hidden.shape[-1]
    if adapter.a.dim() != 2 or adapter.a.shape[1] != H or adapter.a.shape[0] < 1:
        raise ValueError(
            f"adapter.a must be [r, {H}], where {H} is the size of hidden, "
            f"got {shape_of(adapter.a)}"
        )
    shape = (weight.shape[0], adapter.a.shape[0])
    expect_tensor("adapter.b", adapter.b, floating=True, shape=shape, device_of=hidden)
    if not torch.compiler.is_compiling():  # a symbol has no value yet
        expect_number("adapter.scale", adapter.scale)


def check_reference_head(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    prefix: str = "ref_",
) -> None:
    """Check the reference policy's head: the same tokens and vocabulary, any hidden size.

    prefix: of the names of its tensors.
    """
    if ref_hidden is None or ref_weight is None:
        names = prefix + "hidden", prefix + "weight"
        missing = names[0] if ref_hidden is None else names[1]
        raise ValueError(f"{names[0]} and {names[1]} belong together, got no {missing}")
    expect_tensor(prefix + "hidden", ref_hidden, floating=True, device_of=hidden)
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_hidden.dim() != hidden.dim():
        raise ValueError(
            f"{prefix}hidden must have the tokens of hidden, {tuple(hidden.shape[:-1])}, "
            f"got {shape_of(ref_hidden)}"
        )
    expect_tensor(prefix + "weight", ref_weight)
    if ref_weight.dim() == 2 and ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{prefix}weight must have the vocabulary of weight, {weight.shape[0]}, "
            f"got {shape_of(ref_weight)}"
        )
    check_head(prefix, ref_hidden, ref_weight, ref_bias)


def _check_kl(kl: str | None, reference: dict[str, Tensor | None]) -> None:
    given = [name for name, part in reference.items() if part is not None]
    if kl is not None:
        expect_choice("kl", kl, ("forward", "reverse"))
        if not given:
            raise ValueError(f"kl={kl!r} needs ref_hidden and ref_weight, got None")
    elif given:
        raise ValueError(f"{given[0]} is read with kl='forward' or 'reverse' only, got kl=None")


def _check_vocab_group(vocab_group: object, head: dict[str, Tensor | None]) -> None:
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
