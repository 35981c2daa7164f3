"""Find the final answer in a completion and compare it with the ground truth."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from reference.training.errors import import_package

_NUMBER = r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?"
_NUMBERS = re.compile(_NUMBER)
_HASHES = re.compile(rf"####[ \t]*\$?({_NUMBER})[ \t]*\.?[ \t]*$", re.MULTILINE)
_HASHES_LINE = re.compile(rf"####[ \t]*({_NUMBER})")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# Matches an answer that is one number, such as "1,024", but not the pair "3,4".
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|exp|sqrt)\b)[^\W\d_]{3,}")


def last_number(text: str) -> str | None:
    """Find the last number in the text, without thousands separators.

    "1,024" is one number, "12.5" is not 5, and the sign of "7-5" is not part of a number.
    """
    numbers = _NUMBERS.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def tagged(text: str) -> str | None:
    """Find the text in the last pair of <answer> tags."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    """Find the text in the last \\boxed{}; it may have braces of its own."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None


def number_is(completion: str, answer: str) -> bool:
    """Test if the final number has the value of the answer, which is a number.

    The final number is the one after "####" at the end of a line, else in \\boxed{}, else in
    <answer> tags, else the last one in the text.
    """
    text = completion.strip()
    for part in (*_HASHES.findall(text)[-1:], boxed(text), tagged(text), text):
        if part is not None and (number := last_number(part)) is not None:
            return _value(number) == _value(answer)
    return False


def last_line_is(completion: str, answer: str) -> bool:
    """Test if the last line is "#### " and the number, as in the solutions of GSM8K."""
    match = _HASHES_LINE.fullmatch(last_line(completion))
    return match is not None and _value(match[1]) == _value(answer)


def answer_is(completion: str, answer: str) -> bool:
    """Test if the final answer of a completion is right: a number, mathematics or words.

    Numbers are compared by value, words without case, accents and a full stop. Other mathematics is
    compared by math-verify, for which 1/2 is \\frac{1}{2}.
    """
    if completion.strip() == answer:
        return True
    if is_number(answer):
        return number_is(completion, answer)
    marked = boxed(completion) or tagged(completion)
    candidates = [marked] if marked else [completion.strip(), last_line(completion)]
    # Mathematics has digits, signs or LaTeX and no words: "x^2 + 1", not "Apollo 11" nor "B".
    if re.search(r"[\d\\=+*/^<>-]", answer) is None or _WORD.search(answer):
        return _normalize(answer) in map(_normalize, candidates)
    if answer in candidates:
        return True
    math_verify = import_package(
        "math_verify",
        f"comparing with the answer {answer!r} needs the package math-verify: "
        'pip install "grpo_kernels[tasks]"',
    )

    def parse(text: str) -> list:
        """Mark a bare text as mathematics: of "x + 1" math-verify would read only the 1."""
        is_marked = "$" in text or "\\(" in text or "\\[" in text
        return math_verify.parse(text if is_marked else f"${text}$")

    gold = parse(answer)
    return any(math_verify.verify(gold, parse(candidate)) for candidate in candidates)


def mentions(text: str, answer: str) -> bool:
    """Test if the answer occurs in the text: a number by its value, words as whole words."""
    if is_number(answer):
        numbers = (number.replace(",", "") for number in _NUMBERS.findall(text))
        return any(_value(number) == _value(answer) for number in numbers)
    words = re.escape(_normalize(answer))
    return re.search(rf"(?<!\w){words}(?!\w)", _normalize(text)) is not None


def is_number(answer: str) -> bool:
    return _PLAIN_NUMBER.fullmatch(answer) is not None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _normalize(text: str) -> str:
    """Remove case, accents, a full stop at the end and repeated or special spaces."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return " ".join(letters.split()).removesuffix(".")
