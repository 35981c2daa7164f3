"""The primitives of argument checks: accepted values, and every error message."""

import inspect
import re

import numpy as np
import pytest
import torch

import grpo_kernels
from grpo_kernels import (
    LossConfig,
    distillation_loss,
    grpo_loss,
    linear_distillation_loss,
    linear_grpo_loss,
    policy_loss,
    token_stats,
)
from grpo_kernels.validation import (
    expect_choice,
    expect_finite,
    expect_flag,
    expect_mask,
    expect_number,
    expect_temperature,
    expect_tensor,
    expect_token_ids,
    expect_tokens,
    nearest,
    suggest_keywords,
    values_are_readable,
)

X = torch.zeros(2, 3)


def assert_raises(error, message, check, *arguments, **keywords):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check(*arguments, **keywords)


def test_expect_choice():
    expect_choice("kl", "forward", ("forward", "reverse"))
    expect_choice("kl", "forward", {"forward": 1})
    for value in ("k3", None):
        message = f"kl must be one of 'forward', 'reverse', got {value!r}"
        assert_raises(ValueError, message, expect_choice, "kl", value, ("forward", "reverse"))


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2)])
def test_expect_number_accepts_numbers(value):
    expect_number("x", value)
    expect_number("x", value, at_least=2, at_most=2, above=1, below=3)


@pytest.mark.parametrize("value", [2, np.int64(2)])
def test_expect_number_accepts_integers(value):
    expect_number("x", value, integer=True)


@pytest.mark.parametrize(
    ("error", "value", "keywords", "message"),
    [
        (TypeError, "2", {}, "x must be a number, got str"),
        (TypeError, None, {}, "x must be a number, got NoneType"),
        (TypeError, True, {}, "x must be a number, got bool"),
        (TypeError, torch.tensor(2.0), {}, "x must be a number, got Tensor"),
        (TypeError, 2.0, {"integer": True}, "x must be an integer, got float"),
        (TypeError, True, {"integer": True}, "x must be an integer, got bool"),
        (ValueError, float("nan"), {}, "x must be finite, got nan"),
        (ValueError, float("-inf"), {}, "x must be finite, got -inf"),
        (ValueError, 10**309, {}, f"x must be finite, got {10**309}"),
        (ValueError, 1.5, {"at_least": 2}, "x must be at least 2, got 1.5"),
        (ValueError, 2, {"above": 2}, "x must be greater than 2, got 2"),
        (ValueError, 3, {"at_most": 2.5}, "x must be at most 2.5, got 3"),
        (ValueError, 2, {"below": 2}, "x must be less than 2, got 2"),
    ],
)
def test_expect_number_messages(error, value, keywords, message):
    assert_raises(error, message, expect_number, "x", value, **keywords)


def test_expect_flag():
    for value in (True, False):
        expect_flag("entropy", value)
    for value in (None, 1, "yes", torch.tensor(True)):
        message = f"entropy must be True or False, got {type(value).__name__}"
        assert_raises(TypeError, message, expect_flag, "entropy", value)


def test_expect_tensor_accepts_tensors():
    expect_tensor("x", torch.zeros(0, dtype=torch.int32))
    expect_tensor("x", X, floating=True, shape=(2, 3), dims=(2, 3), device_of=X)
    expect_tensor("x", torch.nn.Parameter(X), shape=X.shape)


@pytest.mark.parametrize(
    ("error", "value", "keywords", "message"),
    [
        (TypeError, [1.0], {}, "x must be a tensor, got list"),
        (TypeError, None, {}, "x must be a tensor, got NoneType"),
        (TypeError, X.long(), {"floating": True}, "x must be floating point, got torch.int64"),
        (
            TypeError,
            X.to(torch.float8_e4m3fn),
            {"floating": True},
            "x must be fp16, bf16, fp32 or fp64, got torch.float8_e4m3fn",
        ),
        (
            ValueError,
            X,
            {"dims": (1, 3), "layout": "[B, T, V] or packed [N]"},
            "x must be [B, T, V] or packed [N], got shape (2, 3)",
        ),
        (ValueError, X, {"shape": (3, 2)}, "x must have shape (3, 2), got shape (2, 3)"),
        (
            ValueError,
            X,
            {"shape": torch.Size([2])},
            "x must have shape (2,), got shape (2, 3)",
        ),
        (ValueError, X, {"device_of": X.to("meta")}, "x must be on meta, got cpu"),
    ],
)
def test_expect_tensor_messages(error, value, keywords, message):
    assert_raises(error, message, expect_tensor, "x", value, **keywords)


def test_expect_finite():
    expect_finite("x", X)
    expect_finite("x", X.long())
    expect_finite("x", torch.zeros(0))
    for value in (float("nan"), float("inf")):
        bad = torch.tensor([0.0, value])
        assert_raises(ValueError, "x must be finite, got NaN or infinity", expect_finite, "x", bad)


def test_expect_mask():
    expect_mask(None, X)
    for dtype in (torch.bool, torch.int64, torch.float32):
        expect_mask(torch.tensor([[0, 1, 1]]).to(dtype), X[:1])
    message = "mask must have shape (3, 2), got shape (2, 3)"
    assert_raises(ValueError, message, expect_mask, X, X.reshape(3, 2))
    assert_raises(TypeError, "mask must be a tensor, got list", expect_mask, [1, 0], X[0])
    for bad, got in (([0, 2], "2"), ([0.5, 1.0], "0.5"), ([1.0, float("nan")], "nan")):
        message = f"mask must be bool or hold only 0 and 1, got {got}"
        assert_raises(ValueError, message, expect_mask, torch.tensor(bad), X[0, :2])


def test_expect_tokens():
    for dtype in (torch.uint8, torch.int32, torch.int64):
        expect_tokens(torch.zeros(2, dtype=dtype), X)
    ids = torch.zeros(2, dtype=torch.int64)
    for bad, error, message in (
        ([0, 1], TypeError, "tokens must be a tensor, got list"),
        (ids.float(), TypeError, "tokens must be integer ids, got torch.float32"),
        (ids.bool(), TypeError, "tokens must be integer ids, got torch.bool"),
        (
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            "tokens must have shape (2,), that of hidden without the last dimension, "
            "got shape (3,)",
        ),
        (ids.to("meta"), ValueError, "tokens must be on cpu, got meta"),
    ):
        assert_raises(error, message, expect_tokens, bad, X, "hidden")


def test_expect_token_ids():
    ids, mask = torch.tensor([0, 4, -100]), torch.tensor([1, 1, 0])
    expect_token_ids(ids, mask, 5)
    expect_token_ids(ids.to("meta"), None, 5)
    message = "tokens must lie in [0, 5) where they are not masked, got -100"
    assert_raises(ValueError, message, expect_token_ids, ids, None, 5)
    message = "tokens must lie in [0, 4) where they are not masked, got 4"
    assert_raises(ValueError, message, expect_token_ids, ids, mask, 4)


def test_expect_temperature():
    tokens, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0]]).expand(2, 3)
    for temperature in (1, 0.7, torch.tensor(0.7), torch.ones(3), torch.ones(2, 1)):
        expect_temperature(temperature, tokens, None)
    expect_temperature(torch.tensor([1.0, 1.0, 0.0]), tokens, mask)
    unmasked = "temperature must be greater than 0 for every unmasked token"
    for bad, error, message in (
        ("hot", TypeError, "temperature must be a number, got str"),
        (0, ValueError, "temperature must be greater than 0, got 0"),
        (torch.tensor(1), TypeError, "temperature must be floating point, got torch.int64"),
        (torch.ones(2, device="meta"), ValueError, "temperature must be on cpu, got meta"),
        (
            torch.ones(2),
            ValueError,
            "temperature must broadcast to shape (2, 3), got shape (2,)",
        ),
        (torch.tensor([1.0, 0.0, 1.0]), ValueError, unmasked),
        (torch.tensor(torch.nan), ValueError, unmasked),
    ):
        assert_raises(error, message, expect_temperature, bad, tokens, mask)


def test_values_are_not_read_on_devices_or_under_compile():
    assert values_are_readable(X) and not values_are_readable(X.to("meta"))
    expect_finite("x", X.to("meta"))
    expect_mask(X.to("meta"), X.to("meta"))

    def check(x):
        expect_finite("x", x)
        expect_mask(x, x)
        return x + 1

    compiled = torch.compile(check, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([torch.nan])).isnan()


@pytest.mark.parametrize(
    ("function", "keyword", "value", "meant"),
    [
        (LossConfig, "epsilon", 0.2, "epsilon_low and epsilon_high"),
        (LossConfig, "epsilon_hi", 0.2, "epsilon_high"),
        (LossConfig, "clip_ratio_low", 0.2, "epsilon_low"),
        (LossConfig, "importance_sampling_level", "token", "ratio_level"),
        (LossConfig, "loss", "dapo", "LossConfig.dapo()"),
        (LossConfig, "loss_type", "dr_grpo", "LossConfig.dr_grpo()"),
        (LossConfig.dapo, "kl_coef", 0.1, "beta"),
        (LossConfig.gspo, "entropy_coeff", 0.1, "entropy_coef"),
        (policy_loss, "old_logprobs", None, "old_logprob"),
        (policy_loss, "old_per_token_logps", None, "old_logprob"),
        (policy_loss, "ref_logps", None, "ref_logprob"),
        (policy_loss, "old_log_prob", None, "old_logprob"),
        (policy_loss, "response_mask", None, "mask"),
        (policy_loss, "rollout_log_probs", None, "sampling_logprob"),
        (policy_loss, "beta", 0.1, "config=LossConfig(beta=...)"),
        (policy_loss, "epsilon", 0.1, "config=LossConfig(epsilon_low=..., epsilon_high=...)"),
        (policy_loss, "loss_type", "dapo", "config=LossConfig.dapo()"),
        (grpo_loss, "attention_mask", None, "mask"),
        (grpo_loss, "labels", None, "tokens"),
        (grpo_loss, "in_place", True, "inplace"),
        (linear_grpo_loss, "ref_logps", None, "ref_logprob"),
        (linear_grpo_loss, "hidden_states", None, "hidden"),
        (linear_grpo_loss, "chunk_size", None, "chunk_tokens"),
        (linear_grpo_loss, "token_row", None, "token_rows"),
        (linear_grpo_loss, "rows", None, "token_rows"),
        (linear_grpo_loss, "lora", None, "adapter"),
        (token_stats, "ref_logit", None, "ref_logits"),
        (distillation_loss, "beta", 0.5, "jsd_weight"),
        (distillation_loss, "weights", None, "token_weights"),
        (linear_distillation_loss, "weights", None, "token_weights"),
    ],
)
def test_unknown_keyword_suggests_the_right_one(function, keyword, value, meant):
    with pytest.raises(TypeError) as error:
        function(**{keyword: value})
    said = f"() got an unexpected keyword argument {keyword!r}; did you mean {meant}?"
    assert str(error.value).endswith(said)


def test_nearest():
    assert nearest("gpro", ["gspo", "grpo", "gmpo"]) == ["grpo"]
    assert nearest("DAPO", ["grpo", "dapo"]) == ["dapo"]
    assert nearest("flavour", ["grpo", "dapo"]) == []


def test_keyword_like_no_other_gets_no_suggestion():
    with pytest.raises(TypeError) as error:
        grpo_loss(flavour="sweet")
    assert str(error.value) == "grpo_loss() got an unexpected keyword argument 'flavour'"


FUNCTIONS = [
    name for name in grpo_kernels.__all__ if inspect.isfunction(getattr(grpo_kernels, name))
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_suggest_keywords_and_keep_their_signature(name):
    function = getattr(grpo_kernels, name)
    first = next(iter(inspect.signature(function).parameters))
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an .* '{first}_'; did you mean {first}\?"
    ):
        function(**{f"{first}_": None})
    assert function.__doc__ and function.__name__ == name
    assert function.__module__.startswith("grpo_kernels.")


def test_errors_of_the_function_itself_are_its_own():
    @suggest_keywords
    def add(x: int, y: int) -> int:
        return x + y

    assert add(1, y=2) == 3
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'y'$"):
        add(1)
    with pytest.raises(TypeError, match=r"unsupported operand"):
        add(1, y="2")


def test_suggest_keywords_compiles_fullgraph():
    @suggest_keywords
    def add(x: torch.Tensor, *, y: float = 1.0) -> torch.Tensor:
        return x + y

    compiled = torch.compile(add, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), X + 1)
    assert torch.equal(compiled(X, y=2.0), X + 2)
