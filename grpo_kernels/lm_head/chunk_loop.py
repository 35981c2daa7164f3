"""Row statistics and their gradient straight from hidden states, a chunk of tokens at a time.

    logits of the chunk = hidden @ weight.T      head.py, unrounded
    statistics, gradient of the logits           rows.py, the functions of the logits level
    d_hidden, d_weight                           head.py, accumulated in fp32

The logits of one chunk are all that ever exists. Tokens come in as `order`, an index of those that
count, so that the others are in no product.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends import RowInputs, backend_for
from ..objective.token_gradients import LossInputs, TokenGrads, token_gradients
from ..workspace import Buffers
from .chunk_size import MEMORY_SHARE, WORKSPACE, plan_chunk
from .matmul import add_weight_gradient, gradient_dtype, write_hidden_gradient, write_logits
from .vocab_parallel import merge_over, smallest, total

if TYPE_CHECKING:
    from ..objective.config import LossConfig


class LMHeadInputs(NamedTuple):
    """Hidden states, the head that reads them, and what is asked of each token."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], with a vocab_group this rank's rows
    bias: Tensor | None  # [V]
    tokens: Tensor  # [N], int64; with a vocab_group `local_ids`
    temperature: Tensor  # [N], in the accumulation dtype
    ref_hidden: Tensor | None  # [N, H of the reference]; None without kl
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    softcap: float | None
    entropy: bool
    kl: str | None
    dtype: torch.dtype  # of the operands of the matrix products
    vocab_group: str | None  # the name of the group whose ranks have the vocabulary in shards

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the gradient's operands: gradients of a mean over many tokens underflow in fp16."""
        return torch.bfloat16 if self.dtype == torch.float16 else self.dtype

    @property
    def ref_dtype(self) -> torch.dtype:
        """Of the operands of the reference's products: none of its digits is lost."""
        under_autocast = self.hidden.dtype != self.dtype
        if under_autocast or self.ref_hidden.dtype == self.dtype:
            return self.dtype
        return self.temperature.dtype


class RowStats(NamedTuple):
    """Results of the rows, [N] each, the row_lses [N, 2]; None where not asked for."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    row_lse: Tensor
    ref_row_lse: Tensor | None

    @classmethod
    def zeros(cls, inputs: LMHeadInputs) -> "RowStats":
        new, N = inputs.temperature.new_zeros, len(inputs.tokens)
        return cls(
            new(N),
            new(N) if inputs.entropy else None,
            new(N) if inputs.kl else None,
            new(N, 2),
            new(N, 2) if inputs.kl else None,
        )

    def write(self, at: Tensor, chunk: "RowStats") -> None:
        for mine, theirs in zip(self, chunk, strict=True):
            if mine is not None and theirs is not None:
                mine.index_copy_(0, at, theirs)

    def at(self, index: Tensor) -> "RowStats":
        return RowStats(*(each if each is None else each[index] for each in self))


class ChunkedLMHead:
    """Rows of logits that exist a chunk at a time, in one workspace.

    Args:
        count: the number of tokens that will be worked on; the planner divides it into chunks.
        chunk_tokens: overrides the planner. Every product then has exactly this many rows, the
            last chunk being filled up with zeros: the bits of a row may depend on the shape of the
            product that it is in, and so never depend on the number of tokens.
        gradient: whether `backward` will be called.
    """

    def __init__(
        self, inputs: LMHeadInputs, count: int, chunk_tokens: int | None, *, gradient: bool
    ) -> None:
        (V, H), device = inputs.weight.shape, inputs.weight.device
        self.inputs = inputs._replace(weight=inputs.weight.to(inputs.dtype))
        self.filled = chunk_tokens is not None
        self.size = chunk_tokens or plan_chunk(
            count, V, H, inputs.dtype, memory_of(device), kl=bool(inputs.kl), gradient=gradient
        )
        if inputs.kl:
            self.inputs = self.inputs._replace(ref_weight=inputs.ref_weight.to(inputs.ref_dtype))
        if inputs.vocab_group and not self.filled:  # each chunk is a collective of all ranks
            self.size = smallest(self.size, inputs.vocab_group, device)
        self.buffers = Buffers(device)
        self.hidden: Tensor | None = None  # of the chunk whose logits were written last
        # Without a chunk there is nothing to work on, and no workspace.
        wide = inputs.temperature.new_empty((self.size if count else 0, V))
        self._logits, self._ref_logits = wide, torch.empty_like(wide) if inputs.kl else None
        self._d_logits = None
        if gradient:
            narrow = inputs.gradient_dtype
            self._d_logits = wide if narrow == wide.dtype else torch.empty_like(wide, dtype=narrow)

    def chunks(self, order: Tensor) -> Iterator[Tensor]:
        """The index tensor, [n] at a time; none if it is empty."""
        return iter(order.split(self.size)) if len(order) else iter(())

    def gather(self, name: str, states: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
        """The states [N, H] of a chunk as operands, filled up where chunks have a fixed size."""
        shape = (self.size if self.filled else len(at), states.shape[1])
        rows = self.buffers(name, *shape, dtype=states.dtype)
        torch.index_select(states, 0, at, out=rows[: len(at)])
        rows[len(at) :].zero_()
        return self.cast(name, rows, dtype)

    def cast(self, name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Gathered rows in another dtype."""
        if rows.dtype == dtype:
            return rows
        return self.buffers(name, *rows.shape, dtype=dtype).copy_(rows)

    def write_logits(self, at: Tensor) -> None:
        """Fill the workspace with the logits of a chunk."""
        of, buffers = self.inputs, self.buffers
        self.hidden = hidden = self.gather("states", of.hidden, at, of.dtype)
        write_logits(self._logits[: len(hidden)], hidden, of.weight, of.bias, buffers)
        if of.kl:
            hidden = self.gather("reference's states", of.ref_hidden, at, of.ref_dtype)
            logits = self._ref_logits[: len(hidden)]
            write_logits(logits, hidden, of.ref_weight, of.ref_bias, buffers)

    def forward(self, at: Tensor) -> RowStats:
        """The statistics [n] of the chunk whose logits were written last."""
        rows, of = self._rows(at), self.inputs
        outputs = backend_for(rows.logits).token_stats_forward(rows, entropy=of.entropy)
        outputs = outputs.map(lambda x: x.squeeze(0))
        if of.vocab_group:
            token = rows.tokens.squeeze(0), rows.temperature.squeeze(0)
            outputs = merge_over(of.vocab_group, outputs, *token, of.kl)
        return RowStats(*outputs)

    def backward(self, at: Tensor, stats: RowStats, upstream: TokenGrads) -> Tensor:
        """The gradient [rows of the product, V] of the chunk's logits, which it may overwrite."""
        rows, d_logits = self._rows(at), self._gradient_rows(at)
        grads = TokenGrads(
            *(each if each is None else each.contiguous().unsqueeze(0) for each in upstream)
        )
        stats = RowStats(*(each if each is None else each.unsqueeze(0) for each in stats))
        backend_for(rows.logits).token_stats_backward(
            rows, stats, grads, d_logits[: len(at)].unsqueeze(0)
        )
        return d_logits

    def loss_gradient(
        self, at: Tensor, loss_inputs: LossInputs, config: "LossConfig"
    ) -> tuple[RowStats, Tensor]:
        """The statistics of a chunk, and what `backward` makes of a token-level loss of them.

        In one launch but for a KL over the vocabulary, and for a vocabulary in shards.
        """
        if self.inputs.kl is not None or self.inputs.vocab_group:
            stats = self.forward(at)
            return stats, self.backward(
                at, stats, token_gradients(stats.logprob, loss_inputs, config)
            )
        rows = self._rows(at)
        loss_inputs = LossInputs(
            *(x if x is None or x.dim() == 0 else x.unsqueeze(0) for x in loss_inputs)
        )
        d_logits = self._gradient_rows(at)
        logprob, entropy = backend_for(rows.logits).grpo_loss(
            rows, loss_inputs, config, d_logits[: len(at)].unsqueeze(0)
        )
        return RowStats(logprob.squeeze(0), entropy.squeeze(0), None, None, None), d_logits

    def _gradient_rows(self, at: Tensor) -> Tensor:
        """Where a chunk's gradient goes: [rows of the product, V], 0 past the chunk."""
        d_logits = self._d_logits[: self.size if self.filled else len(at)]
        d_logits[len(at) :].zero_()
        return d_logits

    def _rows(self, at: Tensor) -> RowInputs:
        """A chunk as one sequence."""
        ref_logits = None if self._ref_logits is None else self._ref_logits[: len(at)].unsqueeze(0)
        return RowInputs(
            self._logits[: len(at)].unsqueeze(0),
            self.inputs.tokens[at].unsqueeze(0),
            self.inputs.temperature[at].unsqueeze(0),
            None,
            ref_logits,
            self.inputs.softcap,
            self.inputs.kl,
        )


class LMHeadGrad:
    """Accumulates the gradients of hidden, weight and bias over chunks of `count` tokens.

    wanted: which of the three; the others are None.
    """

    def __init__(self, rows: ChunkedLMHead, count: int, wanted: list[bool]) -> None:
        hidden, weight, bias = wanted
        self._rows, inputs = rows, rows.inputs
        (V, H), new = inputs.weight.shape, inputs.temperature.new_empty
        self._done = grad_dtype(inputs)
        self._weight = inputs.weight.to(inputs.gradient_dtype) if hidden else None
        self.hidden = new(inputs.hidden.shape, dtype=self._done).zero_() if hidden else None
        # A single chunk's product is what will be returned; several are added up in fp32.
        single = count <= rows.size
        self.weight = new((V, H), dtype=self._done if single else None) if weight else None
        self.bias = new(V).zero_() if bias else None
        self._first = True

    def add(self, at: Tensor, d_logits: Tensor) -> None:
        """Add what the tokens of the chunk whose logits were written last contribute."""
        of, buffers = self._rows.inputs, self._rows.buffers
        if self.hidden is not None:
            shape = (len(d_logits), self._weight.shape[1])
            product = buffers("product", *shape, dtype=self._done)
            write_hidden_gradient(product, d_logits, self._weight, buffers)
            self.hidden.index_copy_(0, at, product[: len(at)])
        if self.weight is not None:
            hidden = self._rows.cast("states", self._rows.hidden, of.gradient_dtype)
            add_weight_gradient(self.weight, d_logits, hidden, buffers, first=self._first)
        if self.bias is not None:
            self.bias.add_(d_logits.sum(0, dtype=self.bias.dtype))
        self._first = False

    def total(self, vocab_group: str | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_hidden, d_weight, d_bias), the first two in `grad_dtype`, d_bias accumulated.

        d_hidden is summed over the ranks of the group in fp32, by one collective: unrounded on a
        GPU, of products in its own dtype on a CPU.
        """
        hidden, weight = self.hidden, self.weight
        if hidden is not None and vocab_group:
            acc = self._rows.inputs.temperature.dtype
            hidden = total(hidden.to(acc), vocab_group).to(self._done)
        if weight is not None:
            weight = (weight.zero_() if self._first else weight).to(self._done)
        return hidden, weight, self.bias


def grad_dtype(inputs: LMHeadInputs) -> torch.dtype:
    """The dtype of d_hidden and d_weight before they are scaled and rounded to their leaves'."""
    device = inputs.hidden.device.type
    return gradient_dtype(inputs.gradient_dtype, inputs.temperature.dtype, device)


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; a workspace's worth where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MEMORY_SHARE * WORKSPACE
