"""Rewards: values, scoring of several, and loading."""

import asyncio
import inspect
import math

import numpy as np
import pytest
import torch

from reference.training.errors import UserError
from reference.training.tasks import rewards
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import (
    WeightedReward,
    choose_rewards,
    load_function,
    score,
    total_reward,
)


def of(reward, completion, answer):
    (value,) = reward(["question"], [completion], [answer])
    return value


def scored(function, completions=("a", "b", "c")):
    n = len(completions)
    questions = [Question(f"question {i}", "x") for i in range(n)]
    return score({"mine": WeightedReward(function, 3.0)}, questions, list(completions))


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("12", "12", True),
        ("7 + 5 = 12", "12", True),
        ("7+5=12.", "12", True),
        ("12 is 7 + 5", "12", False),  # the last number counts
        ("The answer is 12!", "12", True),
        ("112", "12", False),
        ("12.5", "5", False),
        ("12.5", "12", False),
        ("1,024", "1024", True),
        ("1,024", "24", False),
        ("7-5", "5", True),  # a minus between numbers is no sign
        ("7 - 5 = -2", "-2", True),
        ("-2", "2", False),
        ("twelve", "12", False),
        ("", "12", False),
    ],
)
def test_last_number_is(completion, answer, right):
    assert of(rewards.last_number_is, completion, answer) == right


def test_exact_match():
    assert of(rewards.exact_match, " 654321\n", "654321") == 1.0
    assert of(rewards.exact_match, "6543210", "654321") == 0.0


def test_bare_sum_requires_the_right_answer():
    assert all(of(rewards.bare_sum, str(wrong), "12") == 0 for wrong in range(12))
    for right in ("12", "12.", "7 + 5 = 12", "7+5=12"):
        assert of(rewards.bare_sum, right, "12") == 1
    for wrong in ("It is 12", "7 + 6 = 12", "7 + 5 = 12\n\n7", "1 + 12", "0012"):
        assert of(rewards.bare_sum, wrong, "12") == 0


@pytest.mark.parametrize(
    ("completion", "marks"),
    [
        ("<think>It is in the west.</think><answer>Brasília</answer>", 4),
        ("<think></think>\n<answer>The capital is brasilia.</answer>", 4),
        ("<answer>Brasília</answer>", 3),
        ("<think>Brasília?</think><answer>Rio</answer>", 3),
        ("<think>no</think><answer>Rio</answer>", 2),
        ("<think>no</think>", 1),
        ("It is Brasília.", 1),
        ("</think>It is<think>", 0),
        ("<answer>Brasília", 1),
        ("Brasílias", 0),
        ("", 0),
    ],
)
def test_think_answer_adds_four_parts(completion, marks):
    assert of(rewards.think_answer, completion, "Brasília") == marks
    assert of(rewards.full_marks, completion, "Brasília") == (marks == 4)


def test_score_returns_unweighted_fp32_rewards_by_name():
    lengths = WeightedReward(lambda prompts, completions, answers: [len(c) for c in completions], 9)
    constant = WeightedReward(lambda prompts, completions, answers: (0.1, True))
    questions = [Question("p", "x"), Question("q", "y")]
    found = score({"length": lengths, "constant": constant}, questions, ["abc", ""])
    assert list(found) == ["length", "constant"]
    torch.testing.assert_close(found["length"], torch.tensor([3.0, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(found["constant"], torch.tensor([0.1, 1.0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "as_type", [torch.tensor, np.array, tuple, lambda v: [np.float32(x) for x in v]]
)
def test_reward_may_return_a_tensor_or_an_array(as_type):
    values = scored(lambda **columns: as_type([1.0, 2.0, 0.5]))["mine"]
    assert values.tolist() == [1.0, 2.0, 0.5] and values.dtype == torch.float32


def test_error_of_a_reward_names_the_sample():
    def fails_on_b(prompts, completions, answers):
        if "b" in completions:
            raise KeyError("no b")
        return [1.0] * len(completions)

    message = "'mine' raised KeyError: 'no b', for the completion 'b' to the question 'question 1'"
    with pytest.raises(UserError, match=message):
        scored(fails_on_b)


def test_error_of_a_whole_batch_names_the_first_sample():
    def fails_on_many(prompts, completions, answers):
        if len(completions) > 1:
            raise ValueError("one at\na time")
        return [1.0]

    with pytest.raises(UserError, match=r"ValueError: one at a time, .*'a'.*'question 0'"):
        scored(fails_on_many)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ([1.0], "1 values"),
        ({"a" * 1000: 1.0}, "{'a{198}…"),
        ([1.0] * 4, "4 values"),
        ([], "0 values"),
        (None, "None"),
        (1.5, "1.5"),
    ],
)
def test_wrong_number_of_values_raises(returned, got):
    message = f"'mine' returned {got}, not one for each of 3.*'a' to the question 'question 0'"
    with pytest.raises(UserError, match=message):
        scored(lambda **columns: returned)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39, 10**400, "good", [1.0]])
def test_non_finite_value_raises_with_its_sample(bad):
    with pytest.raises(UserError, match=r"'mine' gave .*'b' to the question 'question 1'") as error:
        scored(lambda **columns: [1.0, bad, 1.0])
    assert repr(bad)[:100] in str(error.value) and len(str(error.value)) < 300


def test_long_completions_are_shortened_in_the_message():
    with pytest.raises(UserError) as error:
        scored(lambda **columns: [math.nan], completions=["line\n" * 1000])
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_reward_that_exits_is_named_with_the_sample():
    def runs_the_completion(prompts, completions, answers):
        exec(completions[0])

    message = "'mine' raised SystemExit: 3, for the completion 'exit\\(3\\)'"
    with pytest.raises(UserError, match=message):
        scored(runs_the_completion, ["exit(3)"])


def test_reward_may_be_async():
    async def judge(completions):
        await asyncio.sleep(0)
        return [float(len(completion)) for completion in completions]

    assert scored(judge, ["a", "bcd"])["mine"].tolist() == [1.0, 3.0]


def test_reward_may_return_tensors_that_require_gradients(recwarn):
    values = scored(lambda **columns: [torch.ones((), requires_grad=True)] * 3)["mine"]
    assert values.tolist() == [1.0, 1.0, 1.0] and not recwarn.list


def test_user_error_of_a_reward_is_not_wrapped():
    def asks_for_more(prompts, completions, answers):
        raise UserError("install it")

    with pytest.raises(UserError, match=r"^install it$"):
        scored(asks_for_more)


def test_reward_cannot_change_the_inputs_of_the_next():
    def greedy(prompts, completions, answers):
        completions[:] = ["x"] * len(completions)
        return [0.0] * len(completions)

    both = {"greedy": WeightedReward(greedy), "exact": WeightedReward(rewards.exact_match)}
    assert score(both, [Question("p", "y")], ["y"])["exact"].tolist() == [1.0]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7+5?"}]


def received(function, questions, texts):
    """Call a reward that returns zeros; return the keyword arguments of the call."""
    calls = []

    def reward(**columns):
        calls.append(columns)
        return [0.0] * len(texts)

    reward.__signature__ = inspect.signature(function)
    score({"mine": WeightedReward(reward)}, questions, texts)
    return calls[0]


def test_reward_receives_the_columns_that_its_signature_names():
    questions = [Question("p", "x", {"level": 3, "topic": "a"}), Question("q", None, {"level": 4})]
    everything = {
        "prompts": ["p", "q"], "completions": ["c", "d"], "answer": ["x", None],
        "answers": ["x", None], "level": [3, 4], "topic": ["a", None],
    }  # fmt: skip
    assert received(lambda **columns: 0, questions, ["c", "d"]) == everything
    named = received(lambda completions, topic, answers, other=1: 0, questions, ["c", "d"])
    assert named == {name: everything[name] for name in ("completions", "topic", "answers")}
    assert received(lambda level, *, prompts: 0, questions, ["c", "d"]).keys() == {
        "level",
        "prompts",
    }


def test_conversation_reaches_rewards_as_messages():
    found = received(lambda prompts, completions: 0, [Question(CHAT), Question("p")], ["12", "d"])
    assert found["prompts"] == [CHAT, "p"]
    assert found["completions"] == [[{"role": "assistant", "content": "12"}], "d"]


def test_builtin_rewards_accept_text_and_messages():
    both = {
        name: WeightedReward(getattr(rewards, name))
        for name in ("exact_match", "gsm8k_lenient", "math_verify", "think_answer", "full_marks")
    }
    plain, chat = (
        score(both, [Question(prompt, "12")] * 2, ["12", "<answer>12</answer>"])
        for prompt in ("7+5?", CHAT)
    )
    assert {name: x.tolist() for name, x in plain.items()} == {
        name: x.tolist() for name, x in chat.items()
    }


def test_parameter_that_is_no_column_is_named_with_the_columns():
    def harsh(completions, dificulty):
        return [0.0]

    question = Question("p", "x", {"difficulty": 3})
    message = (
        r"reward 'harsh' has the parameter 'dificulty', but a reward receives difficulty, prompts, "
        r"completions, answer; did you mean difficulty\?"
    )
    with pytest.raises(UserError, match=message):
        score({"harsh": WeightedReward(harsh)}, [question], ["c"])


def test_reward_of_trl_is_called_as_in_trl():
    from trl.rewards import accuracy_reward, think_format_reward

    trl = {"right": WeightedReward(accuracy_reward), "form": WeightedReward(think_format_reward)}
    question = Question(CHAT, "12", {"solution": "12"})
    found = score(trl, [question] * 2, [r"<think>so</think>\boxed{12}", r"\boxed{13}"])
    assert found["right"].tolist() == [1.0, 0.0] and found["form"].tolist() == [1.0, 0.0]


def test_reward_cannot_change_a_question():
    def greedy(prompts, completions, tags):
        prompts[0].append("x")
        tags[0].append("x")
        return [0.0] * len(completions)

    question = Question(list(CHAT), "x", {"tags": ["a"]})
    score({"greedy": WeightedReward(greedy)}, [question], ["c"])
    assert question == Question(CHAT, "x", {"tags": ["a"]})


def test_reward_that_does_not_apply_is_left_out_of_the_sum():
    weighted = {
        "some": WeightedReward(lambda completions: [None, 1.0, None], 2.0),
        "all": WeightedReward(lambda completions: [1.0, 1.0, None]),
    }
    by_name = score(weighted, [Question("p")] * 3, ["a", "b", "c"])
    assert by_name["some"].isnan().tolist() == [True, False, True]
    total = total_reward(weighted, by_name)
    assert total[:2].tolist() == [1.0, 3.0] and total[2].isnan()


def test_builtin_reward_without_a_ground_truth_does_not_apply():
    for name in ("exact_match", "think_answer", "full_marks", "math_verify"):
        assert of(getattr(rewards, name), "12", None) is None


def test_score_of_no_completions_is_empty():
    assert scored(rewards.exact_match, completions=[])["mine"].tolist() == []


def test_load_function_by_dotted_path():
    assert load_function("reference.training.tasks.rewards.exact_match") is rewards.exact_match


def test_load_function_from_a_file_with_dataclasses(tmp_path):
    (tmp_path / "math.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Weights:\n    each: float = 0.25\n"
        "def length(prompts, completions, answers):\n"
        "    return [Weights().each * len(c) for c in completions]\n"
    )
    assert of(load_function(f"{tmp_path}/math.py:length"), "abcd", "") == 1.0
    assert math.sqrt(4) == 2 and __import__("math") is math


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nothing", "package.module.function or file.py:function"),
        ("file.py:", "package.module.function or file.py:function"),
        ("no/such/file.py:f", "no file no/such/file.py"),
        ("no_such_package.f", "importing no_such_package raised ModuleNotFoundError"),
        (
            "reference.training.tasks.rewards.nope",
            "reference.training.tasks.rewards has no function 'nope'",
        ),
        (
            "reference.training.tasks.rewards.Reward.x",
            "importing reference.training.tasks.rewards.Reward raised",
        ),
        ("reference.training.tasks.data.HELD_OUT", "has no function 'HELD_OUT'"),
    ],
)
def test_load_function_errors(path, says):
    with pytest.raises(UserError, match=says):
        load_function(path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("mine.py", "reward 'mine.py': name a function of the file, mine.py:short or mine.py:long"),
        ("broken.py", "reward 'broken.py': name a function of the file, broken.py:function"),
        ("/:f", "reward '/:f': there is no file /"),
        ("mime.py", "reward 'mime.py': there is no file mime.py; did you mean mine.py?"),
        ("mime.py:short", "'mime.py:short': there is no file mime.py; did you mean mine.py?"),
        (
            "mine.py:shrot",
            "reward 'mine.py:shrot': mine.py has no function 'shrot'; did you mean short?",
        ),
    ],
)
def test_functions_and_files_nearby_are_suggested(path, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def short():\n    1\ndef long():\n    _help()\ndef _help(): 0"
    )
    (tmp_path / "broken.py").write_text("def")
    with pytest.raises(UserError) as error:
        load_function(path)
    assert str(error.value).endswith(says)


@pytest.mark.parametrize(
    ("code", "says"), [("1 / 0", "ZeroDivisionError"), ("exit('usage')", "SystemExit: usage")]
)
def test_file_that_raises_on_import_is_named(code, says, tmp_path):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UserError, match=rf"importing .*broken.py raised {says}"):
        load_function(f"{tmp_path}/broken.py:f")


OWN = {
    "correct": WeightedReward(rewards.last_number_is),
    "format": WeightedReward(rewards.gsm8k_strict, 0.2),
}


def test_choose_rewards_changes_weights_and_adds_rewards(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def zero(prompts, completions, answers):\n    return [0.0]\n"
    )
    more = ["reference.training.tasks.rewards.exact_match", f"{tmp_path}/mine.py:zero=-0.5"]
    found = choose_rewards(OWN, more, ["format=0"])
    weights = {name: each.weight for name, each in found.items()}
    assert weights == {"correct": 1.0, "format": 0.0, "exact_match": 1.0, "zero": -0.5}
    assert found["exact_match"].function is rewards.exact_match
    assert found["format"].function is rewards.gsm8k_strict
    assert choose_rewards(OWN, [], []) == OWN


@pytest.mark.parametrize(
    ("more", "weights", "says"),
    [
        ([], ["style=1"], "--reward-weight style=1: expected name=weight .* correct, format"),
        ([], ["format"], "expected name=weight"),
        ([], ["format=much"], "the weight must be a finite number; got 'much'"),
        (
            ["reference.training.tasks.rewards.exact_match=nan"],
            [],
            "must be a finite number; got 'nan'",
        ),
        (["reference.training.tasks.rewards.exact_match="], [], "must be a finite number; got ''"),
        (
            ["reference.training.tasks.rewards.exact_match"] * 2,
            [],
            "already a reward named 'exact_match'",
        ),
        (["nothing=2"], [], "'nothing' is no reward"),
    ],
)
def test_choose_rewards_errors(more, weights, says):
    with pytest.raises(UserError, match=says):
        choose_rewards(OWN, more, weights)
