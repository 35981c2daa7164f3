"""Powers of two that keep fp16 gradients in range, without reading a value on the host.

fp16 holds numbers from 6e-8 to 65504, and the gradient of a token's logits may be anywhere: a
normalizer of a large batch makes it tiny, a GradScaler makes it large. Each row n of d_logits is
therefore multiplied by its own s_n, before it is rounded:

    d_hidden[n] = (s_n d_logits[n]) @ weight / s_n
    d_weight    = Σ_n (s_n d_logits[n])ᵀ (S / s_n · hidden[n]) / S        S = min s_n

S is a running minimum over the chunks. Powers of two change no digit. An adapter's b and its states
hidden aᵀ have a scale per column: fp32 adapters may be far outside the range of fp16.
"""

import torch
from torch import Tensor

from ..backends import RowStats
from ..objective.token_gradients import TokenGrads

LARGEST = 15  # log2 of the largest number: half of what fp16 holds
EXPONENTS = 100  # the scale and its inverse stay in fp32


def gradient_bound(stats: RowStats, grads: TokenGrads, temperature: Tensor) -> Tensor:
    """Bound |d_logits| of each row [n], from its statistics and their upstream gradients.

    Each statistic's gradient in the scaled logits is bounded by: 1 for (1_token - p), entropy + 1
    for p (ln p + entropy), 2 KL + 1 for p (ln p - ln q - KL), 1 for (p - q), 2 for
    2 (p² / Σ p² - p), 1 for 1 / entries. That of a softcap is at most 1.
    """
    factors: TokenGrads = TokenGrads(
        logprob=None,
        entropy=None if stats.entropy is None else stats.entropy + 1,
        kl=None if stats.kl is None else 2 * stats.kl + 1,
        sum_sq_probs=torch.full_like(temperature, 2.0),
    )
    bound = torch.zeros_like(temperature)
    for grad, factor in zip(grads, factors, strict=True):
        if grad is not None:
            size = grad.abs() if factor is None else grad.abs() * factor
            bound = bound + torch.where(grad == 0, 0.0, size)  # 0 · inf of an infinite KL
    return bound / temperature


def power_of_two_scale(bound: Tensor) -> Tensor:
    """Return the power of two that brings each bound to between 2^14 and 2^15."""
    exponent = (LARGEST - bound.log2()).floor()
    return exponent.clamp(-EXPONENTS, EXPONENTS).exp2()
