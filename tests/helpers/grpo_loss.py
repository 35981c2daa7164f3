"""Configs and seeded inputs of grpo_loss, its result and gradient."""

import torch

from grpo_kernels import LossConfig, token_stats
from tests.helpers.tensors import coin, make_case, normal

B, T, V = 2, 3, 37
ESTIMATORS = ["k1", "k2", "k3", "k3+", "k3_corrected", "abs", "forward", "reverse"]
CONFIGS = {
    "grpo": LossConfig(),
    "entropy bonus": LossConfig(entropy_coef=0.1),
    "every term": LossConfig(beta=0.3, entropy_coef=-0.05, kl_estimator="reverse"),
    "bnpo": LossConfig.bnpo(beta=0.1),
    "dr_grpo": LossConfig.dr_grpo(max_completion_length=8, entropy_coef=0.01),
    "dapo": LossConfig.dapo(delta=1.5),
    "gspo": LossConfig.gspo(),
    "gspo_token": LossConfig.gspo_token(epsilon_low=0.1, epsilon_high=0.1),
    "luspo": LossConfig.luspo(),
    "gmpo": LossConfig.gmpo(epsilon_low=0.1, epsilon_high=0.1),
    "cispo": LossConfig.cispo(ratio_cap=1.1),
    "sapo": LossConfig.sapo(),
    "vespo": LossConfig.vespo(),
    "gpg": LossConfig.gpg(),
    "icepop": LossConfig.icepop(importance_floor=0.8),
    "sequences importance": LossConfig(importance_level="sequence"),
    "off-policy": LossConfig(off_policy_threshold=0.0),
    "top entropy": LossConfig(top_entropy=0.4, entropy_coef=0.1),
    "clip_covariance": LossConfig.clip_covariance(clip_cov=1.0, clip_cov_low=0.01),
    "kl_covariance": LossConfig.kl_covariance(kl_cov=0.3),
    "dppo": LossConfig.dppo(epsilon_low=0.01, epsilon_high=0.01),
    "dppo_kl": LossConfig.dppo_kl(epsilon_low=0.01, epsilon_high=0.01),
    "dro": LossConfig.dro(proximal_coef=0.5),
    "ipo": LossConfig.ipo(epsilon_low=0.01, epsilon_high=0.01, sampler_penalty=0.5),
    "topr": LossConfig.topr(),
    "rollout_is": LossConfig.rollout_is(epsilon_low=0.5, epsilon_high=0.9),
    "m2po": LossConfig.m2po(),
    "rejection": LossConfig(rejection=("token_k2=0.05", "seq_mean_k1=0.8:1.3")),
    "prompt mean": LossConfig(aggregation="prompt_mean", completions_per_prompt=2),
    "nll": LossConfig(nll_coef=0.3, entropy_coef=0.1),
    "nll, gspo": LossConfig.gspo(nll_coef=0.3, beta=0.1, kl_estimator="reverse"),
    "dual clip": LossConfig(dual_clip=1.1, aggregation="sequence_sum_mean"),
    **{f"beta, {kl}": LossConfig(beta=0.2, kl_estimator=kl) for kl in ESTIMATORS},
    **{f"metric, {kl}": LossConfig(kl_estimator=kl) for kl in ("k3", "forward")},
}


def make_inputs(seed, *leading, dtype=torch.float64, sequences=B):
    """Logits, tokens, one advantage per sequence, and keywords that serve every config."""
    logits, tokens = make_case(seed, *leading, V, dtype=dtype)
    ref_logits = logits + normal(seed + 1, *leading, V, dtype=dtype, std=0.5)
    with torch.no_grad():
        logprob = token_stats(logits, tokens, entropy=False).logprob
    mask = coin(seed + 2, *leading, p=0.8)
    keywords = {
        "mask": mask,
        "nll_weight": normal(seed + 6, *leading) * (mask & coin(seed + 7, *leading, p=0.6)),
        "old_logprob": logprob + normal(seed + 3, *leading, dtype=logprob.dtype, std=0.3),
        "sampling_logprob": logprob + normal(seed + 4, *leading, dtype=logprob.dtype, std=0.3),
        "ref_logits": ref_logits,
    }
    return logits, tokens, normal(seed + 5, sequences, dtype=logprob.dtype), keywords


def run(function, logits, tokens, advantages, scale=1.0, **keywords):
    """Return the loss, the metrics and the gradient of scale · loss."""
    logits = logits.detach().clone().requires_grad_()
    loss, metrics = function(logits, tokens, advantages, **keywords)
    (scale * loss).backward()
    return loss.detach(), metrics, logits.grad
