"""One call of token_stats, grpo_loss and linear_grpo_loss with their gradients."""

import torch

from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss, token_stats
from tests.helpers.tensors import make_case, normal

NUM_OPS = 3
SIZES = [(3, 3, 37), (2, 4, 64)]


def run_every_op(seed, device="cpu"):
    """Losses and gradients of three ops; the sizes depend on the seed."""
    B, T, V = SIZES[seed % len(SIZES)]
    logits, tokens = make_case(seed, B, T, V, device=device)
    ref_logits = normal(seed + 2, B, T, V, device=device)
    advantages = normal(seed + 3, B).to(device)
    hidden = normal(seed + 4, B, T, 8, device=device)
    weight = normal(seed + 5, V, 8, device=device)
    leaves = [x.requires_grad_() for x in (logits, hidden, weight)]
    stats = token_stats(logits, tokens, kl="reverse", ref_logits=ref_logits)
    config = LossConfig(entropy_coef=0.01, epsilon_high=0.2 + seed / 100)
    losses = [
        stats.logprob.sum() + stats.entropy.sum() - stats.kl.sum(),
        grpo_loss(logits, tokens, advantages, config=config).loss,
        linear_grpo_loss(hidden, weight, tokens, advantages, config=config, chunk_tokens=8).loss,
    ]
    gradients = torch.autograd.grad(sum(losses), leaves)
    return [x.detach() for x in (*losses, *gradients)]
