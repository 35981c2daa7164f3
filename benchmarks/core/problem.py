"""The tensors of a case: what every implementation is given.

B sequences of T tokens, N = B·T; V vocabulary, H hidden size.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import grpo_kernels
from benchmarks.core.shapes import Shape

SEQUENCES = 16
STD = 4.0  # of the logits: a language model's
# Log-ratios of policy and old policy. None lies within 0.08 of a clip boundary (-0.223 and 0.182):
# which tokens are clipped is a question of the inputs, never of an implementation's rounding.
INSIDE, OUTSIDE = 0.1, 0.5


@dataclass(frozen=True)
class Problem:
    """One of `logits` and `hidden` is there, by level; the tensors with gradients are leaves."""

    tokens: Tensor  # [B, T]
    mask: Tensor | None  # [B, T], None: every token counts
    advantages: Tensor  # [B]
    old_logprob: Tensor | None = None  # [B, T]
    logits: Tensor | None = None  # [B, T, V]
    ref_logits: Tensor | None = None
    hidden: Tensor | None = None  # [B, T, H]
    weight: Tensor | None = None  # [V, H]
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        names = ("hidden", "weight") if self.logits is None else ("logits",)
        return {name: getattr(self, name) for name in names}

    @property
    def N(self) -> int:
        return self.tokens.numel()

    @property
    def counted(self) -> int:
        """Tokens that are not masked."""
        return self.N if self.mask is None else int(self.mask.sum())

    @property
    def live(self) -> int:
        """Counted tokens of sequences that have an advantage."""
        mask = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask
        return int(mask[self.advantages != 0].sum())

    def flat(self, x: Tensor) -> Tensor:
        """[N, ...], for peers that know no sequences."""
        return x.flatten(0, 1)

    def double(self) -> "Problem":
        """The same numbers in fp64."""
        return self._map(lambda x: x.double() if x.is_floating_point() else x)

    def copy(self) -> "Problem":
        """The same numbers in other memory; a weight, larger than any cache, is shared."""
        return replace(
            self, **{name: _leaf(x.clone()) for name, x in self.leaves.items() if name != "weight"}
        )

    def _map(self, function) -> "Problem":
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        changed = {name: None if x is None else function(x) for name, x in values.items()}
        return Problem(**changed | {name: _leaf(changed[name]) for name in self.leaves})


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def make(level: str, shape: Shape, device: torch.device, *, reference: bool = False) -> Problem:
    """Random tensors for "logits" or "hidden"; `reference`: a reference model's, too."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, (V, H) = shape.torch_dtype, (shape.head.V, shape.head.H)
    B = min(SEQUENCES, shape.N)
    T = shape.N // B

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(std)

    tokens = torch.randint(0, V, (B, T), generator=generator, device=device)
    mask = None
    if shape.masked:
        kept = round(T * (1 - shape.masked))
        mask = (torch.arange(T, device=device) < kept).expand(B, T).contiguous()
    advantages = normal(B, dtype=torch.float32)
    advantages[: round(B * shape.inert)] = 0.0
    problem = Problem(tokens, mask, advantages)
    if level == "logits":
        problem = replace(problem, logits=_leaf(normal(B, T, V, std=STD)))
        if reference:
            problem = replace(problem, ref_logits=normal(B, T, V, std=STD))
    else:
        hidden, weight = _leaf(normal(B, T, H)), _leaf(normal(V, H, std=STD / H**0.5))
        problem = replace(problem, hidden=hidden, weight=weight)
        if reference:
            ref_hidden = hidden.detach() + 0.1 * normal(B, T, H)
            problem = replace(problem, ref_hidden=ref_hidden, ref_weight=weight.detach())
    return replace(problem, old_logprob=_old_logprob(problem, generator))


def _old_logprob(problem: Problem, generator: torch.Generator) -> Tensor:
    """The log-probs less a log-ratio: one token in eight is far outside the clip range."""
    with torch.no_grad():
        if problem.logits is None:
            stats = grpo_kernels.linear_token_stats(
                problem.hidden, problem.weight, problem.tokens, entropy=False
            )
        else:
            stats = grpo_kernels.token_stats(problem.logits, problem.tokens, entropy=False)
    uniform = torch.empty_like(stats.logprob).uniform_(-1, 1, generator=generator)
    outside = torch.empty_like(uniform).uniform_(generator=generator) < 1 / 8
    log_ratio = torch.where(outside, OUTSIDE * uniform.sign(), INSIDE * uniform)
    return stats.logprob - log_ratio
