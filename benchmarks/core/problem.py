"""The tensors of a case, the same for every implementation.

B sequences of T tokens, N = B·T; V vocabulary, H hidden size.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import grpo_kernels
from benchmarks.core.shapes import Shape

SEQUENCES = 16
STD = 4.0  # of the logits, as in a language model
# Sizes of the log-ratio of policy and old policy. None lies within 0.08 of a clip boundary (-0.223
# and 0.182), so that rounding cannot change which tokens are clipped.
INSIDE, OUTSIDE = 0.1, 0.5


@dataclass(frozen=True)
class Problem:
    """Inputs at the level of logits or of hidden states; one of `logits` and `hidden` is None."""

    tokens: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]; None: every token counts
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
        """Tensors that get a gradient, by name."""
        names = ("hidden", "weight") if self.logits is None else ("logits",)
        return {name: getattr(self, name) for name in names}

    @property
    def N(self) -> int:
        return self.tokens.numel()

    @property
    def num_active(self) -> int:
        """Number of unmasked tokens."""
        return self.N if self.mask is None else int(self.mask.sum())

    @property
    def num_with_gradient(self) -> int:
        """Number of unmasked tokens with an advantage other than 0."""
        mask = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask
        return int(mask[self.advantages != 0].sum())

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
    level: str, shape: Shape, device: torch.device, *, reference: bool = False
) -> Problem:
    """Make random tensors.

    Args:
        level: "logits" or "hidden".
        reference: make the tensors of a reference policy, too.
    """
    generator = torch.Generator(device).manual_seed(0)
    V, H, B = shape.head.V, shape.head.H, min(SEQUENCES, shape.N)
    T = shape.N // B

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = shape.torch_dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(std)

    tokens = torch.randint(0, V, (B, T), generator=generator, device=device)
    mask = None
    if shape.masked:
        unmasked = round(T * (1 - shape.masked))
        mask = (torch.arange(T, device=device) < unmasked).expand(B, T).contiguous()
    advantages = normal(B, dtype=torch.float32)
    advantages[: round(B * shape.inert)] = 0.0
    tensors: dict[str, Tensor] = {}
    if level == "logits":
        tensors["logits"] = _leaf(normal(B, T, V, std=STD))
        if reference:
            tensors["ref_logits"] = normal(B, T, V, std=STD)
    else:
        tensors["hidden"] = _leaf(normal(B, T, H))
        tensors["weight"] = _leaf(normal(V, H, std=STD / H**0.5))
        if reference:
            tensors["ref_hidden"] = tensors["hidden"].detach() + 0.1 * normal(B, T, H)
            tensors["ref_weight"] = tensors["weight"].detach()

    with torch.no_grad():
        if level == "logits":
            stats = grpo_kernels.token_stats(tensors["logits"], tokens, entropy=False)
        else:
            stats = grpo_kernels.linear_token_stats(
                tensors["hidden"], tensors["weight"], tokens, entropy=False
            )
    # One token in eight is far outside the clip range.
    uniform = torch.empty_like(stats.logprob).uniform_(-1, 1, generator=generator)
    outside = torch.empty_like(uniform).uniform_(generator=generator) < 1 / 8
    log_ratio = torch.where(outside, OUTSIDE * uniform.sign(), INSIDE * uniform)
    return Problem(tokens, mask, advantages, stats.logprob - log_ratio, **tensors)
