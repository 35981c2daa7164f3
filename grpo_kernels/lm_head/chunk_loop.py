"""The LM head in chunks of tokens: logits, statistics, gradients.

    for chunk in head.chunks(token_idx):                    logits, unrounded: matmul.py
        stats, logit_grad = chunk.loss_and_grad(...)        row functions of a backend
        grad.add(chunk, logit_grad)                           d_hidden, d_weight: head_gradient.py

One chunk of logits exists at a time: the next chunk overwrites the workspace. Their gradients may
be collected for several chunks, so that the products that read them are few: chunk_size.py.
`token_idx` lists the tokens that count, so that the others are in no product.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import RowInputs, RowStats, backend_for
from ..backends.listed_entries import capped, take_listed, write_listed_gradient
from ..objective.config import LossConfig
from ..objective.ratios import LossInputs
from ..objective.token_gradients import TokenGrads, token_gradients
from ..objective.top_k_divergence import Rest, TopKDivergence, top_k_divergence
from ..workspace import Workspace, new_rows
from .chunk_size import MEMORY_SHARE, WORKSPACE, plan_chunks
from .device_rates import device_rates
from .inputs import HeadTensors, LMHeadInputs
from .matmul import write_logits
from .roofline import ChunkSizes
from .row_groups import NO_TOKEN, RowGroups, TokenLogits
from .row_scale import gradient_bound, power_of_two_scale
from .support import exclude_others
from .vocab_parallel import TopLogits, all_gather, all_reduce_min, merge_over_ranks


class LogitGrad(NamedTuple):
    """The gradient of a chunk's logits is in `Chunk.d_logits`, each row times its scale."""

    scale: Tensor | None  # [m], powers of two that keep fp16 in range: row_scale.py


class Collected(NamedTuple):
    """The rows of a weight chunk, whose logit gradients are complete."""

    row_idx: Tensor  # [n], rows of the hidden states
    hidden: Tensor  # [m, H]: operands of the products; m = n, or the fixed size of a padded chunk
    adapter_states: Tensor | None  # [m, r]: scale · hidden aᵀ of an adapter
    d_logits: Tensor  # [m, V], 0 past n


class Chunk(NamedTuple):
    """Tokens whose logits are in the workspace, until the next chunk."""

    inputs: LMHeadInputs
    groups: RowGroups  # n rows of hidden states and their t tokens, mostly the same
    rows: RowInputs  # [1, n, V]
    d_logits: Tensor | None  # [m, V], 0 past n; may be the memory of the logits
    collected: Collected | None  # of the chunks of a weight chunk, in the last of them

    @property
    def token_idx(self) -> Tensor:
        """Indices of the tokens, [t] int64."""
        return self.groups.token_idx

    def stats(self) -> RowStats:
        """Compute the statistics of the tokens, [t] each."""
        inputs, request = self.inputs, self.inputs.request
        group, position = inputs.vocab_group, self.groups.position
        # Where the row functions do not know the tokens, they are compared with the largest id.
        finds_top1 = request.is_top1 and (group is not None or position is not None)
        K = max(request.top_logprobs, 1) if finds_top1 else request.top_logprobs
        row_request = request._replace(
            is_top1=request.is_top1 and not finds_top1, top_logprobs=min(K, len(inputs.weight))
        )
        stats = backend_for(self.rows.logits).token_stats_forward(self.rows, row_request)
        stats = stats.map(lambda x: x.squeeze(0))
        columns = stats.top_ids
        if columns is not None:
            stats = stats._replace(top_ids=inputs.ids_of_columns(columns))
        if group:
            top = None
            if columns is not None and stats.top_ids is not None:
                top = TopLogits.read(self.rows.logits.squeeze(0), columns, stats.top_ids, K)
            tokens, temperature = self.rows.tokens.squeeze(0), self.rows.temperature.squeeze(0)
            stats = merge_over_ranks(
                group, stats, tokens, temperature, inputs.kl, top, inputs.softcap
            )
        if position is not None:
            stats = stats.map(lambda x: x[position])
            logprob = self._token_logits().logprob(stats.row_lse)
            logprob = all_gather(logprob, group).amax(0) if group else logprob
            stats = stats._replace(logprob=logprob)
        if finds_top1:
            assert stats.top_ids is not None and stats.logprob is not None
            tokens = inputs.tokens if inputs.vocab_tokens is None else inputs.vocab_tokens
            is_largest = stats.top_ids[..., 0] == tokens[self.token_idx]
            stats = stats._replace(is_top1=is_largest & (stats.logprob > -torch.inf))
            if request.top_logprobs == 0:
                stats = stats._replace(top_logprobs=None, top_ids=None)
        if stats.top_logprobs is not None and stats.top_ids is not None:
            # The rows of the head that supports have may be fewer than K.
            missing = (0, request.top_logprobs - stats.top_ids.shape[-1])
            stats = stats._replace(
                top_logprobs=torch.nn.functional.pad(stats.top_logprobs, missing, value=-torch.inf),
                top_ids=torch.nn.functional.pad(stats.top_ids, missing).clamp_min(0),
            )
        return stats

    def grad(self, stats: RowStats, grads: TokenGrads) -> LogitGrad:
        """Compute the gradient from the upstream gradients of the statistics, [t] each."""
        assert self.d_logits is not None
        groups = self.groups
        d_rows = self.d_logits[: len(groups)]
        grads, scale = self._scale_to_range(stats, grads)
        row_stats, row_grads, at_tokens = stats, grads, None
        if groups.first is not None:
            row_stats = stats.map(lambda x, first=groups.first: x[first])
            row_grads = TokenGrads(*(x if x is None else groups.sum_by_row(x) for x in grads))
            if grads.logprob is not None:  # before the gradient overwrites the logits
                at_tokens = self._grad_at_tokens(row_stats, row_grads, grads.logprob)
        self._write_row_gradient(self.rows, row_stats, row_grads, d_rows)
        if at_tokens is not None:
            indices, values = at_tokens
            d_rows.index_put_(indices, values.to(d_rows.dtype))
        return LogitGrad(scale)

    def _scale_to_range(
        self, stats: RowStats, grads: TokenGrads
    ) -> tuple[TokenGrads, Tensor | None]:
        """Multiply the upstream gradients by `LogitGrad.scale`, where the gradient is fp16."""
        assert self.d_logits is not None
        if self.d_logits.dtype != torch.float16:
            return grads, None
        groups, temperature = self.groups, self.inputs.temperature[self.token_idx]
        row_scale = power_of_two_scale(groups.sum_by_row(gradient_bound(stats, grads, temperature)))
        token_scale = row_scale if groups.position is None else row_scale[groups.position]
        grads = TokenGrads(*(x if x is None else x * token_scale for x in grads))
        scale = row_scale.new_full((len(self.d_logits),), torch.inf)  # padding has no share
        scale[: len(row_scale)] = row_scale
        return grads, scale

    def jsd(self, stats: RowStats, jsd_weight: float) -> tuple[Tensor, Tensor]:
        """Compute (jsd, KL(p‖m)) of the rows, [n] each; the tokens have a row each.

        stats: with the row_lse of both models.
        """
        of_rows = stats.map(lambda x: x.unsqueeze(0))
        parts = backend_for(self.rows.logits).jsd_forward(self.rows, of_rows, jsd_weight)
        parts, group = torch.cat(parts), self.inputs.vocab_group
        jsd, kl_policy = all_gather(parts, group).sum(0) if group else parts
        return jsd, kl_policy

    def jsd_grad(
        self, stats: RowStats, kl_policy: Tensor, d_jsd: Tensor, jsd_weight: float
    ) -> LogitGrad:
        """Compute the gradient from that of the divergence, [n].

        It is bounded as that of a KL of the size of KL(p‖m), since -π ln π < 1.
        """
        assert self.d_logits is not None
        bounding = stats._replace(kl=kl_policy)
        grads, scale = self._scale_to_range(bounding, TokenGrads(None, None, d_jsd))
        assert grads.kl is not None
        backend_for(self.rows.logits).jsd_backward(
            self.rows,
            stats.map(lambda x: x.unsqueeze(0)),
            kl_policy.unsqueeze(0),
            grads.kl.contiguous().unsqueeze(0),
            jsd_weight,
            self.d_logits[: len(self.groups)].unsqueeze(0),
        )
        return LogitGrad(scale)

    def top_k_divergence(
        self, columns: Tensor, logq: Tensor, divergence: str, jsd_weight: float
    ) -> "ChunkTopK":
        """Compute the divergence from a teacher's K most likely tokens and the rest.

        It sets the listed logits to -inf.

        Args:
            columns: [n, K], of the logits; negative: none.
            logq: [n, K + 1], `teacher_outcomes`.
        """
        inputs, temperature = self.inputs, self.rows.temperature.squeeze(0)
        listed, stats, is_empty = take_listed(self.rows, columns.unsqueeze(0))
        everywhere, group = listed, inputs.vocab_group
        if group:
            on_no_rank = torch.full_like(self.token_idx, NO_TOKEN)
            stats = merge_over_ranks(group, stats, on_no_rank, temperature, None)
            has_others = (~is_empty).to(listed.dtype).unsqueeze(-1)
            parts = all_gather(torch.cat((listed, has_others), dim=-1), group).amax(0)
            everywhere, is_empty = parts[:, :-1], parts[:, -1] == 0
        pivot, log_sum = stats.row_lse.unbind(-1)
        rest = Rest(pivot, log_sum, stats.entropy, is_empty)
        result = top_k_divergence(
            capped(everywhere, inputs.softcap), rest, temperature, logq, divergence, jsd_weight
        )
        return ChunkTopK(result, columns, listed, rest)

    def top_k_grad(self, top_k: "ChunkTopK", d_divergence: Tensor) -> LogitGrad:
        """Compute the gradient from that of the divergence, [n]."""
        assert self.d_logits is not None
        result, columns, listed, rest = top_k
        stats = RowStats(None, None, result.kl, rest.log_sum)
        grads, scale = self._scale_to_range(stats, TokenGrads(None, None, d_divergence))
        assert grads.kl is not None
        upstream = grads.kl.unsqueeze(-1)
        dx = torch.where(upstream == 0, 0.0, result.gradient * upstream)
        d_rows = self.d_logits[: len(self.groups)].unsqueeze(0)
        write_listed_gradient(self.rows, listed, columns.unsqueeze(0), rest, dx, d_rows)
        return LogitGrad(scale)

    def policy(self) -> "Chunk":
        """View the logits of the policy alone."""
        rows = self.rows._replace(ref_logits=None, kl=None)
        return self._replace(inputs=self.inputs._replace(kl=None), rows=rows)

    def reference(self) -> "Chunk":
        """View the logits of the reference policy as those of a chunk, without a gradient."""
        rows = self.rows._replace(logits=self.rows.ref_logits)
        return self._replace(rows=rows, d_logits=None).policy()

    def _grad_at_tokens(
        self, stats: RowStats, grads: TokenGrads, d_logprob: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Compute the gradient of the logits that are tokens, unrounded: (their indices, values).

        It is g (1 - p) for a p near 1, of which nothing would be left if g p were rounded first.

        Args:
            stats, grads: of the rows, [n] each.
            d_logprob: of the tokens, [t].
        """
        rows, token_logits = self.rows, self._token_logits()
        indices, one_hot = token_logits.sum_one_hots(d_logprob, rows.logits.shape[-1])
        position, entry = indices

        def entries(logits: Tensor) -> Tensor:
            return logits[0, position, entry, None].unsqueeze(0)

        # Rows of one entry, but with the statistics of their whole rows.
        rows = rows._replace(
            logits=entries(rows.logits),
            tokens=rows.tokens[:, position],
            temperature=rows.temperature[:, position],
            ref_logits=None if rows.ref_logits is None else entries(rows.ref_logits),
        )
        values = one_hot.new_empty((len(position), 1))
        grads = TokenGrads(*(x if x is None else x[position] for x in grads))
        self._write_row_gradient(rows, stats.map(lambda x: x[position]), grads, values)
        return indices, values.squeeze(-1).add_(one_hot)

    @staticmethod
    def _write_row_gradient(
        rows: RowInputs, stats: RowStats, grads: TokenGrads, d_logits: Tensor
    ) -> None:
        """Write the gradient of rows [1, n, V] to d_logits [n, V]; stats and grads: [n] each."""
        backend_for(rows.logits).token_stats_backward(
            rows,
            stats.map(lambda x: x.unsqueeze(0)),
            TokenGrads(*(x if x is None else x.contiguous().unsqueeze(0) for x in grads)),
            d_logits.unsqueeze(0),
        )

    def _token_logits(self) -> TokenLogits:
        assert self.groups.position is not None
        return TokenLogits.read(
            self.rows.logits.squeeze(0),
            self.groups.position,
            self.inputs.tokens[self.token_idx],
            self.inputs.temperature[self.token_idx],
            self.inputs.softcap,
        )

    def loss_and_grad(
        self, loss_inputs: LossInputs, config: LossConfig
    ) -> tuple[tuple[Tensor | None, ...], LogitGrad]:
        """Compute (log-prob, entropy, KL) and the gradient of a token-level loss.

        One launch does both. A KL over the vocabulary, a vocabulary in shards, rows with several
        tokens, and fp16, whose scale is found between the two, take two.
        """
        assert self.d_logits is not None
        takes_two = self.inputs.kl is not None or self.inputs.vocab_group is not None
        takes_two |= self.groups.position is not None or self.d_logits.dtype == torch.float16
        if takes_two:
            stats = self.stats()
            assert stats.logprob is not None
            return stats[:3], self.grad(stats, token_gradients(stats.logprob, loss_inputs, config))
        logprob, entropy = backend_for(self.rows.logits).grpo_loss(
            self.rows,
            loss_inputs.map(lambda x: x.unsqueeze(0)),
            config,
            self.d_logits[: len(self.groups)].unsqueeze(0),
        )
        return (logprob.squeeze(0), entropy.squeeze(0), None), LogitGrad(None)


class ChunkTopK(NamedTuple):
    """Results of `Chunk.top_k_divergence`, from which `Chunk.top_k_grad` makes a gradient."""

    result: TopKDivergence
    columns: Tensor  # [n, K]
    listed: Tensor  # [n, K], the logits in these columns; with a vocab_group, of this rank's
    rest: Rest


class Logits(NamedTuple):
    """Logits of tokens, the policy's and, with a KL, those of the reference policy."""

    policy: Tensor  # [n, V], in the accumulation dtype
    reference: Tensor | None

    def select(self, positions: Tensor) -> "Logits":
        """Copy these rows."""

        def copy(logits: Tensor) -> Tensor:
            rows = new_rows(logits, len(positions), logits.shape[1])
            return torch.index_select(logits, 0, positions, out=rows)

        reference = None if self.reference is None else copy(self.reference)
        return Logits(copy(self.policy), reference)


NOTHING = (False,) * len(HeadTensors._fields)


class ChunkedLMHead:
    """An LM head that makes the logits of one chunk of tokens at a time, in one workspace.

    Args:
        num_rows: how many rows of hidden states will be worked on; the planner divides them into
            chunks.
        chunk_tokens: overrides the planner. Every product then has exactly this many rows, the
            last chunk being padded with zeros: the bits of a row may depend on the shape of its
            product, and so never depend on the number of tokens.
        wanted: which of `LMHeadInputs.leaves` will get a gradient; none: only statistics.
        overwrite: whether the gradient of the logits may overwrite them.
        logits: memory for the logits of all rows, which are then one chunk, instead of the
            workspace.
        is_made: `logits` has the logits already; they are not overwritten.
    """

    def __init__(
        self,
        inputs: LMHeadInputs,
        num_rows: int,
        chunk_tokens: int | None,
        *,
        wanted: Sequence[bool] = NOTHING,
        overwrite: bool = True,
        logits: Logits | None = None,
        is_made: bool = False,
    ) -> None:
        (V, H), device = inputs.weight.shape, inputs.weight.device
        self.pad_last_chunk = chunk_tokens is not None
        if chunk_tokens is not None:
            self.sizes = ChunkSizes(chunk_tokens, chunk_tokens)
        elif logits is not None:
            self.sizes = ChunkSizes(max(1, num_rows), max(1, num_rows))
        else:
            self.sizes = plan_chunks(
                num_rows, V, H, inputs.matmul_dtype, memory_of(device), device_rates(device),
                kl=bool(inputs.kl), gradient=any(wanted), weight_grad=wanted[1],
                overwrite=overwrite,
            )  # fmt: skip
            if inputs.vocab_group:  # each chunk is a collective of all ranks
                size = all_reduce_min(self.sizes.logit_chunk, inputs.vocab_group, device)
                self.sizes = self.sizes.with_logit_chunk(size)
        inputs = inputs._replace(weight=inputs.weight.to(inputs.matmul_dtype))
        if inputs.ref_weight is not None:
            inputs = inputs._replace(ref_weight=inputs.ref_weight.to(inputs.ref_matmul_dtype))
        if inputs.adapter_a is not None and inputs.adapter_b is not None:
            dtype = inputs.temperature.dtype
            inputs = inputs._replace(
                adapter_a=inputs.adapter_a.to(dtype), adapter_b=inputs.adapter_b.to(dtype)
            )
        self.inputs = inputs
        self.workspace = Workspace(device)
        self._grad, self._logits, self._is_made = any(wanted), logits, is_made
        is_collected = self.sizes.weight_chunk > self.sizes.logit_chunk
        self._overwrite = (
            overwrite
            and not is_made
            and not is_collected
            and inputs.matmul_dtype == inputs.temperature.dtype
        )

    def chunks(self, groups: RowGroups) -> Iterator[Chunk]:
        """Make the logits of the rows, chunk by chunk; none for no rows."""
        if len(groups) == 0:
            return
        support_sizes = iter(self._support_sizes(groups))
        for collected in groups.split(self.sizes.weight_chunk):
            yield from self._weight_chunk(collected, support_sizes)

    def _weight_chunk(
        self, groups: RowGroups, support_sizes: Iterator[Tensor | None]
    ) -> Iterator[Chunk]:
        """Make the logits of a weight chunk, chunk by chunk."""
        inputs, workspace = self.inputs, self.workspace
        (V, H), dtype = inputs.weight.shape, inputs.temperature.dtype
        size = self.sizes.logit_chunk
        num_rows = size if self.pad_last_chunk else len(groups)
        # The operands and the gradients of all its rows.
        hidden = workspace("states", num_rows, H, dtype=inputs.matmul_dtype)
        adapter_states = d_logits = None
        if inputs.adapter_a is not None:
            shape = num_rows, len(inputs.adapter_a)
            adapter_states = workspace("adapter_states", *shape, dtype=dtype)
        if self._grad and not self._overwrite:
            d_logits = workspace.rows("d_logits", num_rows, V, inputs.matmul_dtype)
        start = 0
        for chunk_groups in groups.split(size):
            row_idx, n = chunk_groups.row_idx, len(chunk_groups)
            m = size if self.pad_last_chunk else n
            place = slice(start, start + m)
            start += m
            self._gather(inputs.hidden, row_idx, hidden[place])
            policy, reference = self._logits or (workspace.rows("logits", m, V, dtype), None)
            if not self._is_made:
                write_logits(policy[:m], hidden[place], inputs.weight, inputs.bias, workspace)
            if adapter_states is not None and inputs.adapter_b is not None:
                self._adapt(hidden[place], adapter_states[place])
                if not self._is_made:
                    part = policy[:m]
                    torch.addmm(part, adapter_states[place], inputs.adapter_b.t(), out=part)
            if inputs.kl is None:
                reference = None
            else:
                if reference is None:
                    reference = workspace.rows("ref_logits", m, V, dtype)
                if not self._is_made:
                    self._write_ref_logits(reference[:m], row_idx)
                reference = reference[:n].unsqueeze(0)
            first = chunk_groups.first_tokens
            tokens, temperature = inputs.tokens[first], inputs.temperature[first]
            if chunk_groups.position is not None:
                tokens = torch.full_like(tokens, NO_TOKEN)
            sizes = next(support_sizes)
            if sizes is not None and not self._is_made:
                exclude_others(policy[:n], inputs, first, sizes)
                if reference is not None:
                    exclude_others(reference.squeeze(0), inputs, first, sizes)
            rows = RowInputs(
                policy[:n].unsqueeze(0),
                tokens.unsqueeze(0),
                temperature.unsqueeze(0),
                None,
                reference,
                inputs.softcap,
                inputs.kl,
            )
            if not self._grad:
                yield Chunk(inputs, chunk_groups, rows, None, None)
                continue
            gradients = policy[:num_rows] if d_logits is None else d_logits
            gradients[place][n:].zero_()
            collected = None
            if start == num_rows:
                collected = Collected(groups.row_idx, hidden, adapter_states, gradients)
            yield Chunk(inputs, chunk_groups, rows, gradients[place], collected)

    def _support_sizes(self, groups: RowGroups) -> Iterable[Tensor | None]:
        """Return the sizes of the supports of each chunk's rows, on the CPU."""
        sizes = self.inputs.support_sizes
        if sizes is None:
            return repeat(None)
        by_row = sizes[groups.first_tokens.cpu()]
        return by_row.split(self.sizes.logit_chunk)  # waits for a GPU once

    def _adapt(self, hidden: Tensor, states: Tensor) -> None:
        """Compute states [m, r] = scale · hidden [m, H] @ adapter_a [r, H].T, in their dtype."""
        inputs = self.inputs
        assert inputs.adapter_a is not None
        hidden = self.workspace.cast("unrounded_states", hidden, states.dtype)
        torch.mm(hidden, inputs.adapter_a.t(), out=states).mul_(inputs.adapter_scale)

    def _write_ref_logits(self, logits: Tensor, row_idx: Tensor) -> None:
        """Compute the reference policy's logits [m, V] of a chunk."""
        inputs = self.inputs
        assert inputs.ref_hidden is not None and inputs.ref_weight is not None
        shape, dtype = (len(logits), inputs.ref_weight.shape[1]), inputs.ref_matmul_dtype
        hidden = self.workspace("ref_states", *shape, dtype=dtype)
        self._gather(inputs.ref_hidden, row_idx, hidden)
        write_logits(logits, hidden, inputs.ref_weight, inputs.ref_bias, self.workspace)

    def _gather(self, states: Tensor, row_idx: Tensor, operands: Tensor) -> None:
        """Copy the states [N, H] of a chunk to operands [m, H] of a product, padded with zeros."""
        n, rows = len(row_idx), operands
        if states.dtype != operands.dtype:
            rows = self.workspace("gathered states", n, states.shape[1], dtype=states.dtype)
        torch.index_select(states, 0, row_idx, out=rows[:n])
        if rows is not operands:
            operands[:n].copy_(rows)
        operands[n:].zero_()


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; a workspace's worth where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MEMORY_SHARE * WORKSPACE
