"""Where the answer stands in a completion, and whether it is the right one."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from reference.training.errors import UserError

_NUMBER = r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?"
_NUMBERS = re.compile(_NUMBER)
_HASHES = re.compile(rf"####[ \t]*\$?({_NUMBER})[ \t]*\.?[ \t]*$", re.MULTILINE)
_LAST_LINE = re.compile(rf"####[ \t]*({_NUMBER})")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# An answer that is one number: "1,024", but not the pair "3,4".
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|exp|sqrt)\b)[^\W\d_]{3,}")


def last_number(text: str) -> str | None:
    """The last number in the text, without thousands separators.

    "1,024" is one number, "12.5" is not 5, and the sign of "7-5" is not part of a number.
    """
    numbers = _NUMBERS.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def tagged(text: str) -> str | None:
    """What stands in the last pair of <answer> tags."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{}, whose braces may hold others."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None


def number_is(completion: str, answer: str) -> bool:
    """Whether the final number has the value of the answer, which is a number.

    The final number stands after "####" at the end of a line, else in \\boxed{}, else in <answer>
    tags, else it is the last one written.
    """
    text = completion.strip()
    places = (*_HASHES.findall(text)[-1:], boxed(text), tagged(text), text)
    for place in places:
        if place is not None and (number := last_number(place)) is not None:
            return _value(number) == _value(answer)
    return False


def last_line_is(completion: str, answer: str) -> bool:
    """Whether the last line is "#### " and the number, as in the solutions of GSM8K."""
    found = _LAST_LINE.fullmatch(last_line(completion))
    return found is not None and _value(found[1]) == _value(answer)


def answer_is(completion: str, answer: str) -> bool:
    """Whether the final answer is the right one: as a number, as mathematics or as words.

    Numbers are compared by value, words without case, accents and a full stop. What else looks
    like mathematics goes through math-verify, for which 1/2 is \\frac{1}{2}.
    """
    if completion.strip() == answer:
        return True
    if is_number(answer):
        return number_is(completion, answer)
    marked = boxed(completion) or tagged(completion)
    readings = [marked] if marked else [completion.strip(), last_line(completion)]
    if _is_mathematics(answer):
        return answer in readings or _same_mathematics(readings, answer)
    return _plain(answer) in map(_plain, readings)


def mentions(text: str, answer: str) -> bool:
    """Whether the answer occurs in the text: a number by its value, words as whole words."""
    if is_number(answer):
        numbers = (number.replace(",", "") for number in _NUMBERS.findall(text))
        return any(_value(number) == _value(answer) for number in numbers)
    wanted = re.escape(_plain(answer))
    return re.search(rf"(?<!\w){wanted}(?!\w)", _plain(text)) is not None


def is_number(answer: str) -> bool:
    return _PLAIN_NUMBER.fullmatch(answer) is not None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _plain(text: str) -> str:
    """Without case, accents, a full stop at the end and the difference between kinds of space."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(each for each in letters if not unicodedata.combining(each))
    return " ".join(letters.split()).removesuffix(".")


def _is_mathematics(answer: str) -> bool:
    """Digits, signs or LaTeX, and no words: "x^2 + 1", but neither "Apollo 11" nor "B"."""
    return re.search(r"[\d\\=+*/^<>-]", answer) is not None and not _WORD.search(answer)


def _same_mathematics(readings: list[str], answer: str) -> bool:
    try:
        import math_verify
    except ImportError:
        raise UserError(
            f"comparing with the answer {answer!r} needs the package math-verify: "
            'pip install "grpo_kernels[tasks]"'
        ) from None
    gold = math_verify.parse(_in_dollars(answer))
    return any(math_verify.verify(gold, math_verify.parse(_in_dollars(each))) for each in readings)


def _in_dollars(text: str) -> str:
    """Mathematics as math-verify finds it: of a bare "x + 1" it would read the 1 alone."""
    return text if "$" in text or "\\(" in text or "\\[" in text else f"${text}$"
