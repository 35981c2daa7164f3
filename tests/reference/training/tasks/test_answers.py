"""Extraction of final answers and comparison with the ground truth."""

import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.training.errors import UserError
from reference.training.tasks import answers, math_judge

# Repeated up to a million characters.
ODD = [
    "{",
    "\\boxed{",
    "\\(",
    "$",
    "**",
    "<answer>",
    "#### 1\n",
    "1,",
    "1 or ",
    "=1",
    "-",
    ".",
    " ",
]
ODD += [
    "\t\n",
    "is ",
    "the answer is ",
    "é",
    "か\u3099",
    "\ud800",
    "\0",
    "\u202e",
    "x",
    "9",
    "5 km ",
]

# What a person would say: completion, ground truth, whether it is right.
JUDGED = {
    "last number of prose": [
        ("The sum is 1,024", "1024", True),
        ("So the total is 42.", "42", True),
        ("She has 42 apples left.", "42", True),
        ("First 3 + 4 = 7, then 7 * 6 = 42", "42", True),
        ("First 3 + 4 = 7, then 7 * 6 = 42", "7", False),
        ("6*7=42", "42", True),
        ("x = -5", "-5", True),
        ("It emits 5 kg of CO2.", "5", True),
        ("It emits 5 kg of CO2.", "2", False),
        ("I am not sure. It is 42!", "42", True),
        ("", "42", False),
        ("I don't know", "42", False),
        ("There are 7 cats and 42 dogs.", "42", True),
        ("18 of 20", "18", False),
    ],
    "parts of something else": [
        (r"\boxed{\frac{1}{2}}", "2", False),
        (r"\boxed{1/2}", "2", False),
        (r"\boxed{3\sqrt{2}}", "2", False),
        (r"The answer is $3\sqrt{2}$.", "2", False),
        (r"\boxed{7, 42}", "42", False),
        ("The roots are 7, 42.", "42", False),
        (r"\boxed{x^2}", "2", False),
        (r"\boxed{x^{42}}", "42", False),
        (r"\boxed{\pm 5}", "5", False),
        (r"\boxed{5 + x}", "5", False),
        ("The answer is .5", "5", False),
        ("1e5", "5", False),
        ("−5", "5", False),
        ("It is 7-42", "42", False),
        ("between 7 and 42", "42", False),
        ("7–42", "42", False),
        ("7 to 42", "42", False),
        ("42 or 43", "42", False),
        ("42 or 43", "43", False),
        (r"\boxed{42} or \boxed{43}", "43", False),
        ("The version is 1.2.42", "42", False),
        ("192.168.0.42", "42", False),
        ("2024-05-01", "1", False),
        ("It is 12:30", "30", False),
        ("H2O", "2", False),
        ("The area is 5 m^2.", "2", False),
        ("The answer is 3 + 4", "4", False),
        ("x > 5", "5", False),
        (r"\boxed{(3, 5)}", "5", False),
        ("3:4", "4", False),
    ],
    "forms of a number": [
        (r"\boxed{1{,}234}", "1234", True),
        (r"\boxed{1\,234}", "1234", True),
        (r"\boxed{1,\!234}", "1234", True),
        ("It costs 1 234 in all", "1234", True),
        ("1\u202f234\u202f567", "1234567", True),
        ("1.234,5", "1234.5", True),
        ("Die Antwort ist 3,5.", "3.5", True),
        ("1,234", "1.234", False),
        ("12,34,567", "1234567", True),
        (".5", "0.5", True),
        ("5.", "5", True),
        ("5.0", "5", True),
        ("−5", "-5", True),
        ("–5", "-5", True),
        ("－5", "-5", True),
        ("+5", "5", True),
        ("-0", "0", True),
        ("(5)", "5", True),
        (r"\boxed{(-5)}", "-5", True),
        ("４２", "42", True),
        ("٤٢", "42", True),
        ("1e5", "100000", True),
        (r"\boxed{1.5 \times 10^{3}}", "1500", True),
        ("1.5 × 10³", "1500", True),
        ("6.02e23", "602000000000000000000000", True),
        ("2.5 x 10^-3", "0.0025", True),
        (r"\boxed{10^5}", "100000", True),
        ("100000000000000000000", "1e+20", True),
        ("1.5 million", "1500000", True),
        ("2 billion", "2000000", False),
        ("9" * 400, "9" * 400, True),
        ("9" * 400, "9" * 399 + "8", False),
        ("1e1000000000", "1e999999999", False),
        ("1e400", "1" + "0" * 400, True),
        ("42", "4.2e1", True),
        ("0.3", "0.30000001", False),
        ("007", "7", True),
        ("33", "033", True),
    ],
    "fractions": [
        (r"\boxed{\frac{84}{2}}", "42", True),
        (r"\boxed{\dfrac{1}{2}}", "0.5", True),
        (r"\boxed{\frac12}", "0.5", True),
        (r"\boxed{-\tfrac{1}{2}}", "-0.5", True),
        ("1/2", "0.5", True),
        ("½", "0.5", True),
        ("3½", "3.5", True),
        (r"\boxed{3\frac{1}{2}}", "3.5", True),
        ("3 1/2", "7/2", True),
        ("0.5", "1/2", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        ("The answer is 1/2.", r"\frac{1}{2}", True),
        ("The answer is $\\frac{2}{4}$.", r"\frac{1}{2}", True),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", False),
        (r"\boxed{0.333}", r"\frac{1}{3}", False),
        (r"\boxed{0.333333}", r"\frac{1}{3}", True),
        (r"\boxed{\frac{1}{0}}", "1", False),
        (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}", True),
    ],
    "percent": [
        ("50", "50%", True),
        ("50%", "50", True),
        (r"\boxed{50\%}", "50%", True),
        ("50 percent", "50%", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("0.5%", "50%", False),
        ("0.5%", "0.5", True),
        ("0.5", "50", False),
        ("5%", "50%", False),
        ("The probability is 12.5%.", r"\frac{1}{8}", True),
    ],
    "money": [
        ("$5.00", "5", True),
        ("-$5", "-5", True),
        ("$-5", "-5", True),
        ("$5", "-5", False),
        (r"\boxed{\$5}", "5", True),
        ("5 dollars", "5", True),
        ("5 dollars", "$5", True),
        ("USD 5", "$5", True),
        ("€5", "$5", False),
        ("5 €", "€5", True),
        ("5 euros", "€5", True),
        ("The total is $1,234.50.", "1234.5", True),
        ("5", "$5", True),
        ("$5 million", "$5,000,000", True),
        ("It costs $5 and not $6.", "5", True),
    ],
    "units": [
        ("5 m", "5 km", False),
        ("5 km", "5", True),
        ("5", "5 km", True),
        ("5km", "5 km", True),
        ("5 kilometers", "5 km", True),
        ("5000 m", "5 km", True),
        ("5000", "5 km", False),
        ("6 km", "5 km", False),
        (r"\boxed{5 \text{ km}}", "5 km", True),
        (r"\boxed{5\,\mathrm{cm}^2}", "5 cm^2", True),
        ("5 cm²", "5 cm^2", True),
        ("5 square centimeters", "5 cm^2", True),
        ("5 cm", "5 cm^2", False),
        ("The area is 5 m^2.", "5", True),
        ("60 km/h", "60 kilometers per hour", True),
        ("60 km", "60 km/h", False),
        ("60 minutes", "1 hour", True),
        ("90°", "90", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{90^{\circ}}", "90 degrees", True),
        ("25 °C", "25 °F", False),
        ("5 apples", "5", True),
        ("5", "5 apples", True),
        ("5 oranges", "5 apples", False),
        ("She has 5 apples.", "5 apples", True),
        ("5 mW", "5 MW", False),
    ],
    "marks": [
        (r"\fbox{42} 3", "42", True),
        (r"\boxed 5", "5", True),
        (r"\boxed{ 42 } of 50", "42", True),
        (r"I think \boxed{41}. No: \boxed{42}", "42", True),
        (r"I think \boxed{41}. No: \boxed{42}", "41", False),
        (r"\boxed{x = 42}", "42", True),
        (r"\boxed{42 \text{ apples}}", "42", True),
        (r"\boxed{\text{Paris}}", "Paris", True),
        (r"$$\boxed{42}$$", "42", True),
        ("6 * 7\n#### 42", "42", True),
        ("#### 42\nThat was 5 too many", "42", True),
        ("#### Step 2\nThus 18", "18", True),
        ("because\n#### Paris", "Paris", True),
        ("<answer>42</answer> of 50", "42", True),
        ("<answer>The total is 42 apples.</answer>", "42", True),
        (r"<answer>\boxed{42}</answer>", "42", True),
        ("The answer is 42, since 50 - 8 is not 43", "42", True),
        ("**Answer:** 42\n\nThis took 3 steps.", "42", True),
        ("Final answer: 42 (from 7 * 6)", "42", True),
        ("So the total is **42** for all 3 people.", "42", True),
        ("`42`", "42", True),
        ("The answer is 42. Wait, actually it is 43.", "43", True),
        ("The answer is 42. Wait, actually it is 43.", "42", False),
        ("The answer is not 42.", "42", False),
        ("Die Antwort ist 42, denn 6 mal 7 ist nicht 41.", "42", True),
        ("答案是42。", "42", True),
        ("La respuesta es 42.", "42", True),
        ("La réponse est 42 et pas 43.", "42", True),
        ("Ответ: 42", "42", True),
        ("答えは42です", "42", True),
        ("<answer>Brasília</answer>, not Rio", "Brasília", True),
        (r"We find $x = \frac{84}{2} = 42$.", "42", True),
        (r"\[ x = 42 \]", "42", True),
    ],
    "codes": [
        ("192.168.0.1", "192.168.0.2", False),
        ("The server is 192.168.0.1.", "192.168.0.1", True),
        ("2018", "2024-05-01", False),
        ("2024-05-01", "2024-05-01", True),
        ("May 1, 2024", "2024-05-01", True),
        ("2024-05-02", "2024-05-01", False),
        ("12:30", "12:30", True),
        ("12:30", "12:45", False),
        ("2:30 PM", "14:30", True),
        ("2:30 AM", "2:30 PM", False),
        ("1.2.3", "1.2.3", True),
        ("1.2.4", "1.2.3", False),
        ("H2O", "H2O", True),
        ("H₂O", "H2O", True),
        (r"\boxed{\mathrm{H_2O}}", "H2O", True),
        ("H2O2", "H2O", False),
        ("OH2", "H2O", False),
        ("e4", "e4", True),
        ("4e", "e4", False),
        ("Nf3", "Nf3", True),
        ("Ng3", "Nf3", False),
        ("O-O", "O-O", True),
        ("978-3-16-148410-0", "978-3-16-148410-0", True),
        ("9783161484100", "978-3-16-148410-0", True),
        ("978-3-16-148410-1", "978-3-16-148410-0", False),
        ("555-123-4567", "(555) 123-4567", True),
        ("COVID-19", "COVID-19", True),
        ("COVID-18", "COVID-19", False),
        ("A-12", "A-21", False),
        ("10-20", "10–20", True),
        ("-10", "10-20", False),
        ("3:4", "4:3", False),
        ("0x1F", "0x1F", True),
        ("0x1F", "0x2F", False),
        ("Ca²⁺", "Ca^{2+}", True),
        ("Ca³⁺", "Ca^{2+}", False),
    ],
    "lists, tuples, sets and intervals": [
        ("(1, 2)", "(1, 2)", True),
        ("(2, 1)", "(1, 2)", False),
        (r"\boxed{\left(1, \frac{1}{2}\right)}", "(1, 0.5)", True),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
        (r"\boxed{\{2, 3\}}", r"\{1, 2\}", False),
        ("{1, 2}", "{2, 1}", True),
        ("5, 3", "3, 5", True),
        ("3 and 5", "3, 5", True),
        (r"\boxed{3}, \boxed{5}", "3, 5", True),
        ("x = 3 or x = 5", "3, 5", True),
        ("3", "3, 5", False),
        ("3, 5, 7", "3, 5", False),
        ("[1, 2, 3]", "[1, 2, 3]", True),
        ("[3, 2, 1]", "[1, 2, 3]", False),
        ("[0, 1]", "[0, 1)", False),
        (r"\boxed{[0, \infty)}", r"[0, \infty)", True),
        ("[0, ∞)", r"[0, \infty)", True),
        ("red, green and blue", "red, green, blue", True),
        ("1,2,3", "1, 2, 3", True),
        ("The roots are 3 and 5.", "3, 5", True),
    ],
    "words": [
        ("brasilia.", "Brasília", True),
        ("Let me see.\nBrasília", "Brasília", True),
        ("Not Brasília", "Brasília", False),
        ("The capital is Brasília.", "Brasília", True),
        ("The capital is not Brasília.", "Brasília", False),
        ("**Paris**", "Paris", True),
        ('"Paris"', "Paris", True),
        ("PARIS!", "Paris", True),
        ("Paris or Rome", "Paris", False),
        ("Rome", "Paris", False),
        ("The capital of France is **Paris**.", "Paris", True),
        ("Paris is the capital of France.", "Paris", True),
        ("apollo 11", "Apollo 11", True),
        ("Apollo 12", "Apollo 11", False),
        ("the Eiffel Tower", "Eiffel Tower", True),
        ("Simon and Garfunkel", "Simon & Garfunkel", True),
        ("O’Brien", "O'Brien", True),
        ("C++", "C++", True),
        ("C", "C++", False),
        ("", "Brasília", False),
        ("Sao Paulo", "São Paulo", True),
        ("Tromso", "Tromsø", True),
        ("STRASSE", "Straße", True),
        ("Istanbul", "İstanbul", True),
        ("Αθηνα", "Αθήνα", True),
        ("елка", "ёлка", True),
        ("мои", "мой", False),
        ("かき", "がき", False),
        ("がき", "か\u3099き", True),
        ("ｶﾞｷ", "ガキ", True),
        ("ข้าว", "ขาว", False),
        ("कि", "की", False),
        ("שָׁלוֹם", "שלום", False),
        ("서울", "서울", True),
        ("수도는 서울입니다.", "서울", True),
        ("答案是北京。", "北京", True),
        ("東京です。", "東京", True),
        ("La capital es Madrid.", "Madrid", True),
        ("Die Hauptstadt ist Berlin.", "Berlin", True),
        ("C'est Paris.", "Paris", True),
    ],
    "yes or no": [
        ("Yes", "yes", True),
        ("Yes, because 7 is prime.", "Yes", True),
        ("No, because 9 = 3 * 3.", "Yes", False),
        ("7 has no divisors.\nSo yes.", "Yes", True),
        ("The answer is yes.", "Yes", True),
        ("Yes or no", "Yes", False),
        ("True", "Yes", True),
        ("Sí, porque es primo.", "Sí", True),
        ("\\boxed{\\text{No}}", "No", True),
        ("Yesterday", "Yes", False),
        ("Norway", "No", False),
        ("Yes, it seems so, but it is even. The answer is no.", "Yes", False),
    ],
    "multiple choice": [
        ("B", "B", True),
        ("(B)", "B", True),
        ("B)", "B", True),
        ("b", "B", True),
        ("B. Paris", "B", True),
        ("(B) Paris", "B", True),
        ("The answer is B", "B", True),
        ("The correct answer is (B) Paris.", "B", True),
        ("Option B", "B", True),
        (r"\boxed{\text{B}}", "B", True),
        (r"\boxed{\textbf{(B)}}", "B", True),
        ("**B**", "B", True),
        ("B", "(B)", True),
        ("A cat", "A", False),
        ("A is wrong, so B", "A", False),
        ("A or B", "B", False),
        ("A, B", "A", False),
        ("C", "B", False),
        ("The answer is B because A is too small", "B", True),
        ("B", "B. Paris", True),
        ("Paris", "B. Paris", True),
        ("A. Rome", "B. Paris", False),
    ],
    "mathematics": [
        ("1 + x", "x+1", True),
        ("<answer>1 + x</answer>", "x+1", True),
        ("So it is\n$x^{2} + 2x + 1$", "(x+1)^2", True),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
        (r"\boxed{2√2}", r"2\sqrt{2}", True),
        ("sqrt(8)", r"2\sqrt{2}", True),
        ("x", "x+1", False),
        ("1", "x+1", False),
        ("y = 2x + 1", "2x+1", True),
        ("The line is y = 2x + 1.", "y = 2x + 1", True),
        (r"\boxed{2\pi}", "2π", True),
        ("sin(x)", r"\sin(x)", True),
        (r"\boxed{\sqrt{16}}", "4", True),
        (r"\boxed{2^{10}}", "1024", True),
        (r"\boxed{-\infty}", r"\infty", False),
        ("∞", r"\infty", True),
        (r"\boxed{x \ge 3}", "x >= 3", True),
        (r"\boxed{x > 3}", "x >= 3", False),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}", True),
        (r"\boxed{2x}", "2y", False),
        (r"Since $a = 1$, the answer is $x + 1$.", "x+1", True),
    ],
}


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
        pytest.param(*row, id=f"{kind}-{i}")
        for kind, rows in JUDGED.items()
        for i, row in enumerate(rows)
    ],
)
def test_answers_are_judged_as_a_person_would(completion, answer, right):
    assert answers.answer_is(completion, answer) is right


def test_only_mathematics_needs_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(math_judge, "is_equal", None)
    for kind in JUDGED.keys() - {"mathematics"}:
        for completion, answer, right in JUDGED[kind]:
            assert answers.answer_is(completion, answer) is right, (completion, answer)


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


@pytest.mark.parametrize("answer", ["42", "5 km", "Paris", "yes", "B", "2024-05-01", "(1, 2)"])
@pytest.mark.parametrize("unit", ODD)
def test_every_completion_is_judged(unit, answer):
    for length in (1, 3, 10**6):
        text = (unit * length)[: 10**6]
        for completion in (text, f"The answer is {text}", f"\\boxed{{{text}}}"):
            assert answers.answer_is(completion, answer) in (True, False)
    assert answers.number_is(text, "42") is answers.last_line_is(text, "42") is False
    assert answers.mentions(text, "Rome") is False


@pytest.mark.clock
def test_a_thousand_plain_numbers_are_judged_in_two_seconds():
    forms = (
        "The answer is {}.",
        "3 + 4 = 7\nSo it is {}",
        r"\boxed{{{}}}",
        "#### {}",
        "{} m",
        "{}",
    )
    thoughts = "We take 2 of $x = 3$ and \\frac{1}{2} of it. " * 10
    start = time.perf_counter()
    assert all(answers.answer_is(thoughts + forms[i % 6].format(i), str(i)) for i in range(1000))
    assert time.perf_counter() - start < 2


@given(st.integers(-(10**9), 10**9))
def test_last_number_finds_every_integer(n):
    for text in (f"{n}", f"{n:,}", f"it is {n}.", f"####  {n:,}", rf"\boxed{{{n}}} of 7"):
        assert answers.number_is(text, str(n))
