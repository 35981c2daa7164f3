"""The tensors of a case, the same for every implementation.

B sequences of T tokens, N = B·T; V vocabulary, H hidden size, r rank of an adapter.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

import grpo_kernels
from benchmarks.core.shapes import Shape
from grpo_kernels import TokenSupport

SEQUENCES = 16
STD = 4.0  # of the logits, as in a language model
# Sizes of the log-ratio of policy and old policy. None lies within 0.08 of a clip boundary (-0.223
# and 0.182), so that rounding cannot change which tokens are clipped.
INSIDE, OUTSIDE = 0.1, 0.5
JSD_WEIGHT = 0.3  # of the teacher; not 0.5, so that a peer which takes it for the student's fails
Variant = Literal["plain", "reference", "frozen", "adapter", "tree", "support"]
KEPT = 20  # ids that are drawn for the support of a token; duplicates are dropped
RANK, ADAPTER_SCALE = 16, 2.0
# Tensors that may be trained.
LEAVES = ("logits", "hidden", "weight", "adapter_a", "adapter_b")


@dataclass(frozen=True)
class Problem:
    """Inputs at the level of logits or of hidden states; one of `logits` and `hidden` is None."""

    tokens: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]; None: every token counts
    advantages: Tensor  # [B]
    old_logprob: Tensor | None = None  # [B, T]
    logits: Tensor | None = None  # [B, T, V]
    ref_logits: Tensor | None = None
    hidden: Tensor | None = None  # [B, T, H]; of a tree [rows, H]
    weight: Tensor | None = None  # [V, H]
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    adapter_a: Tensor | None = None  # [r, H]; logits += ADAPTER_SCALE · (hidden aᵀ) bᵀ
    adapter_b: Tensor | None = None  # [V, r]
    token_rows: Tensor | None = None  # [B, T], of a tree: the row of hidden of each token
    support_ids: Tensor | None = None  # both of a TokenSupport
    support_offsets: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Tensors that get a gradient, by name."""
        tensors = {name: getattr(self, name) for name in LEAVES}
        return {name: x for name, x in tensors.items() if x is not None and x.requires_grad}

    @property
    def support(self) -> TokenSupport | None:
        """The ids that each token was drawn among."""
        if self.support_ids is None:
            return None
        return TokenSupport(self.support_ids, self.support_offsets)

    @property
    def head_rows(self) -> int:
        """Number of rows of the head that any unmasked token needs."""
        if self.support is None:
            return self.weight.shape[0]
        tokens = torch.arange(self.N, device=self.tokens.device).view(self.tokens.shape)
        unmasked = tokens if self.mask is None else tokens[self.mask]
        return len(self.support.select(unmasked).token_ids.unique())

    @property
    def N(self) -> int:
        return self.tokens.numel()

    @property
    def num_active(self) -> int:
        """Number of rows, of hidden states or logits, with an unmasked token."""
        return self._count_rows(torch.ones_like(self.tokens, dtype=torch.bool))

    @property
    def num_with_gradient(self) -> int:
        """Number of rows with an unmasked token whose advantage is not 0."""
        return self._count_rows((self.advantages != 0).unsqueeze(-1).expand(self.tokens.shape))

    def _count_rows(self, selected: Tensor) -> int:
        selected = selected if self.mask is None else selected & self.mask
        if self.token_rows is None:
            return int(selected.sum())
        return len(self.token_rows[selected].unique())

    def with_copied_rows(self) -> "Problem":
        """Return a tree's sequences apart from each other: hidden [B, T, H]."""
        if self.token_rows is None:
            return self
        rows = self.hidden.index_select(0, self.token_rows.flatten())
        return replace(self, hidden=rows.view(*self.tokens.shape, -1), token_rows=None)

    def double(self) -> "Problem":
        """Return the same numbers in fp64."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, x in tensors.items():
            if x is not None and x.is_floating_point():
                tensors[name] = _leaf(x.double()) if name in self.leaves else x.double()
        return Problem(**tensors)

    def copy(self) -> "Problem":
        """Return the same numbers in other memory; a weight is larger than a cache and shared."""
        copied = {name: _leaf(x.clone()) for name, x in self.leaves.items() if name != "weight"}
        return replace(self, **copied)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def make_problem(
    level: str, shape: Shape, device: torch.device, variant: Variant = "plain"
) -> Problem:
    """Make random tensors.

    Args:
        level: "logits" or "hidden".
        variant: "plain": hidden states and head, or logits, are trained; "reference": and there
            are the tensors of a reference policy; "frozen": the head is frozen; "adapter": and has
            a trained adapter; "tree": sequences in pairs share their rows of hidden states;
            "support": each token was drawn among about KEPT ids, small ids more often, as in a
            vocabulary sorted by frequency.
    """
    generator = torch.Generator(device).manual_seed(0)
    V, H, B = shape.head.V, shape.head.H, min(SEQUENCES, shape.N)
    T = shape.N // B

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = shape.torch_dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(std)

    tokens = torch.randint(0, V, (B, T), generator=generator, device=device)
    tensors: dict[str, Tensor] = {}
    if variant == "support":
        draws = torch.rand(B * T, KEPT, generator=generator, device=device)
        ids = V**draws  # of a density that falls as 1 / id
        ids = ids.to(torch.int64).clamp_max(V - 1).sort().values
        is_new = torch.ones_like(ids, dtype=torch.bool)
        is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        tensors["support_ids"] = ids[is_new]
        ends = is_new.sum(-1).cumsum(0)
        tensors["support_offsets"] = torch.nn.functional.pad(ends, (1, 0))
        place = torch.randint(0, KEPT, (B * T, 1), generator=generator, device=device)
        tokens = ids.gather(-1, place).view(B, T)
    mask = None
    if shape.masked:
        unmasked = round(T * (1 - shape.masked))
        mask = (torch.arange(T, device=device) < unmasked).expand(B, T).contiguous()
    advantages = normal(B, dtype=torch.float32)
    advantages[: round(B * shape.inert)] = 0.0
    if level == "logits":
        tensors["logits"] = _leaf(normal(B, T, V, std=STD))
        if variant == "reference":
            tensors["ref_logits"] = normal(B, T, V, std=STD)
    elif variant == "tree":
        rows = torch.arange(-(-B // 2) * T, device=device).view(-1, T)
        tensors["token_rows"] = rows.repeat_interleave(2, 0)[:B]
        tensors["hidden"] = _leaf(normal(rows.numel(), H))
    else:
        tensors["hidden"] = _leaf(normal(B, T, H))
    if level == "hidden":
        weight = normal(V, H, std=STD / H**0.5)
        tensors["weight"] = weight if variant in ("frozen", "adapter") else _leaf(weight)
        if variant == "reference":
            tensors["ref_hidden"] = tensors["hidden"].detach() + 0.1 * normal(B, T, H)
            tensors["ref_weight"] = weight.detach()
        elif variant == "adapter":
            tensors["adapter_a"] = _leaf(normal(RANK, H, std=H**-0.5))
            tensors["adapter_b"] = _leaf(normal(V, RANK, std=0.5 * RANK**-0.5))
    problem = Problem(tokens, mask, advantages, **tensors)

    with torch.no_grad():
        if level == "logits":
            stats = grpo_kernels.token_stats(problem.logits, tokens, entropy=False)
        else:
            hidden = problem.with_copied_rows().hidden
            stats = grpo_kernels.linear_token_stats(
                hidden, problem.weight, tokens, entropy=False, support=problem.support
            )
    # One token in eight is far outside the clip range.
    uniform = torch.empty_like(stats.logprob).uniform_(-1, 1, generator=generator)
    outside = torch.empty_like(uniform).uniform_(generator=generator) < 1 / 8
    log_ratio = torch.where(outside, OUTSIDE * uniform.sign(), INSIDE * uniform)
    return replace(problem, old_logprob=stats.logprob - log_ratio)
