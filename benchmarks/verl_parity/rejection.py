"""Compare the tokens that `LossConfig.rejection` keeps with those of verl's rollout_rs."""

import torch

from grpo_kernels import LossConfig, policy_loss

# verl's rollout_rs and rollout_rs_threshold, and the same rules as entries of `rejection`.
RULES: dict[tuple[str, str], tuple[str, ...]] = {
    ("token_k1", "0.6_1.5"): ("token_k1=0.6:1.5",),
    ("token_k2", "0.1"): ("token_k2=0.1",),
    ("token_k3", "0.1"): ("token_k3=0.1",),
    ("seq_sum_k1", "2.0"): ("seq_sum_k1=2.0",),
    ("seq_sum_k2", "0.4"): ("seq_sum_k2=0.4",),
    ("seq_sum_k3", "0.4"): ("seq_sum_k3=0.4",),
    ("seq_mean_k1", "0.8_1.25"): ("seq_mean_k1=0.8:1.25",),
    ("seq_mean_k2", "0.12"): ("seq_mean_k2=0.12",),
    ("seq_mean_k3", "0.12"): ("seq_mean_k3=0.12",),
    ("seq_max_k2", "0.3"): ("seq_max_k2=0.3",),
    ("seq_max_k3", "0.3"): ("seq_max_k3=0.3",),
    ("token_k1,seq_mean_k3", "0.5_2.0,0.2"): ("token_k1=0.5:2.0", "seq_mean_k3=0.2"),
}
SEEDS = range(8)


def kept_tokens(rollout_rs: str, threshold: str) -> tuple[int, int, int]:
    """Return the numbers of tokens, of those that verl keeps, and of those on which ours differ."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    tokens = kept = different = 0
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        B, T = 16, 6
        difference = 0.5 * torch.randn(B, T, generator=generator, dtype=torch.float64)
        lengths = torch.randint(0, T + 1, (B, 1), generator=generator)
        mask = (torch.arange(T) < lengths).double()
        theirs, _ = compute_rollout_rejection_mask(difference, mask, rollout_rs, threshold)
        config = LossConfig(
            surrogate="reinforce", importance_cap=None, rejection=RULES[rollout_rs, threshold]
        )
        logprob = torch.full((B, T), -1.0, dtype=torch.float64).requires_grad_()
        loss, _ = policy_loss(
            logprob,
            torch.ones(B),
            mask=mask,
            sampling_logprob=logprob.detach() - difference,
            config=config,
        )
        (gradient,) = torch.autograd.grad(loss, logprob)
        tokens += int(mask.sum())
        kept += int(theirs.sum())
        different += int(((gradient != 0) != theirs.bool()).sum())
    return tokens, kept, different
