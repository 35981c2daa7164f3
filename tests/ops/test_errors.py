"""Error messages name the argument, the expectation and what was passed."""

import pytest
import torch

from grpo_kernels import LossConfig, grpo_loss, token_stats

B, T, V = 2, 3, 5
LOGITS = torch.zeros(B, T, V)
TOKENS = torch.zeros(B, T, dtype=torch.int64)
ADVANTAGES = torch.ones(B)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [0.0]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": LOGITS.long()}, TypeError, "logits must be floating point, got torch.int64"),
        ({"logits": LOGITS[0, 0]}, ValueError, r"logits must be \[B, T, V\].*got shape \(5,\)"),
        ({"logits": LOGITS[..., :0]}, ValueError, "a vocabulary of at least 1"),
        (
            {"logits": torch.zeros(B, V, T).mT},
            ValueError,
            r"logits must be contiguous in the last dimension, got strides \(15, 1, 3\)",
        ),
        ({"tokens": TOKENS.float()}, TypeError, "tokens must be integer ids, got torch.float32"),
        (
            {"tokens": TOKENS[:, :2]},
            ValueError,
            r"tokens must have shape \(2, 3\).*got shape \(2, 2\)",
        ),
        ({"tokens": TOKENS.to("meta")}, ValueError, "tokens must be on cpu, got meta"),
        ({"tokens": TOKENS + V}, ValueError, r"tokens must lie in \[0, 5\).*got 5"),
        ({"tokens": TOKENS - 1}, ValueError, r"tokens must lie in \[0, 5\).*got -1"),
        ({"mask": torch.ones(B)}, ValueError, r"mask must have shape \(2, 3\), got shape \(2,\)"),
        ({"mask": torch.full((B, T), 0.5)}, ValueError, "mask must be bool or hold only 0 and 1"),
        ({"mask": [1]}, TypeError, "mask must be a tensor, got list"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ({"temperature": torch.zeros(B, T)}, ValueError, "temperature must be greater than 0 for"),
        ({"temperature": torch.ones(4)}, ValueError, r"temperature must broadcast to .*\(4,\)"),
        *(
            ({name: 1}, TypeError, f"{name} must be True or False, got int")
            for name in ("entropy", "sum_sq_probs", "mean_logit", "is_top1")
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be greater than 0, got 0.0"),
        ({"kl": "reverse"}, ValueError, "kl='reverse' needs ref_logits, got None"),
        ({"ref_logits": LOGITS}, ValueError, "ref_logits is read with kl="),
        (
            {"kl": "k3", "ref_logits": LOGITS},
            ValueError,
            "kl must be one of 'forward', 'reverse', got 'k3'",
        ),
        (
            {"kl": "forward", "ref_logits": LOGITS[:1]},
            ValueError,
            r"ref_logits must have shape \(2, 3, 5\), got shape \(1, 3, 5\)",
        ),
    ],
)
def test_token_stats_error_messages(backend, change, error, message):
    with pytest.raises(error, match=message):
        token_stats(**{"logits": LOGITS, "tokens": TOKENS, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.ones(3)}, r"advantages must have shape \(2, 3\) or \(2,\)"),
        ({"old_logprob": torch.zeros(B)}, r"old_logprob must have shape \(2, 3\)"),
        ({"config": LossConfig(beta=0.1)}, "beta=0.1 with kl_estimator='k3' needs ref_logprob"),
        (
            {"config": LossConfig(beta=0.1, kl_estimator="reverse")},
            "beta=0.1 with kl_estimator='reverse' needs kl",
        ),
        (
            {
                "config": LossConfig(kl_estimator="reverse"),
                "ref_logits": LOGITS,
                "ref_logprob": torch.zeros(B, T),
            },
            "kl_estimator='reverse' reads kl, got ref_logprob",
        ),
        (
            {"config": LossConfig(entropy_coef=0.1), "normalizer": 2},
            "needs entropy_normalizer",
        ),
        (
            {"logits": LOGITS[:1].expand(B, T, V), "inplace": True},
            r"logits must not be expanded with inplace=True, got strides \(0, 5, 1\)",
        ),
        ({"normalizer": 0}, "normalizer must be greater than 0, got 0"),
        ({"normalizer": torch.ones(2)}, r"normalizer must be a number or a 0-dim tensor"),
    ],
)
def test_grpo_loss_error_messages(backend, change, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{"logits": LOGITS, "tokens": TOKENS, "advantages": ADVANTAGES, **change})


def test_masked_token_id_may_be_out_of_range(backend):
    tokens, mask = TOKENS.clone(), torch.ones(B, T)
    tokens[0, 1], mask[0, 1] = -100, 0
    assert token_stats(LOGITS, tokens, mask=mask).logprob[0, 1] == 0


def test_masked_temperature_may_be_zero(backend):
    temperature, mask = torch.ones(B, T), torch.ones(B, T)
    temperature[0, 1], mask[0, 1] = 0, 0
    stats = token_stats(LOGITS, TOKENS, temperature=temperature, mask=mask)
    assert stats.logprob.isfinite().all()


def test_packed_input_needs_cu_seqlens(backend):
    with pytest.raises(ValueError, match=r"packed .* input needs cu_seqlens"):
        grpo_loss(LOGITS[0], TOKENS[0], torch.ones(T))
