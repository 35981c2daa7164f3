"""Error messages of the linear ops name the argument, the expectation and what was passed."""

import pytest
import torch

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats, pack_tokens

B, T, V, H = 2, 3, 5, 4
HIDDEN, WEIGHT = torch.zeros(B, T, H), torch.zeros(V, H)
TOKENS = torch.zeros(B, T, dtype=torch.int64)
REFERENCE = {"ref_hidden": HIDDEN, "ref_weight": WEIGHT}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [0.0]}, TypeError, "hidden must be a tensor, got list"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be floating point, got torch.int64"),
        ({"hidden": HIDDEN[0, 0]}, ValueError, r"hidden must be \[B, T, H\].*got shape \(4,\)"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": WEIGHT.T}, ValueError, r"weight must be \[V, 4\].*hidden, got shape \(4, 5\)"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be \[V, 4\]"),
        ({"weight": WEIGHT[:0]}, ValueError, r"weight must be \[V, 4\].*got shape \(0, 4\)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"bias": torch.zeros(H)}, ValueError, r"bias must have shape \(5,\), got shape \(4,\)"),
        (
            {"bias": torch.zeros(V).long()},
            TypeError,
            "bias must be floating point, got torch.int64",
        ),
        ({"tokens": TOKENS.float()}, TypeError, "tokens must be integer ids, got torch.float32"),
        (
            {"tokens": TOKENS[:, :2]},
            ValueError,
            r"tokens must have shape \(2, 3\), that of hidden without.*got shape \(2, 2\)",
        ),
        ({"tokens": TOKENS + V}, ValueError, r"tokens must lie in \[0, 5\).*got 5"),
        ({"mask": torch.ones(B)}, ValueError, r"mask must have shape \(2, 3\), got shape \(2,\)"),
        ({"temperature": -1.0}, ValueError, "temperature must be greater than 0, got -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be greater than 0, got 0.0"),
        ({"kl": "reverse"}, ValueError, "kl='reverse' needs ref_hidden and ref_weight, got None"),
        ({"kl": "k3", **REFERENCE}, ValueError, "kl must be one of 'forward', 'reverse', got 'k3'"),
        (REFERENCE, ValueError, "ref_hidden is read with kl='forward' or 'reverse' only"),
        (
            {"kl": "forward", "ref_hidden": HIDDEN},
            ValueError,
            "ref_hidden and ref_weight belong together, got no ref_weight",
        ),
        (
            {"kl": "forward", **REFERENCE, "ref_hidden": HIDDEN[:1]},
            ValueError,
            r"ref_hidden must have the tokens of hidden, \(2, 3\), got shape \(1, 3, 4\)",
        ),
        (
            {"kl": "forward", **REFERENCE, "ref_weight": WEIGHT[:3]},
            ValueError,
            r"ref_weight must have the vocabulary of weight, 5, got shape \(3, 4\)",
        ),
        (
            {"kl": "forward", **REFERENCE, "ref_weight": torch.zeros(V, 7)},
            ValueError,
            r"ref_weight must be \[V, 4\], where 4 is the size of ref_hidden, got shape \(5, 7\)",
        ),
        (
            {"hidden": HIDDEN.to(torch.float8_e5m2)},
            TypeError,
            "hidden must be fp16, bf16, fp32 or fp64, got torch.float8_e5m2",
        ),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, got 0"),
        ({"chunk_tokens": 2.0}, TypeError, "chunk_tokens must be an integer, got float"),
        (
            {"packing": pack_tokens(torch.ones(4))},
            ValueError,
            "packing must be of a mask of 6 tokens, got one of 4",
        ),
        (
            {"packing": torch.ones(2, 3)},
            TypeError,
            r"packing must be a TokenPacking of pack_tokens\(\), got Tensor",
        ),
        (
            {"packing": pack_tokens(torch.eye(2, 3)), "mask": torch.ones(2, 3)},
            ValueError,
            "packing must be pack_tokens of the same mask, got that of another",
        ),
    ],
)
def test_linear_token_stats_error_messages(change, error, message):
    given = {"hidden": HIDDEN, "weight": WEIGHT, "tokens": TOKENS, **change}
    with pytest.raises(error, match=message):
        linear_token_stats(**given)
    if "kl" not in change and "ref_hidden" not in change:
        with pytest.raises(error, match=message):
            linear_grpo_loss(**given, advantages=torch.ones(B))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"config": LossConfig(beta=0.1)},
            ValueError,
            "beta=0.1 with kl_estimator='k3' needs ref_logprob or ref_hidden, got None",
        ),
        (
            {"config": LossConfig(beta=0.1, kl_estimator="reverse")},
            ValueError,
            "beta=0.1 with kl_estimator='reverse' needs ref_hidden and ref_weight, got None",
        ),
        (
            {"config": LossConfig(kl_estimator="reverse"), "ref_logprob": torch.zeros(B, T)},
            ValueError,
            "kl_estimator='reverse' reads ref_hidden and ref_weight, got ref_logprob",
        ),
        (
            {"ref_hidden": HIDDEN},
            ValueError,
            "ref_hidden and ref_weight belong together, got no ref_weight",
        ),
        (
            {"advantages": torch.ones(B).to("meta")},
            ValueError,
            "advantages must be on cpu, got meta",
        ),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages must have shape \(2, 3\) or"),
        ({"old_logprob": torch.ones(B)}, ValueError, r"old_logprob must have shape \(2, 3\)"),
        (
            {"hidden": HIDDEN[0], "tokens": TOKENS[0], "advantages": torch.ones(T)},
            ValueError,
            "needs cu_seqlens",
        ),
        (
            {"packing": pack_tokens(torch.ones(B, T), torch.tensor([0.0, 1.0]))},
            ValueError,
            "packing must be pack_tokens of the same advantages, got that of others",
        ),
    ],
)
def test_linear_grpo_loss_error_messages(change, error, message):
    given = {"hidden": HIDDEN, "weight": WEIGHT, "tokens": TOKENS, "advantages": torch.ones(B)}
    with pytest.raises(error, match=message):
        linear_grpo_loss(**{**given, **change})


@pytest.mark.parametrize("name", ["entropy", "entropy_grad"])
def test_flags_are_bool(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got str"):
        linear_token_stats(HIDDEN, WEIGHT, TOKENS, **{name: "no"})


def test_pack_tokens_error_messages():
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        pack_tokens([1, 0])
    with pytest.raises(ValueError, match="mask must be bool or hold only 0 and 1"):
        pack_tokens(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"advantages must have shape \(2, 3\) or \(2,\)"):
        pack_tokens(torch.ones(2, 3), torch.ones(3))
