"""Compare the final answer of a completion with the ground truth, as a person would.

The ground truth decides how it is compared:

* Numbers by value, in any notation: 1,234, 1/2, 1e5, 1.5 million, forty-two. Units that both name
  must be the same (5 km is 5000 m); a bare number is right for any unit. 50% is right for 50% and
  0.5, and the bare 50 for 50%. Where one number is endless, six decimal places count.
* Yes and no by their meaning, in several languages; one letter as a choice: "(B) Paris" for B.
* Dates and times in any notation; all other codes as text.
* Lists by their items: (1, 2) and [1, 2] in order, {1, 2} and the bare 1, 2 in any order.
* Words without case, accents, articles, quotes and punctuation at the end.
* Everything else that has operators or LaTeX commands as mathematics, by math-verify.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from datetime import datetime

from reference.training.errors import UserError
from reference.training.tasks import math_judge
from reference.training.tasks.final_answer import (
    LONGEST,
    TAIL,
    boxed,
    final_number,
    last_line,
    marked_text,
    readings,
    strip_token,
    tagged,
)
from reference.training.tasks.plain_text import fold, plain, plain_characters
from reference.training.tasks.quantities import Quantity, parse_quantity, with_digits

__all__ = ["answer_is", "boxed", "is_number", "last_line", "last_line_is", "last_number"]
__all__ += ["mentions", "number_is", "tagged"]

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_PLAIN_NUMBER = re.compile(rf"[-+−]?{_DIGITS}")
_SIGNED = re.compile(rf"(?:(?<![\w)])-)?{_DIGITS}")
_YES = "yes yeah yep true correct sí oui vrai ja wahr sim verdadero verdadeiro vero tak evet да"
_YES += " はい 是 是的 对 对的 對 正确 네 예 نعم"
_NO = "no nope nah false incorrect wrong non faux nein falsch não falso nie hayır нет"
_NO += " いいえ 不 不是 不对 不對 否 错误 아니요 لا"
_POLARITY = {fold(word): words is _YES for words in (_YES, _NO) for word in words.split()}
_APPROXIMATION = re.compile(r"(?:≈|\\approx\b)\s*-?[\d.,]*\d")
_CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct |right |final )?(?:(?:answer|option|choice|letter)\b(?: is)?:? ?)?)"
    r"(?P<open>[({\[]?)(?P<letter>[A-Za-z])(?:[)}\]]+|[.:](?=\s|$)|,(?=\s)|(?=\s-\s)|$"
    r"|(?=\s(?:because|since|as|is (?:the )?(?:correct|right))\b))\s*(?P<text>.*)",
    re.DOTALL,
)
_CHOSEN = re.compile(
    r"(?i:\b(?:option|choice|answer|letter))\s+\(?([A-Z])\b|\(([A-Z])\)"
    r"|(?i:\b(?:is|be|so|pick|choose|select|chose|with|say|it's"
    r"|ist|est|es|è|é|la))\s+([A-Z])[.)]?\s*$|[选選]\s*([A-Z])"
)
_OPTION = re.compile(r"\(?[A-E][).] +(?=\S)")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|exp|sqrt|max|min|mod)\b)[^\W\d_]{3,}")
_FORMATS = ("%Y-%m-%d", "%Y/%m/%d", "%B %d %Y", "%d %B %Y", "%b %d %Y", "%d %b %Y")
_FORMATS += ("%d.%m.%Y",)
_FORMATS += ("%H:%M", "%H:%M:%S", "%I:%M %p", "%I:%M%p", "%I %p", "%I%p")
_LATEX = {"∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "·": "\\cdot ", "**": "^"}
_LATEX |= {">=": "\\ge ", "<=": "\\le "}


def answer_is(completion: str, answer: str) -> bool:
    """Test if the final answer of a completion is right, as a person would."""
    completion, answer = completion[-LONGEST:].strip(), answer.strip()
    if completion == answer:
        return True
    truth = plain(answer).strip()
    if (right := parse_quantity(with_digits(truth))) is not None:
        number = final_number(completion)
        if isinstance(number, Quantity) and number.equals(right):
            return True
        if _APPROXIMATION.search(completion):  # of "1/6 ≈ 0.167" both sides are right
            return answer_is(_APPROXIMATION.sub("", completion), answer)
        # "3,5" may be a list, and "Seven" a word.
        if re.search(r"\d", truth) and ("," not in truth or is_number(truth)):
            is_formula = isinstance(number, str) and re.search(r"[\\^√*!|]", number) is not None
            has_judge = hasattr(os, "fork") and _has_math_verify()
            return is_formula and has_judge and _mathematics_is([str(number)], answer)
    texts = list(dict.fromkeys(text for text in readings(completion) if text.strip()))
    if (polarity := _POLARITY.get(fold(truth).rstrip("."))) is not None:
        said = (_polarity(text) for text in texts)
        return next((value for value in said if value is not None), None) is polarity
    if choice := re.fullmatch(r"[(\[]?([A-Z])[)\].:]*(?:(?<=[).:])\s+(\S.*))?", truth):
        return _choice_is(texts, choice[1], choice[2])
    texts += [text[found.end() :] for text in texts if (found := _OPTION.match(text))]
    if any(_same(text, truth) for text in texts):
        return True
    if re.search(r"\d", truth) and " " not in truth:
        codes = [token for token in plain(completion[-TAIL:]).split() if re.search(r"\d", token)]
        if codes and _key(strip_token(codes[-1])) == _key(truth):
            return True
    if not _is_mathematics(truth):
        return False
    if not _has_math_verify():
        raise UserError(
            f"comparing with the answer {answer!r} needs the package math-verify: "
            'pip install -e ".[tasks]"'
        )
    marked = marked_text(completion)
    candidates = [marked] if marked else [completion[-TAIL:], last_line(completion), *texts]
    return _mathematics_is(candidates, answer)


def _polarity(reading: str) -> bool | None:
    """Read yes or no from the first word or the last: "No, because", "I would say yes"."""
    words = re.findall(r"[^\W\d_]+|/", fold(reading))
    while words and words[0] in ("so", "thus", "therefore", "hence", "well", "it", "is"):
        words = words[1:]
    if not words or (len(words) > 2 and words[1] in ("or", "and", "/") and words[2] in _POLARITY):
        return None
    if words[0] in _POLARITY or words[-1] not in _POLARITY:
        return _POLARITY.get(words[0])
    return _POLARITY[words[-1]] is not ("not" in words)


def _choice_is(texts: list[str], letter: str, text: str | None) -> bool:
    """Test if the first reading that chooses a letter chooses this one, or gives its text."""
    for reading in texts:
        found = _CHOICE.fullmatch(reading.strip())
        if found is None or (found["letter"].islower() and found["text"] and not found["open"]):
            continue
        if re.match(r"(?:or |and |/ ?)?[(\[]?[A-Z]\b(?![.'’]?\w)", found["text"]):
            return False  # "A, B" or "A) or B)"
        if found["letter"].upper() != letter:
            return False
        reason = re.match(r"because|since|as\b|is\b|$", found["text"])
        return text is None or reason is not None or _key(text) in _key(found["text"])
    if text is not None:
        return any(_same(reading, text) for reading in texts)
    line = next((reading for reading in texts if _CHOSEN.search(reading)), "")
    if re.search(r"\b[A-Z]\)?,? ?(?:or|and|/) ?\(?[A-Z]\b|\bnot\b", line):
        return False
    return {chosen for groups in _CHOSEN.findall(line) for chosen in groups if chosen} == {letter}


def _same(text: str, truth: str) -> bool:
    """Test if two plain texts are the same number, date, list or words."""
    if _key(text) == _key(truth):
        return True
    if any(_key(text.replace(" to ", sign)) == _key(truth) for sign in ":-"):
        return True
    numbers = parse_quantity(text), parse_quantity(truth)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0].equals(numbers[1])
    if (moment := _moment(truth)) is not None:
        return _moment(text) == moment
    digits = [re.sub(r"[-+() ]", "", x) for x in (text.rstrip("."), truth)]
    if digits[0] == digits[1] and digits[1].isdigit() and len(digits[1]) >= 7:
        return True
    (its_kind, its), (kind, items) = _items(text), _items(truth)
    if len(items) < 2 or len(its) != len(items):
        return False
    if its_kind != kind and its_kind and kind and "{}" not in (its_kind, kind):
        return False
    if {kind, its_kind} <= {"", "{}"}:
        its = its.copy()
        for item in items:
            match = next((other for other in its if _same(other, item)), None)
            if match is None:
                return False
            its.remove(match)
        return True
    return all(map(_same, its, items))


def _items(text: str) -> tuple[str, list[str]]:
    """Split a list at its commas and at "and"; return its brackets, too."""
    text = re.sub(r"^.{0,3}(?:=|∈)\s*(?=[(\[{±])", "", text.strip(" .\n"))
    if text.startswith("±"):
        return "", [text[1:], f"-{text[1:]}"]
    kind = text[:1] + text[-1:] if re.fullmatch(r"[(\[{][^()\[\]{}]*[)\]}]", text) else ""
    if kind:
        return kind, [item.strip() for item in text[1:-1].split(",")]
    items = re.split(r",\s+(?:and|or|und|et|y)\s+|\s+(?:and|or|und|et|y)\s+|[,;&]", text)
    names = {re.sub(r"[\d_{} ]", "", item.partition("=")[0]) for item in items if "=" in item}
    if len(names) == 1:
        items = [item.rpartition("=")[2] for item in items]
    return kind, [re.sub(r"^\(([^()]*)\)$", r"\1", item.strip()) for item in items]


def _moment(text: str) -> tuple[datetime, bool] | None:
    """Read a date or a time of the day, and whether its year is missing."""
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|,|\bof\b|\.$", "", text.strip())
    text = " ".join(re.sub(r"\b([ap])\.?m\b\.?", r"\1m", text, flags=re.IGNORECASE).split())
    if len(text) > 30 or not re.search(r"\d", text):
        return None
    for layout in _FORMATS:
        for year in ("", " 2000"):
            with contextlib.suppress(ValueError):
                return datetime.strptime(text + year, layout), bool(year)
    return None


def _key(text: str) -> str:
    """Reduce words and codes to what must agree."""
    text = fold(plain(text)).replace('"', "").replace("&", " and ").strip().strip("'*")
    text = text.rstrip(".!? \n").removesuffix("です").removesuffix("입니다")
    text = re.sub(r"(?<=[^\W\d_])-(?=\w)|(?<=\d)-(?=[^\W\d_])", " ", text)
    text = re.sub(r"\b(?:between|from) (\S*\d\S*) (?:and|to) (?=\S*\d)", r"\1-", text)
    # U.S.A. and Dr., but not README.md
    text = re.sub(r"(?<=[^\W\d_])\.(?=\s|[^\W\d_]\b)", "", text)
    text = re.sub(r"\binf(?:inity)?\b", "∞", text)
    text = re.sub(r"^(?:the|an?)\s+(?=\S\S)|\bv(?=\d)", "", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"[_{}]", "", text))
    return " ".join(text.split())


def _is_mathematics(text: str) -> bool:
    """Test if a plain text is a formula: it has operators and no words, nor letters like H2O."""
    if re.search(r"[\\√π∞∅≤≥≠±∪∩∈]", text):
        return True
    if _WORD.search(text) or re.search(r"[A-Z][a-z]|[A-Z]_?\{?\d|[a-z]\d|\d[A-Z]|:", text):
        return False
    return re.search(r"[\w)}][=^+*<>!][\w(){\-]|\d[a-z(]|[a-z)][-/(]|[-/(][a-z]", text) is not None


def _mathematics_is(candidates: list[str], answer: str) -> bool:
    formulas = [part for text in candidates for part in (*_formulas(text), text)]
    formulas = [_latex(text) for text in formulas if not _WORD.search(re.sub(r"\\\w+", "", text))]
    try:
        return math_judge.is_equal(list(dict.fromkeys(filter(None, formulas))), _latex(answer))
    except OSError as error:
        raise UserError(f"comparing with the answer {answer!r} failed: {error}") from None


def _formulas(text: str) -> list[str]:
    """Find the last formula between delimiters."""
    found = re.findall(r"\$([^$\n]{1,500})\$|\\[(\[](.{1,500}?)\\[)\]]", text, re.DOTALL)
    return ["".join(groups) for groups in found[-1:]]


def _latex(text: str) -> str:
    """Write an expression as LaTeX without delimiters."""
    text = plain_characters(text).strip().rstrip(".").strip("$`* \n")
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text).strip()
    for sign, command in _LATEX.items():
        text = text.replace(sign, command)
    text = re.sub(r"√(\w)|(?:√|\\?sqrt)\(([^()]*)\)", r"\\sqrt{\1\2}", text)
    text = re.sub(r"\^\(([^()]*)\)", r"^{\1}", text)
    return re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])", r"\\\1", text)


def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def number_is(completion: str, answer: str) -> bool:
    """Test if the final number of a completion has the value of the answer, which is a number."""
    number, right = final_number(completion[-LONGEST:]), parse_quantity(plain(answer))
    return isinstance(number, Quantity) and right is not None and number.equals(right)


def last_line_is(completion: str, answer: str) -> bool:
    """Test if the last line is "#### " and the number, as in the solutions of GSM8K."""
    line = plain_characters(last_line(completion[-LONGEST:]))
    match = re.fullmatch(rf"####[ \t]*({_PLAIN_NUMBER.pattern})", line)
    return match is not None and number_is(match[1], answer)


def last_number(text: str) -> str | None:
    """Find the last number in the text, without thousands separators.

    "1,024" is one number, "12.5" is not 5, and the sign of "7-5" is not part of a number.
    """
    numbers = _SIGNED.findall(plain(text[-TAIL:]))
    return numbers[-1].replace(",", "").rstrip(".") if numbers else None


def mentions(text: str, answer: str) -> bool:
    """Test if the answer occurs in the text: a number by its value, words as whole words."""
    text = plain(text[-LONGEST:])
    if is_number(answer):
        right = parse_quantity(plain(answer))
        numbers = (parse_quantity(strip_token(part)) for part in re.split(r"[\s=]", text))
        return any(number and right and number.equals(right) for number in numbers)
    words = _key(answer)
    # Scripts without spaces between words have no borders to test.
    start, end = (r"\b" if x.isalnum() and x < "\u0e00" else "" for x in (words[:1], words[-1:]))
    pattern = ("(?<!\\w)" if start else "") + re.escape(words) + ("(?!\\w)" if end else "")
    return re.search(pattern, _key(text)) is not None


def is_number(answer: str) -> bool:
    """Test if the answer is one number and nothing else: 1,024 but not the pair 3,4."""
    return _PLAIN_NUMBER.fullmatch(answer) is not None
