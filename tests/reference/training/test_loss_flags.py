"""The losses on the command line: the names are the package's, and every setting is a flag."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

import grpo_kernels
from grpo_kernels.objective.aggregation import AGGREGATIONS
from grpo_kernels.objective.kl_estimators import SAMPLED_KL
from grpo_kernels.objective.ratios import RATIO_LEVELS
from grpo_kernels.objective.surrogates import SURROGATES
from reference.training.command_line import parse_command_line
from reference.training.config import TrainConfig
from reference.training.errors import UserError
from reference.training.loss_settings import LOSSES, SETTINGS_OF_LOSSES, LossSettings, in_flags

CONSTRUCTORS = [
    name for name, each in vars(grpo_kernels.LossConfig).items() if isinstance(each, classmethod)
]


def test_every_named_constructor_is_a_loss():
    assert sorted(LOSSES) == sorted(CONSTRUCTORS)


@pytest.mark.parametrize("loss", LOSSES)
def test_named_loss_equals_its_constructor(loss):
    given = TrainConfig(loss=loss).loss_fields()
    arguments = {"max_completion_length": 12} if loss == "dr_grpo" else {}
    expected = getattr(grpo_kernels.LossConfig, loss)(**arguments)
    assert grpo_kernels.LossConfig(**given) == expected


def test_every_setting_of_a_loss_is_a_flag():
    assert sorted(SETTINGS_OF_LOSSES) == sorted(
        each.name for each in fields(grpo_kernels.LossConfig)
    )


def test_flags_take_what_the_package_takes():
    tables = {
        "surrogate": SURROGATES,
        "ratio_level": RATIO_LEVELS,
        "kl_estimator": SAMPLED_KL,
        "aggregation": AGGREGATIONS,
        "importance_mode": ("truncate", "mask"),
        "importance_level": ("token", "sequence"),
    }
    types = get_type_hints(LossSettings)
    for name, table in tables.items():
        kinds = [each for each in get_args(types[name]) if each is not type(None)]
        assert list(get_args(kinds[0]) or kinds) == list(table), name


def test_no_named_loss_sets_what_has_a_default_of_its_own():
    plain = {name for name in SETTINGS_OF_LOSSES if getattr(LossSettings(), name) is not None}
    assert plain == {"beta", "kl_estimator"}
    for own in LOSSES.values():
        assert not plain & own.keys()


# A value of each setting that is not its default, and what it needs beside it.
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
}


@pytest.mark.parametrize("name", SETTINGS_OF_LOSSES)
def test_a_flag_sets_its_setting_and_no_other(name):
    value, needed = SET[name]
    flag = "--" + name.replace("_", "-")
    before = parse_command_line(needed).loss_fields()
    after = parse_command_line([*needed, flag, str(value)])
    expected = {**before, name: value}
    if name == "aggregation":
        del expected["max_completion_length"]
    assert after.loss_fields() == expected
    assert getattr(grpo_kernels.LossConfig(**after.loss_fields()), name) == value
    after.check_loss(grpo_kernels.LossConfig)


def test_a_fixed_length_is_the_longest_completion_unless_it_is_given():
    config = TrainConfig(aggregation="fixed_length", max_new_tokens=9)
    assert config.loss_fields()["max_completion_length"] == 9
    config = TrainConfig(loss="dr_grpo", max_completion_length=5, max_new_tokens=9)
    assert config.loss_fields()["max_completion_length"] == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"ratio_cap": 2.0},
            "--loss grpo: --ratio-cap is read by --surrogate 'cispo' or 'dppo' only, got 2.0 with "
            "--surrogate 'clip'",
        ),
        ({"delta": 1.1}, "--loss grpo: --delta must be greater than 1.2, got 1.1"),
        (
            {"loss": "kl_covariance"},
            "--loss kl_covariance: --kl-cov acts from a batch's second optimiser step on: set "
            "--inner-iterations or --minibatches above 1",
        ),
        (
            {"clip_cov": 0.1, "kl_cov": 0.1},
            "--loss grpo: --clip-cov and --kl-cov are two cures of one thing: set only one",
        ),
        (
            {"loss": "icepop", "importance_floor": 6.0},
            "--loss icepop: --importance-floor must be less than --importance-cap 5.0, got 6.0",
        ),
        ({"top_entropy": 1.5}, "--loss grpo: --top-entropy must be at most 1, got 1.5"),
    ],
)
def test_a_wrong_combination_is_one_line_that_names_the_flags(settings, said):
    with pytest.raises(UserError) as error:
        TrainConfig(**settings).check_loss(grpo_kernels.LossConfig)
    assert str(error.value) == said


def test_only_whole_names_become_flags():
    assert in_flags("betas of a kl_cov_coef=2") == "betas of a --kl-cov-coef 2"
