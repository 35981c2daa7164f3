"""LossConfig and the arguments of policy_loss: defaults, named constructors, error messages."""

import ast
import dataclasses
import inspect
import itertools
import math
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from grpo_kernels.objective.aggregation import AGGREGATIONS
from grpo_kernels.objective.kl_estimators import SAMPLED_KL, VOCABULARY_KL
from grpo_kernels.objective.policy_loss import LossConfig, policy_loss
from grpo_kernels.objective.ratios import RATIO_LEVELS
from grpo_kernels.objective.surrogates import SURROGATES


def test_named_constructors_and_overrides():
    def point(**fields):
        return LossConfig(**fields)

    assert LossConfig.grpo() == point()
    assert LossConfig.grpo(beta=0.04) == point(beta=0.04)
    assert LossConfig.bnpo() == point(aggregation="token_mean")
    assert LossConfig.dr_grpo(256) == point(aggregation="fixed_length", max_completion_length=256)
    assert LossConfig.dapo() == point(epsilon_high=0.28, aggregation="token_mean")
    assert LossConfig.dapo(epsilon_high=0.3).epsilon_high == 0.3
    assert LossConfig.gspo() == point(ratio_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)
    assert LossConfig.gspo(aggregation="token_mean").aggregation == "token_mean"
    tight = {"ratio_level": "sequence", "epsilon_low": 2e-3, "epsilon_high": 2.5e-3}
    assert LossConfig.luspo() == point(aggregation="sequence_sum_mean", **tight)
    assert LossConfig.gspo_token() == LossConfig.gspo(ratio_level="sequence_token")
    of_tokens = {"aggregation": "token_mean"}
    assert LossConfig.cispo() == point(surrogate="cispo", ratio_cap=5.0, **of_tokens)
    assert LossConfig.gpg() == point(surrogate="reinforce", **of_tokens)
    assert LossConfig.vespo() == point(surrogate="vespo", **of_tokens)
    near = {"epsilon_low": 0.1, "epsilon_high": 0.1}
    assert LossConfig.ipo() == point(surrogate="ipo", **near, **of_tokens)
    near = {"epsilon_low": 0.05, "epsilon_high": 0.05, "ratio_cap": 20.0}
    assert LossConfig.dppo_kl() == point(surrogate="dppo_kl", **near, **of_tokens)
    assert LossConfig.m2po() == point(surrogate="ratio", second_moment=0.04, **of_tokens)
    assert LossConfig.topr() == point(surrogate="topr", ratio_cap=1.0, **of_tokens)
    assert LossConfig.rollout_is() == point(surrogate="rollout_is", **of_tokens)
    assert LossConfig.dro() == point(surrogate="dro", proximal_coef=0.1, **of_tokens)


def test_config_is_frozen_and_hashable():
    config = LossConfig()
    assert hash(config) == hash(LossConfig())
    with pytest.raises(AttributeError):
        config.beta = 0.1
    with pytest.raises(TypeError):
        LossConfig("clip")


def test_misspelt_objective_suggests_the_right_one():
    with pytest.raises(AttributeError, match=r"no attribute 'gpro'; did you mean LossConfig.grpo"):
        LossConfig.gpro()
    with pytest.raises(AttributeError, match=r"did you mean LossConfig.distillation\(\)\?$"):
        LossConfig.distilation()
    with pytest.raises(AttributeError, match=r"'DrGRPO'; did you mean LossConfig.dr_grpo\(\)\?$"):
        LossConfig.DrGRPO(8)
    with pytest.raises(AttributeError, match=r"^LossConfig has no attribute 'flavour'$"):
        LossConfig.flavour()
    assert not hasattr(LossConfig, "__torch_function__")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("dapo", "got str 'dapo'; did you mean LossConfig.dapo()?"),
        ("drgrpo", "got str 'drgrpo'; did you mean LossConfig.dr_grpo()?"),
        ("flavour", "got str"),
        ({"beta": 0.1}, "got dict"),
        (LossConfig.dapo, "got method"),
    ],
)
def test_config_of_another_type_is_refused(config, said):
    with pytest.raises(TypeError) as error:
        policy_loss(torch.zeros(1, 2), torch.zeros(1), config=config)
    assert str(error.value) == f"config must be a LossConfig, {said}"


def test_config_made_under_compile():
    def loss(logprob, advantages):
        config = LossConfig(beta=0.0, epsilon_high=0.3)
        return policy_loss(logprob, advantages, config=config).loss

    logprob, advantages = torch.full((1, 2), -1.0), torch.ones(1)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert compiled(logprob, advantages) == loss(logprob, advantages)


SETTINGS = [setting.name for setting in fields(LossConfig)]
TABLES = {
    "surrogate": SURROGATES,
    "ratio_level": RATIO_LEVELS,
    "kl_estimator": [*SAMPLED_KL, *VOCABULARY_KL],
    "aggregation": AGGREGATIONS,
    "importance_mode": ["truncate", "mask"],
    "importance_level": ["token", "sequence"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_choices_equal_keys_of_table(name):
    kind = get_type_hints(LossConfig)[name]
    choices = list(get_args(kind)) if get_origin(kind) is Literal else None
    assert choices == (list(TABLES[name]) if name in TABLES else None)


def test_every_setting_has_a_docstring():
    body = ast.parse(inspect.getsource(LossConfig)).body[0].body
    documented = [
        node.target.id
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value.value, str)
        and following.value.value.strip().endswith(".")
    ]
    assert documented == SETTINGS


def test_surrogates_read_settings_of_loss_config():
    for surrogate in SURROGATES.values():
        assert {setting.name for setting in fields(surrogate)} <= set(SETTINGS)


def test_objectives_lists_every_named_constructor():
    objectives = LossConfig.objectives()
    constructors = [name for name, x in vars(LossConfig).items() if isinstance(x, classmethod)]
    assert [*objectives, "distillation"] == constructors, "all that need no teacher"
    for name, constructor in (objectives | {"distillation": LossConfig.distillation}).items():
        length = {"max_completion_length": 9} if name == "dr_grpo" else {}
        assert isinstance(constructor(**length), LossConfig)
        first, *_ = constructor.__doc__.splitlines()
        assert first.endswith("."), name


def test_decode_restores_a_config_from_its_text_and_coefficients():
    config = LossConfig.cispo(beta=0.1, entropy_coef=0.3, importance_cap=None)
    assert LossConfig.decode(config.text, config.coefficients) == config
    assert config.text == dataclasses.replace(config, beta=0.2, entropy_coef=0.0).text


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (ValueError, {"surrogate": "ppo"}, "surrogate must be one of 'clip', .*, got 'ppo'"),
        (ValueError, {"ratio_level": "word"}, "ratio_level must be one of 'token', 'sequence'"),
        (ValueError, {"kl_estimator": "k4"}, "kl_estimator must be one of 'k1', .*, got 'k4'"),
        (ValueError, {"aggregation": "mean"}, "aggregation must be one of .*, got 'mean'"),
        (ValueError, {"epsilon_low": -0.1}, "epsilon_low must be at least 0, got -0.1"),
        (TypeError, {"epsilon_high": "0.2"}, "epsilon_high must be a number, got str"),
        (TypeError, {"beta": True}, "beta must be a number, got bool"),
        (ValueError, {"beta": float("nan")}, "beta must be finite, got nan"),
        (ValueError, {"beta": -1}, "beta must be at least 0, got -1"),
        (ValueError, {"entropy_coef": math.inf}, "entropy_coef must be finite, got inf"),
        (ValueError, {"delta": 1.2}, "delta must be greater than 1.2, got 1.2"),
        (ValueError, {"dual_clip": 1}, "dual_clip must be greater than 1, got 1"),
        (ValueError, {"importance_cap": 0}, "importance_cap must be greater than 0, got 0"),
        (ValueError, {"aggregation": "fixed_length"}, "needs max_completion_length, got None"),
        (ValueError, {"top_entropy": 1.5}, "top_entropy must be at most 1, got 1.5"),
        (ValueError, {"tau_positive": 0}, "tau_positive must be greater than 0, got 0"),
        (ValueError, {"tau_positive": 3}, "tau_positive is read by surrogate='sapo' only, got 3"),
        (ValueError, {"kl_cov_coef": 3}, "kl_cov_coef is read with kl_cov only, got 3 without"),
        (
            ValueError,
            {"surrogate": "cispo", "ratio_cap": 5.0, "epsilon_high": 3.0},  # TRL's name of the cap
            "epsilon_high is read by surrogate='clip' or 'gmpo' or 'dppo' or 'ipo' or "
            "'dppo_kl' or 'rollout_is' only, got 3.0",
        ),
        (TypeError, {"epsilon_low": None}, "epsilon_low must be a number, got NoneType"),
        (
            ValueError,
            {"surrogate": "sapo", "delta": 4.0},
            "delta is read by surrogate='clip' only, got 4.0 with surrogate='sapo'",
        ),
        (ValueError, {"surrogate": "cispo"}, "surrogate='cispo' needs ratio_cap, got None"),
        (ValueError, {"ratio_cap": 5.0}, "ratio_cap is read by surrogate='cispo' or 'dppo' or"),
        (
            ValueError,
            {"surrogate": "cispo", "ratio_cap": 0.5, "ratio_floor": 0.6},
            "ratio_floor must be at most ratio_cap=0.5, got 0.6",
        ),
        (
            ValueError,
            {"surrogate": "gmpo", "ratio_level": "sequence"},
            "'gmpo' averages over the sequence itself: ratio_level must be 'token', got 'sequence'",
        ),
        (
            ValueError,
            {"surrogate": "vespo", "importance_level": "sequence"},
            "importance_level must be 'token', got 'sequence'",
        ),
        (
            ValueError,
            {"surrogate": "ipo", "importance_cap": 5.0},
            "importance_cap is not read by surrogate='ipo', .* got 5.0",
        ),
        (ValueError, {"importance_floor": 2}, "importance_floor must be less than .*=2.0, got 2"),
        (
            ValueError,
            {"importance_mode": "mask", "importance_cap": None},
            "importance_mode='mask' needs importance_floor or importance_cap",
        ),
        (ValueError, {"second_moment": 0}, "second_moment must be greater than 0, got 0"),
        (TypeError, {"rejection": "token_k1=2"}, "rejection must be a tuple of texts, got str"),
        (TypeError, {"rejection": ("token_k1=2", 3)}, "rejection must be a tuple of texts, got"),
        (ValueError, {"rejection": ("token_k4=2",)}, "rejection must be LEVEL_ESTIMATOR=BOUND"),
        (ValueError, {"rejection": ("seq_mean_k3",)}, "such as 'seq_mean_k3=0.01', got 'seq_"),
        (ValueError, {"rejection": ("token_k2=one",)}, "rejection must be .*, got 'token_k2=one'"),
        (ValueError, {"rejection": ("token_k2=0",)}, "bound of 'token_k2=0' .* be greater than 0"),
        (ValueError, {"rejection": ("token_k2=inf",)}, "bound of 'token_k2=inf' .* must be finite"),
        (ValueError, {"rejection": ("token_k2=1:2",)}, "'token_k2=1:2' .* one bound, of k2"),
        (ValueError, {"rejection": ("token_k1=2:1",)}, "bounds of 'token_k1=2:1' .* must rise"),
        (
            ValueError,
            {"surrogate": "rollout_is", "rejection": ("token_k1=2",)},
            "rejection is not read by surrogate='rollout_is', .* got",
        ),
        (ValueError, {"nll_coef": -0.1}, "nll_coef must be at least 0, got -0.1"),
        (ValueError, {"aggregation": "prompt_mean"}, "needs completions_per_prompt, got None"),
        (ValueError, {"completions_per_prompt": 4}, "is read by aggregation='prompt_mean' only"),
        (ValueError, {"clip_cov": 0.1, "kl_cov": 0.1}, "clip_cov and kl_cov .*: set only one"),
        (
            ValueError,
            {"clip_cov": 0.1, "clip_cov_low": 5},
            "must be less than clip_cov_high=5.0, got 5",
        ),
        (ValueError, {"max_completion_length": 9}, "is read by aggregation='fixed_length' only"),
        (TypeError, {"max_completion_length": 9.5}, "must be an integer, got float"),
        (ValueError, {"max_completion_length": 0}, "must be at least 1, got 0"),
    ],
)
def test_wrong_setting_raises_at_construction(error, settings, message):
    if settings.get("max_completion_length") in (9.5, 0):
        settings = {"aggregation": "fixed_length", **settings}
    with pytest.raises(error, match=message):
        LossConfig(**settings)


PACKED = {"logprob": torch.zeros(4), "advantages": torch.zeros(4)}
TOKEN_MEAN = LossConfig(aggregation="token_mean")


@pytest.mark.parametrize(
    ("error", "keywords", "message"),
    [
        (TypeError, {"logprob": [0.0]}, "logprob must be a tensor, got list"),
        (TypeError, {"logprob": torch.zeros(2, 3).long()}, "logprob must be floating point"),
        (ValueError, {"logprob": torch.zeros(1, 2, 3)}, r"logprob must be \[B, T\] or packed"),
        (ValueError, {"advantages": torch.zeros(3)}, r"shape \(2, 3\) or \(2,\), got shape \(3,\)"),
        (ValueError, {"mask": torch.ones(2)}, r"mask must have shape \(2, 3\), got shape \(2,\)"),
        (ValueError, {"mask": torch.full((2, 3), 0.5)}, "mask must be bool or hold only 0 and 1"),
        (ValueError, {"old_logprob": torch.zeros(3)}, r"old_logprob must have shape \(2, 3\)"),
        (ValueError, {"entropy": torch.zeros(2)}, r"entropy must have shape \(2, 3\)"),
        (ValueError, {"kl": torch.zeros(2, 3)}, "kl_estimator='k3' reads ref_logprob, got kl"),
        (
            ValueError,
            {"ref_logprob": torch.zeros(2, 3), "config": LossConfig(kl_estimator="reverse")},
            "kl_estimator='reverse' reads kl, got ref_logprob",
        ),
        (ValueError, {"config": LossConfig(beta=0.1)}, "beta=0.1 .* needs ref_logprob, got None"),
        (
            ValueError,
            {"config": LossConfig(beta=0.1, kl_estimator="forward")},
            "kl_estimator='forward' needs kl, got None",
        ),
        (ValueError, {"config": LossConfig(entropy_coef=0.1)}, "entropy_coef=0.1 needs entropy"),
        (ValueError, {"normalizer": 0}, "normalizer must be greater than 0, got 0"),
        (ValueError, {"normalizer": torch.ones(1)}, "normalizer must be a number or a 0-dim"),
        (
            ValueError,
            {
                "normalizer": 4,
                "entropy": torch.zeros(2, 3),
                "config": LossConfig(entropy_coef=0.1),
            },
            "needs entropy_normalizer, the number of tokens",
        ),
        (ValueError, {"config": LossConfig(nll_coef=0.1)}, "nll_coef=0.1 needs nll_weight, got N"),
        (ValueError, {"nll_weight": torch.zeros(3)}, r"nll_weight must have shape \(2, 3\) or"),
        (
            ValueError,
            {
                "normalizer": 4,
                "nll_weight": torch.zeros(2, 3),
                "config": LossConfig(nll_coef=0.1),
            },
            "nll_coef=0.1 needs nll_normalizer, the number of tokens",
        ),
        (ValueError, {"cu_seqlens": torch.tensor([0, 6])}, r"belongs to packed \[N\] input"),
        (ValueError, PACKED, "needs cu_seqlens with .* aggregation='sequence_mean', .* got None"),
        (
            ValueError,
            PACKED | {"config": LossConfig(aggregation="token_mean", off_policy_threshold=0.1)},
            "needs cu_seqlens with .* off_policy_threshold=0.1, got None",
        ),
        (ValueError, {"config": LossConfig(top_entropy=0.2)}, "top_entropy=0.2 needs entropy"),
        (ValueError, {"config": LossConfig.icepop()}, "'mask' needs sampling_logprob, got None"),
        (
            ValueError,
            {"config": LossConfig(rejection=("token_k2=1",))},
            r"rejection=\('token_k2=1',\) needs sampling_logprob, got None",
        ),
        (ValueError, {"config": LossConfig.ipo()}, "surrogate='ipo' needs sampling_logprob, got"),
        (TypeError, PACKED | {"cu_seqlens": torch.tensor([0.0, 4])}, "must be int32 or int64"),
        (ValueError, PACKED | {"cu_seqlens": torch.tensor([0, 3])}, "rise from 0 to 4 tokens"),
        (ValueError, PACKED | {"cu_seqlens": torch.tensor([0, 5, 4])}, "rise from 0 to 4 tokens"),
        (ValueError, PACKED | {"cu_seqlens": torch.tensor([[0, 4]])}, r"be \[sequences \+ 1\]"),
        (
            ValueError,
            PACKED | {"advantages": torch.zeros(1), "config": TOKEN_MEAN},
            r"advantages must have shape \(4,\), got shape \(1,\)",
        ),
    ],
)
def test_wrong_argument_raises(error, keywords, message):
    arguments = {"logprob": torch.zeros(2, 3), "advantages": torch.zeros(2)} | keywords
    with pytest.raises(error, match=message):
        policy_loss(**arguments)
