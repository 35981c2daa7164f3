"""Hypothesis strategies for LossConfig: every setting, in every valid combination."""

from hypothesis import strategies as st

from grpo_kernels.objective.aggregation import AGGREGATIONS
from grpo_kernels.objective.config import LossConfig
from grpo_kernels.objective.kl_estimators import SAMPLED_KL
from grpo_kernels.objective.surrogates import SURROGATES
from grpo_kernels.objective.token_gradients import is_token_level

SAMPLED = list(SAMPLED_KL)
# Clip-Cov takes all eligible tokens here, because a smaller fraction is drawn at random.
FILTERS = {
    "off_policy_threshold": [0.1, -0.2],
    "top_entropy": [0.2, 0.5],
    "clip_cov": [1.0],
    "kl_cov": [1e-4, 0.4],
    "second_moment": [0.04, 0.3],
    "rejection": [
        ("token_k1=0.6:1.7",),
        ("seq_sum_k1=3", "token_k3=0.2"),
        ("seq_mean_k2=0.15",),
        ("seq_max_k3=0.4", "seq_max_k1=0.5:2", "seq_mean_k3=0.3"),
    ],
}
ANY = {
    "beta": [0.0, 0.04, 2.0],
    "entropy_coef": [0.0, 0.001, -0.5],
    "nll_coef": [0.0, 0.0, 0.3],
    "importance_mode": ["truncate", "mask"],
    "importance_floor": [None, 0.3],
    "importance_cap": [0.5, 2.0, None],
}
BOUNDS = {"epsilon_low": [0.0, 3e-4, 0.2, 5.0], "epsilon_high": [4e-4, 0.2, 0.28]}
OF_SURROGATE = {
    "clip": {"delta": [None, 1.5, 4.0], "dual_clip": [None, 1.1, 3.0], **BOUNDS},
    "cispo": {"ratio_cap": [0.9, 5.0], "ratio_floor": [0.0, 0.8]},
    "dppo": {"ratio_cap": [1.2, 20.0], **BOUNDS},
    "dppo_kl": {"ratio_cap": [1.2, 20.0], **BOUNDS},
    "dro": {"proximal_coef": [0.0, 0.1, 0.5]},
    "gmpo": BOUNDS,
    "sapo": {"tau_positive": [1.0, 3.0], "tau_negative": [1.05, 0.2]},
    "ipo": {"sampler_penalty": [0.0, 1e-3, 0.5], **BOUNDS},
    "topr": {"ratio_cap": [0.9, 1.0]},
    "rollout_is": BOUNDS,
    "vespo": {"k_positive": [2.0, 0.0], "lambda_negative": [2.0, 0.0]},
}
ANY_LEVEL = ["clip", "ratio", "cispo", "sapo", "topr", "rollout_is"]


@st.composite
def loss_configs(draw, *, filters=tuple(FILTERS), estimators=(*SAMPLED, "forward", "reverse")):
    """Draw a config; `filters` names the filters that may be on."""
    surrogate = draw(st.sampled_from(list(SURROGATES)))
    choices = ANY | OF_SURROGATE.get(surrogate, {})
    choices |= {"aggregation": list(AGGREGATIONS), "kl_estimator": list(estimators)}
    if surrogate in ANY_LEVEL:
        choices["ratio_level"] = ["token", "token", "sequence", "sequence_token"]
    if SURROGATES[surrogate].relative_to_sampler:
        choices = {name: x for name, x in choices.items() if not name.startswith("importance_")}
    elif surrogate != "vespo":
        choices["importance_level"] = ["token", "token", "sequence"]
    names = draw(st.sets(st.sampled_from(filters), max_size=2)) if filters else set()
    if SURROGATES[surrogate].relative_to_sampler:
        names.discard("rejection")
    if names >= {"clip_cov", "kl_cov"}:
        names.remove("clip_cov")
    choices |= {name: FILTERS[name] for name in names}
    fields = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    if fields["aggregation"] == "fixed_length":
        fields["max_completion_length"] = 7
    if fields["aggregation"] == "prompt_mean":
        fields["completions_per_prompt"] = 2
    if fields.get("importance_cap", 2.0) is None and fields["importance_floor"] is None:
        fields["importance_mode"] = "truncate"
    return LossConfig(surrogate=surrogate, **fields)


def per_token_configs():
    """Draw token-level configs, also with the sampler's log-probs given."""
    configs = loss_configs(filters=(), estimators=SAMPLED)
    return configs.filter(lambda config: is_token_level(config, has_sampling=True))
