"""The flags of the loss: LossConfig's fields, and --loss for its named constructors."""

from dataclasses import asdict, fields
from typing import get_args, get_type_hints

import pytest

from grpo_kernels import LossConfig
from grpo_kernels.objective.kl_estimators import SAMPLED_KL
from reference.training.command_line import parse_command_line
from reference.training.config import LOSS_SETTINGS, LossSettings, TrainConfig, in_flags
from reference.training.errors import UserError


@pytest.mark.parametrize("loss", LossConfig.objectives())
def test_named_loss_equals_its_constructor(loss):
    arguments = {"max_completion_length": 12} if loss == "dr_grpo" else {}
    expected = LossConfig.objectives()[loss](**arguments)
    assert TrainConfig(loss=loss).loss_config() == expected


def test_every_setting_of_a_loss_is_a_flag():
    assert [flag.name for flag in fields(LossSettings)] == ["loss", *LOSS_SETTINGS]
    assert LOSS_SETTINGS == tuple(setting.name for setting in fields(LossConfig))


def test_flags_have_the_types_of_loss_config():
    ours, expected = get_type_hints(LossSettings), get_type_hints(LossConfig)
    for name in set(LOSS_SETTINGS) - {"beta", "kl_estimator"}:
        assert ours[name] == expected[name] | None, name
    assert get_args(ours["kl_estimator"]) == tuple(SAMPLED_KL)


def test_no_objective_sets_beta_or_the_kl_estimator():
    """Their flags have the defaults of LossConfig, not None."""
    default = LossConfig()
    with_defaults = {x.name for x in fields(LossSettings) if x.default is not None} - {"loss"}
    assert with_defaults == {"beta", "kl_estimator"}
    for loss in LossConfig.objectives():
        config = TrainConfig(loss=loss).loss_config()
        assert (config.beta, config.kl_estimator) == (default.beta, default.kl_estimator)


# A value of each setting that is not its default, and the flags that it needs.
SET = {
    "surrogate": ("sapo", []),
    "ratio_level": ("sequence_token", []),
    "epsilon_low": (0.1, []),
    "epsilon_high": (0.3, []),
    "delta": (2.5, []),
    "dual_clip": (3.0, []),
    "ratio_cap": (4.0, ["--loss", "cispo"]),
    "tau_positive": (2.0, ["--loss", "sapo"]),
    "tau_negative": (2.0, ["--loss", "sapo"]),
    "k_positive": (1.0, ["--loss", "vespo"]),
    "lambda_positive": (1.0, ["--loss", "vespo"]),
    "k_negative": (1.0, ["--loss", "vespo"]),
    "lambda_negative": (1.0, ["--loss", "vespo"]),
    "sampler_penalty": (0.5, ["--loss", "ipo"]),
    "ratio_floor": (0.5, ["--loss", "cispo"]),
    "proximal_coef": (0.5, ["--loss", "dro"]),
    "beta": (0.1, []),
    "kl_estimator": ("k3+", ["--beta", "0.1"]),
    "entropy_coef": (0.1, ["--loss", "one_shot"]),
    "aggregation": ("sequence_sum_mean", ["--loss", "dr_grpo"]),
    "max_completion_length": (5, ["--loss", "dr_grpo"]),
    "importance_mode": ("mask", []),
    "importance_level": ("sequence", []),
    "importance_floor": (0.1, ["--loss", "icepop"]),
    "importance_cap": (3.0, ["--loss", "icepop"]),
    "off_policy_threshold": (0.5, []),
    "top_entropy": (0.2, []),
    "clip_cov": (0.1, ["--loss", "clip_covariance"]),
    "clip_cov_low": (0.5, ["--loss", "clip_covariance"]),
    "clip_cov_high": (2.0, ["--loss", "clip_covariance"]),
    "kl_cov": (0.1, ["--minibatches", "2"]),
    "kl_cov_coef": (0.5, ["--loss", "kl_covariance", "--minibatches", "2"]),
    "nll_coef": (0.1, []),
    "completions_per_prompt": (8, ["--aggregation", "prompt_mean"]),
    "second_moment": (0.1, ["--loss", "m2po", "--minibatches", "2"]),
    "rejection": (("token_k1=0.5:2", "seq_mean_k3=0.01"), []),
}


@pytest.mark.parametrize("name", LOSS_SETTINGS)
def test_flag_sets_only_its_setting(name):
    value, needed = SET[name]
    flag = "--" + name.replace("_", "-")
    before = parse_command_line(needed).loss_config()
    values = value if isinstance(value, tuple) else [str(value)]
    after = parse_command_line([*needed, flag, *values])
    expected = {**asdict(before), name: value}
    if name == "aggregation":
        expected["max_completion_length"] = None
    assert asdict(after.loss_config()) == expected
    after.check_loss()


def test_prompt_mean_counts_the_completions_of_a_group():
    config = TrainConfig(aggregation="prompt_mean", group_size=5)
    assert config.loss_config().completions_per_prompt == 5
    with pytest.raises(UserError, match="--completions-per-prompt is --group-size"):
        TrainConfig(aggregation="prompt_mean", group_size=5, completions_per_prompt=3)


def test_fixed_length_defaults_to_max_new_tokens():
    config = TrainConfig(aggregation="fixed_length", max_new_tokens=9)
    assert config.loss_config().max_completion_length == 9
    config = TrainConfig(loss="dr_grpo", max_completion_length=5, max_new_tokens=9)
    assert config.loss_config().max_completion_length == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"ratio_cap": 2.0},
            "--loss grpo: --ratio-cap is read by --surrogate 'cispo' or 'dppo' or 'dppo_kl' or "
            "'topr' only, got 2.0 with --surrogate 'clip'",
        ),
        ({"delta": 1.1}, "--loss grpo: --delta must be greater than 1.2, got 1.1"),
        (
            {"loss": "kl_covariance"},
            "--loss kl_covariance: --kl-cov acts from a batch's second optimiser step on: set "
            "--inner-iterations or --minibatches above 1",
        ),
        (
            {"clip_cov": 0.1, "kl_cov": 0.1},
            "--loss grpo: --clip-cov and --kl-cov both prevent entropy collapse: set only one",
        ),
        (
            {"loss": "icepop", "importance_floor": 6.0},
            "--loss icepop: --importance-floor must be less than --importance-cap 5.0, got 6.0",
        ),
        (
            {"rejection": ("token_k2=0",)},
            "--loss grpo: the bound of 'token_k2=0' in --rejection must be greater than 0, got 0.0",
        ),
        ({"top_entropy": 1.5}, "--loss grpo: --top-entropy must be at most 1, got 1.5"),
    ],
)
def test_contradictory_loss_settings_name_the_flags(settings, said):
    with pytest.raises(UserError) as error:
        TrainConfig(**settings).check_loss()
    assert str(error.value) == said


def test_in_flags_replaces_whole_names_only():
    assert in_flags("betas of a kl_cov_coef=2") == "betas of a --kl-cov-coef 2"
