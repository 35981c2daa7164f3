"""Extraction of final answers and comparison with the ground truth."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.training.errors import UserError
from reference.training.tasks import answers


@pytest.mark.parametrize(
    ("completion", "lenient", "strict"),
    [
        ("6 * 3 = 18\n#### 18", True, True),
        ("#### 18", True, True),
        ("#### 18\n", True, True),
        ("#### 18.00", True, True),
        ("18", True, False),
        ("It costs $18.", True, False),
        ("#### $18", True, False),
        ("#### 18 and 5", False, False),
        ("#### 18\nThat was 5 too many", True, False),
        (r"so \boxed{18} of 20", True, False),
        (r"\boxed{\frac{36}{2} = 18} of 20", True, False),
        ("#### Step 2\nThus 18", True, False),  # a heading is no answer
        ("#### 17\n#### 18", True, True),
        ("#### 18\n#### 17", False, False),
        ("<answer>18</answer> of 20", True, False),
        ("18 of 20", False, False),
        ("", False, False),
    ],
)
def test_gsm8k_answers(completion, lenient, strict):
    assert answers.number_is(completion, "18") is lenient
    assert answers.last_line_is(completion, "18") is strict


def test_numbers_are_compared_by_value():
    assert answers.number_is("1,024.0", "1024")
    assert answers.number_is("-0.50", "-0.5")
    assert not answers.number_is("1024", "24")
    assert answers.is_number("1,024") and answers.is_number("-3.5")
    assert not answers.is_number("3,4") and not answers.is_number("x")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{5", None),
        ("5", None),
        (r"\boxed{", None),
    ],
)
def test_boxed_matches_nested_braces(text, inside):
    assert answers.boxed(text) == inside


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        ("The answer is 1/2.", r"\frac{1}{2}", True),
        ("1 + x", "x+1", True),
        ("<answer>1 + x</answer>", "x+1", True),
        ("So it is\n$x^{2} + 2x + 1$", "(x+1)^2", True),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
        ("x", "x+1", False),
        ("1", "x+1", False),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", False),
        ("brasilia.", "Brasília", True),
        ("Let me see.\nBrasília", "Brasília", True),
        ("<answer>Brasília</answer>, not Rio", "Brasília", True),
        ("Not Brasília", "Brasília", False),
        ("apollo 11", "Apollo 11", True),
        ("Apollo 12", "Apollo 11", False),
        ("The sum is 1,024", "1024", True),
        ("B", "B", True),
        ("", "Brasília", False),
    ],
)
def test_answers_are_compared_as_numbers_mathematics_or_words(completion, answer, right):
    assert answers.answer_is(completion, answer) is right


def test_numbers_and_words_do_not_need_math_verify():
    code = (
        "import sys; sys.modules['math_verify'] = None\n"
        "from reference.training.tasks.answers import answer_is\n"
        "assert answer_is('it is 12', '12') and not answer_is('it is 13', '12')\n"
        "assert answer_is('paris', 'Paris') and not answer_is('Rome', 'Paris')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_math_verify_raises_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"math-verify: pip install \"grpo_kernels\[tasks\]\""):
        answers.answer_is("1 + x", "x+1")


@pytest.mark.parametrize(
    ("text", "answer", "there"),
    [
        ("It is 12.", "12", True),
        ("It is 12.0 or 5", "12", True),
        ("It is 112", "12", False),
        ("It is 12.5", "12", False),
        ("Sao  Paulo!", "São Paulo", True),
        ("C++ is it", "C++", True),
        ("Pariser", "Paris", False),
    ],
)
def test_mentions_matches_whole_words_and_numbers(text, answer, there):
    assert answers.mentions(text, answer) is there


@given(st.integers(-(10**9), 10**9))
def test_last_number_finds_every_integer(n):
    for text in (f"{n}", f"{n:,}", f"it is {n}.", f"####  {n:,}", rf"\boxed{{{n}}} of 7"):
        assert answers.number_is(text, str(n))
