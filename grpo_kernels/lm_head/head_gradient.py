"""Gradients of the LM head's tensors, from the gradients of the logits, chunk by chunk."""

import torch
from torch import Tensor

from ..backends import backend_for
from .chunk_loop import Chunk, ChunkedLMHead, Collected, LogitGrad
from .inputs import HeadTensors, LMHeadInputs
from .matmul import add_weight_gradient, write_hidden_gradient
from .row_scale import LARGEST, power_of_two_scale
from .vocab_parallel import all_reduce_sum


class LMHeadGrad:
    """Accumulates the gradients of the head's tensors over the chunks of `num_rows` rows.

    wanted: which of `LMHeadInputs.leaves` get one; the others have None.
    d_hidden: memory for that gradient, filled with 0.
    is_only_part: no other part of the tokens adds to the gradient of weight, which is rounded here.
    """

    def __init__(
        self,
        head: ChunkedLMHead,
        num_rows: int,
        wanted: list[bool],
        d_hidden: Tensor | None = None,
        *,
        is_only_part: bool = True,
    ) -> None:
        inputs, (hidden, weight, bias, adapter_a, adapter_b) = head.inputs, wanted
        self._inputs, self._workspace = inputs, head.workspace
        self._dtype, self._first = inputs.grad_dtype, True
        new = inputs.temperature.new_empty
        if hidden and d_hidden is None:
            d_hidden = new(inputs.hidden.shape, dtype=self._dtype).zero_()
        self.d_hidden = d_hidden
        # A single product is the result; several are summed in fp32.
        single = num_rows <= head.sizes.weight_chunk
        self._weight_dtype = self._dtype if is_only_part else inputs.temperature.dtype
        dtype = self._weight_dtype if single else None
        self.d_weight = new(inputs.weight.shape, dtype=dtype) if weight else None
        self.d_bias = new(inputs.weight.shape[0]).zero_() if bias else None
        a, b = inputs.adapter_a, inputs.adapter_b
        self.d_adapter_a = new(a.shape).zero_() if adapter_a and a is not None else None
        self.d_adapter_b = new(b.shape) if adapter_b and b is not None else None
        is_fp16 = inputs.matmul_dtype == torch.float16
        # The gradient of hidden aᵀ is d_logits @ adapter_b · adapter_factor.
        self._adapter_b, self._adapter_factor = None, inputs.adapter_scale
        if b is not None and (hidden or adapter_a):
            if is_fp16:  # the first steps of training leave b smaller than fp16 holds
                scale = power_of_two_scale(b.abs().amax(0))
                b, self._adapter_factor = b * scale, inputs.adapter_scale / scale
            self._adapter_b = b.to(inputs.matmul_dtype) if is_fp16 or b.is_cuda else b
        # [r], powers of two that bring the adapter's states to the size of the hidden states.
        self._states_scale: Tensor | None = None
        if is_fp16 and a is not None and self.d_adapter_b is not None:
            norm = torch.linalg.vector_norm(a, dim=1) * abs(inputs.adapter_scale)
            self._states_scale = power_of_two_scale(norm) / 2**LARGEST
        # In fp16 the gradients of weight, bias and adapter_b are multiplied by this: row_scale.py.
        self._scale: Tensor | None = None
        self._row_scales: list[Tensor] = []  # of the chunks since the last products

    def add(self, chunk: Chunk, grad: LogitGrad) -> None:
        """Add a chunk's contribution: by products of all rows that are collected, at the last."""
        if grad.scale is not None:
            self._row_scales.append(grad.scale)
        if chunk.collected is None:
            return
        scale = torch.cat(self._row_scales) if self._row_scales else None
        self._row_scales.clear()
        self._add_to_states(chunk.collected, scale)
        self._add_to_head(chunk.collected, scale)
        self._first = False

    def _add_to_states(self, rows: Collected, scale: Tensor | None) -> None:
        """Add to d_hidden, and to d_adapter_a, a product of the gradient of hidden aᵀ."""
        inputs, workspace, d_logits = self._inputs, self._workspace, rows.d_logits
        inverse = None if scale is None else scale.reciprocal().unsqueeze(-1)
        d_states = None  # gradient of hidden aᵀ [m, r]
        if self._adapter_b is not None:
            shape = (len(d_logits), self._adapter_b.shape[1])
            d_states = workspace("d_adapter_states", *shape, dtype=inputs.temperature.dtype)
            write_hidden_gradient(d_states, d_logits, self._adapter_b, workspace)
            d_states.mul_(self._adapter_factor)
            if inverse is not None:
                d_states.mul_(inverse)
        if self.d_hidden is not None:
            shape = (len(d_logits), inputs.weight.shape[1])
            product = workspace("product", *shape, dtype=self._dtype)
            write_hidden_gradient(product, d_logits, inputs.weight, workspace)
            if inverse is not None:
                product.mul_(inverse)
            if d_states is not None and inputs.adapter_a is not None:
                unrounded = workspace("adapter_product", *shape, dtype=d_states.dtype)
                product.add_(torch.mm(d_states, inputs.adapter_a, out=unrounded))
            self.d_hidden.index_copy_(0, rows.row_idx, product[: len(rows.row_idx)])
        if self.d_adapter_a is not None and d_states is not None:
            hidden = workspace.cast("unrounded_states", rows.hidden, d_states.dtype)
            torch.addmm(self.d_adapter_a, d_states.t(), hidden, out=self.d_adapter_a)

    def _add_to_head(self, rows: Collected, scale: Tensor | None) -> None:
        """Add to d_weight, d_bias and d_adapter_b: products of d_logits.T."""
        workspace, d_logits = self._workspace, rows.d_logits
        share = None if scale is None else self._to_common_scale(scale)
        if self.d_weight is not None:
            hidden = self._operand("states", rows.hidden, share)
            add_weight_gradient(self.d_weight, d_logits, hidden, workspace, first=self._first)
        if self.d_bias is not None and share is None:
            self.d_bias.add_(d_logits.sum(0, dtype=self.d_bias.dtype))
        elif self.d_bias is not None and share is not None:
            column = self.d_bias.unsqueeze(-1)
            add_weight_gradient(column, d_logits, share, workspace, first=self._first)
        if self.d_adapter_b is not None and rows.adapter_states is not None:
            states = rows.adapter_states
            if self._states_scale is not None:
                scaled = workspace("scaled adapter states", *states.shape, dtype=states.dtype)
                states = torch.mul(states, self._states_scale, out=scaled)
            states = self._operand("adapter_states", states, share)
            add_weight_gradient(self.d_adapter_b, d_logits, states, workspace, first=self._first)

    def _to_common_scale(self, row_scale: Tensor) -> Tensor:
        """Take the smallest scale so far for the sums; return its share in each row's [m, 1]."""
        old, scale = self._scale, row_scale.amin()
        if old is not None:
            scale = torch.minimum(old, scale)
            for total in (self.d_weight, self.d_bias, self.d_adapter_b):
                if total is not None:  # most chunks do not change the scale: nothing is touched
                    rows = total[(None,) * (3 - total.dim())]
                    backend_for(rows).scale_(rows, scale / old)
        self._scale = scale
        return (scale / row_scale).unsqueeze(-1).to(self._inputs.matmul_dtype)

    def _operand(self, name: str, states: Tensor, share: Tensor | None) -> Tensor:
        """Return states [m, k] as an operand beside d_logits.T, with the share of each row."""
        dtype = self._inputs.matmul_dtype
        if share is not None:
            operand = self._workspace(f"shares of {name}", *states.shape, dtype=dtype)
            return operand.copy_(states).mul_(share)
        # A GPU multiplies two tensors of one dtype.
        return self._workspace.cast(name, states, dtype) if states.is_cuda else states

    def finish(self) -> HeadTensors:
        """Return the gradients; that of weight is unrounded if other parts add to it."""
        d_weight, d_adapter_b = self.d_weight, self.d_adapter_b
        if self._scale is not None:
            for total in (d_weight, self.d_bias, d_adapter_b):
                if total is not None:
                    total.div_(self._scale)
        if d_adapter_b is not None and self._states_scale is not None:
            d_adapter_b.div_(self._states_scale)
        if d_weight is not None:
            d_weight = (d_weight.zero_() if self._first else d_weight).to(self._weight_dtype)
        if d_adapter_b is not None and self._first:
            d_adapter_b.zero_()
        return HeadTensors(self.d_hidden, d_weight, self.d_bias, self.d_adapter_a, d_adapter_b)


def sum_parts(inputs: LMHeadInputs, parts: list[tuple[HeadTensors, Tensor | None]]) -> HeadTensors:
    """Sum the gradients of parts of the tokens; those of the whole head have its shape.

    Those of hidden and adapter_a are summed over the ranks of a vocab_group in fp32, by one
    collective each.

    Args:
        parts: (gradients, the rows of the head that they are of; None: all). Their d_hidden is the
            same tensor, in which each part wrote rows of its own.
    """
    total = HeadTensors(None, None, None, None, None)._asdict()
    for grads, vocab_ids in parts:
        for name, grad in grads._asdict().items():
            whole = total[name]
            if grad is None or grad is whole:
                continue
            if vocab_ids is None or name in ("hidden", "adapter_a"):
                total[name] = grad if whole is None else whole.add_(grad)
            else:
                if whole is None:
                    whole = grad.new_zeros((len(inputs.weight), *grad.shape[1:]))
                total[name] = whole.index_add_(0, vocab_ids, grad)
    sums = HeadTensors(**total)
    if sums.weight is not None:
        sums = sums._replace(weight=sums.weight.to(inputs.grad_dtype))
    if inputs.vocab_group is None:
        return sums
    d_hidden, d_adapter_a = sums.hidden, sums.adapter_a
    if d_hidden is not None:
        in_fp32 = d_hidden.to(inputs.temperature.dtype)
        d_hidden.copy_(all_reduce_sum(in_fp32, inputs.vocab_group))
    if d_adapter_a is not None:
        d_adapter_a = all_reduce_sum(d_adapter_a, inputs.vocab_group)
    return sums._replace(adapter_a=d_adapter_a)
