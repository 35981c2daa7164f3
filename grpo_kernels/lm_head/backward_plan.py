"""Choice of the tensors that the forward of `linear_token_stats` saves for its backward.

    nothing         backward makes the logits again: 4 products with a trained head
    logits          all tokens fit one chunk, so the logits are kept: 3 products, 2 with a frozen
                    head; no more memory than the workspace
    hidden_grads    a frozen head in several chunks: 2 products and [N, H] numbers

With a frozen head the gradient of a statistic in the hidden states, such as (1_token - p) W of the
log-prob, does not depend on the upstream gradient. Forward computes it while the logits of a chunk
exist, and backward multiplies it by the upstream gradient.
"""

from typing import NamedTuple

from torch import Tensor

from ..workspace import new_rows
from .chunk_loop import memory_of
from .chunk_size import bytes_per_token, workspace_bytes
from .inputs import LMHeadInputs


class Trained(NamedTuple):
    """Which inputs will get a gradient; all False where none is wanted.

    entropy: whether the entropy will have an upstream gradient, so that forward prepares for it.
    """

    hidden: bool
    weight: bool
    bias: bool
    adapter_a: bool = False
    adapter_b: bool = False
    entropy: bool = False

    @property
    def head(self) -> bool:
        """True if anything but the hidden states gets a gradient."""
        return self.weight or self.bias or self.adapter_a or self.adapter_b


class BackwardPlan(NamedTuple):
    """Tensors that forward saves beside the statistics; at most one of the two kinds."""

    logits: tuple[int, int] | None  # their shape [rows, V]
    statistics: tuple[str, ...]  # names; the gradient of each in the hidden states [N, H] is saved

    def allocate(self, inputs: LMHeadInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Make (logits, ref_logits, hidden_grads); empty where the plan has none."""
        like, none = inputs.temperature, (0, 0)
        shape = (len(self.statistics), *inputs.hidden.shape) if self.statistics else (0,)
        return (
            new_rows(like, *(self.logits or none)),
            new_rows(like, *(none if inputs.kl is None else self.logits or none)),
            like.new_empty(shape, dtype=inputs.grad_dtype),
        )


def plan_backward(inputs: LMHeadInputs, chunk_tokens: int | None, trained: Trained) -> BackwardPlan:
    """Choose from sizes alone, which are known without the values of any tensor."""
    (N, H), V = inputs.hidden.shape, inputs.weight.shape[0]
    is_frozen = not trained.head
    if is_frozen and not trained.hidden:
        return BackwardPlan(None, ())
    if inputs.support_ids is not None and chunk_tokens is None:
        return BackwardPlan(None, ())  # products with a few rows of the head: support.py
    rows = N if chunk_tokens is None else chunk_tokens
    token_bytes = bytes_per_token(
        V, H, inputs.matmul_dtype, kl=inputs.kl is not None, gradient=True, overwrite=False
    )
    fits = N <= rows and rows * token_bytes <= workspace_bytes(memory_of(inputs.hidden.device))
    # With a fixed chunk size the bits of a frozen head's gradient may not depend on how many tokens
    # there are. With shards of the vocabulary the chunks of all ranks decide, not this rank's.
    if fits and inputs.vocab_group is None and not (is_frozen and chunk_tokens is not None):
        return BackwardPlan((rows, V), ())
    # With several tokens to a row, d logprob / d hidden would be of the tokens, not of the rows.
    if not is_frozen or inputs.token_rows is not None:
        return BackwardPlan(None, ())
    is_left = {"logprob": True, "entropy": trained.entropy, "kl": inputs.kl is not None}
    return BackwardPlan(None, tuple(name for name, left in is_left.items() if left))
