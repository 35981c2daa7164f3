"""Find the final answer in a completion.

It is what the last mark holds: \\boxed{}, <answer> tags or a line that starts with "####". Without
a mark it is what follows "the answer is", else the bold text of the last line, else the last
line. For a number the whole text is searched: the last one counts that is not a part of something
else (a formula, a range, a list, a date, an identifier). Two alternatives are no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reference.training.tasks.plain_text import plain
from reference.training.tasks.quantities import (
    SUM_OF_UNITS,
    Quantity,
    parse_quantity,
    parse_unit,
    with_digits,
)

# Characters that are read, from the end of a completion: for marks, and for the rest.
LONGEST = 20_000
TAIL = 4_000

_HASHES = re.compile(r"^[ \t]*####(?!#)(.*)$", re.MULTILINE)
_BOX_PARTS = re.compile(
    r"\\f?box(?:ed)?\s*(?P<box>\{)|\\f?box(?:ed)?\s+(?P<token>[^\s{$]+)|\\.|[{}]", re.DOTALL
)
_BETWEEN_BOXES = re.compile(r"\}?\$?\s*(?:,|,?\s*\b(?:and|or)\b)\s*\$?\\f?box(?:ed)?\s*\{?")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_PHRASE = re.compile(
    r"(?:\b(?:answer|ans|antwort|respuesta|réponse|resposta|risposta|ответ)\b[^.:=\n]{0,60}?"
    r"(?:\b(?:is|are|ist|es|est|é|è)\b(?: therefore| thus)?:?|[:=])"
    r"|答案(?:是|为|為|(?=:)):?|答え(?:は:?|:)|답은:?)\s*(?P<answer>\S.*)",
    re.IGNORECASE,
)
_RETRACTION = re.compile(r"\b(?:wait|actually|correction|sorry|no,)", re.IGNORECASE)
# What ends an answer that more words follow; a bare comma may also go on with a list.
_REASON = re.compile(
    r"[.!?;](?:\s|$)|,? \(|,? (?:because|since|as|for|and not|not|denn|weil|porque|car)\s"
    r"|, (?=(?:which|who|the|an?|with|so)\s)"
)
# "(in 2020)", and at the end ", after a discount of 10%."
_ASIDE = re.compile(
    r"(?<=\w)(?: \([^()]{0,200}\)"
    r"|,? (?:after|because|since|given|denn|weil|car|porque) (?:[^,=\n.]|\.(?=\d|\s*$))*$)"
)
_LIST_LINE = re.compile(r"\s*(?:(?:[-*+•]|\d+[.)])\s+)?(\S.*)")
# What stands before the answer in a sentence; without spaces in Chinese, Japanese and Korean.
_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|equals|called|by|in|at|on|from|ist|sind|es|son|est|é|è|это"
    r"|är|jest|là|είναι|هو|هي"
    r"|(?:it|that|this)'s|probably|maybe|perhaps|think|believe|guess)\b"
    r"|:(?=[\s\u2e80-\uffff])|\s-\s|→|是|为|は|는|은|คือ",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|never|nor|neither)\b|n't\b")
_SUBJECT = re.compile(r"(.{1,100}?) (?:is|are|was|were) the ")
_JOINERS = frozenset(
    "or and of to through - & x oder und bis ou et o y или и 或 和 至 到 ~".split()
)
_OR = frozenset("or oder ou o или 或".split())
_NEGATIONS = frozenset("not nicht pas than isn't не no".split())
_CODE = re.compile(
    r"#?[^\W\d_]+\d\w*|[^\W\d_]{2,}[-_/.:]\S*|[A-Z]-\d\S*|0x\w+|\d+(?:[.:/-]\d+){2,}\S*|\d+:\d+\S*|\d+[A-Z]\w*"
)


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def tagged(text: str) -> str | None:
    """Find the text in the last pair of <answer> tags."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def boxed(text: str) -> str | None:
    """Find the text in the last \\boxed{} or \\fbox{}; it may have braces of its own."""
    boxes = _boxes(text)
    return text[slice(*boxes[-1])].strip() if boxes else None


def _boxes(text: str) -> list[tuple[int, int]]:
    """Find start and end of what each box holds; a box in a box is left out."""
    boxes: list[tuple[int, int]] = []
    stack: list[int | None] = []
    for part in _BOX_PARTS.finditer(text):
        if part["token"]:
            boxes.append(part.span("token"))
        elif part[0][-1] == "{" and (part["box"] or len(part[0]) == 1):
            stack.append(part.end() if part["box"] else None)
        elif part[0] == "}" and stack and (start := stack.pop()) is not None:
            boxes = [box for box in boxes if box[0] < start] + [(start, part.start())]
    return boxes


def marked_text(text: str) -> str | None:
    """Find what the last mark holds, without the marks inside it."""
    marked = None
    for _ in range(3):
        if (inside := _mark(text)) is None:
            break
        text = marked = inside
    return marked


def _mark(text: str) -> str | None:
    """Find what the last mark holds; boxes that "and", "or" or a comma joins are a list."""
    marks = []
    if (content := tagged(text)) is not None:
        marks.append((text.rfind("</answer>"), content))
    for line in list(_HASHES.finditer(text))[-10:]:
        # Other lines that start so are headings.
        if not text[line.end() :].strip() or parse_quantity(plain(line[1])) is not None:
            marks.append((line.end(), line[1].strip()))
    if boxes := _boxes(text):
        first = len(boxes) - 1
        while first and _BETWEEN_BOXES.fullmatch(text[boxes[first - 1][1] : boxes[first][0]]):
            first -= 1
        contents = [text[slice(*box)].strip() for box in boxes[first:]]
        marks.append((boxes[-1][1], ", ".join(contents)))
    return max(marks)[1] if marks else None


def _phrase(text: str) -> str | None:
    """Find what follows the last "the answer is" in a plain text."""
    found = list(_PHRASE.finditer(text))
    return found[-1]["answer"] if found else None


def _tokens(text: str) -> list[str]:
    grouped = re.sub(
        r"(?<![\d.,])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]|[.,]\d)",
        lambda match: match[0].replace(" ", ","),
        text,
    )
    return re.findall(r"[-+]?\d+ +\d+/\d+\S*|\S+", grouped)


def strip_token(token: str) -> str:
    token = token.strip("\"'*_#").rstrip(".,;:!?\"'*_")
    for pair in ("()", "[]", "{}"):
        if token.count(pair[0]) != token.count(pair[1]):
            token = token.strip(pair)
    return token.strip("\"'*_").rstrip(".,;:!?")


def _is_joined(tokens: list[str], i: int) -> bool:
    """Test if a number is in a range, in a list or one of two alternatives."""

    def has_number(j: int) -> bool:
        return 0 <= j < len(tokens) and re.search(r"\d", tokens[j]) is not None

    def ends(j: int) -> bool:
        return j + 1 == len(tokens) or tokens[j][-1] in ".;!?)]}"

    if "=" not in tokens[i] and has_number(i - 2) and tokens[i - 1].lower() in _JOINERS:
        return True
    if has_number(i + 2) and tokens[i + 1].lower() in _JOINERS:
        return True
    # "42 apples or 43 apples"
    if (has_number(i - 3) and tokens[i - 1].lower() in _OR) or (
        has_number(i + 3) and tokens[i + 2].lower() in _OR
    ):
        return True
    # "7, 42." is a list; "In 2020, 42 people" is not.
    pairs = ((i - 1, i), (i, i + 1))
    return any(
        has_number(a) and has_number(b) and tokens[a][-1] in ",;" and ends(b) for a, b in pairs
    )


def _find_number(text: str, *, first: bool = False) -> Quantity | str | None:
    """Find the last number of a plain text, or the first; a str is a formula in its place."""
    tokens = _tokens(text)
    for i in range(len(tokens)) if first else reversed(range(len(tokens))):
        sides = re.split(
            r"[=≈→]|(?<=[^\W\d_]):", re.sub(r"=[^\W\d_][.,;!]?$", "", tokens[i])
        )  # 7=x
        token = strip_token(sides[-1])
        token = re.sub(r"(?<=\d)-[^\W\d_]{2,}.*", "", token)  # 12-year-old
        if not re.search(r"\d", token):
            continue
        if token[0].isalpha() and parse_unit(token, only_known=True):  # of 5 m^2
            continue
        before = " ".join(tokens[max(i - 2, 0) : i]).lower()
        if before.rpartition(" ")[2] in _NEGATIONS or before == "out of":
            continue
        if before.rpartition(" ")[2].startswith("\\"):  # \log_2 8
            return " ".join(tokens[i - 1 : i + 1])
        if _is_joined(tokens, i):
            return None
        for n in range(4 if tokens[i][-1] not in ".,;!?)" else 0, -1, -1):
            words = [strip_token(token) for token in tokens[i + 1 : i + 1 + n]]
            if len(words) < n or (words and words[-1] == "in" and i + n + 1 < len(tokens)):
                continue
            number = parse_quantity(" ".join([token, *words]), only_known_units=True)
            if number is not None:
                return number
        if not _CODE.fullmatch(token):
            return token
    return None


def final_number(completion: str) -> Quantity | str | None:
    marked = marked_text(completion)
    raw = completion[-TAIL:] if marked is None else marked[-TAIL:]
    text = with_digits(plain(raw).strip())
    if marked is not None and re.fullmatch(r"\d+!", text):
        return text  # a factorial
    if (number := parse_quantity(text.rstrip("! "))) is not None:
        return number
    *_, last_sum = [None, *SUM_OF_UNITS.finditer(text)]
    if last_sum is not None and not re.search(r"\d", text[last_sum.end() :]):
        if (number := parse_quantity(last_sum[0])) is not None:
            return number
    if (phrase := _phrase(text)) is not None:
        if retraction := list(_RETRACTION.finditer(phrase)):
            return _find_number(phrase[retraction[-1].end() :])
        near = " ".join(re.split(r",(?=\s\D)", _REASON.split(phrase, maxsplit=1)[0])[0].split()[:8])
        if re.search(r"\d", near):
            return _find_number(near if re.search(r"\d=", near) else phrase, first=True)
    for bold in reversed(_BOLD.findall(last_line(raw))):
        if (number := parse_quantity(plain(bold))) is not None:
            return number
    without_asides = _ASIDE.sub("", text)
    number = _find_number(without_asides if re.search(r"\d", without_asides) else text)
    is_formula = isinstance(number, str) and marked and not re.search(r"(?<!\\)\b[a-z]{3,}", text)
    return text if is_formula else number


def readings(completion: str) -> Iterator[str]:
    """List what may be the answer of a completion, in words; the most explicit first."""
    marked = marked_text(completion)
    raw = completion[-TAIL:] if marked is None else marked[-TAIL:]
    text, line = plain(raw), plain(last_line(raw))
    if (phrase := _phrase(text)) is not None:
        yield from (phrase, _REASON.split(phrase, maxsplit=1)[0])
    yield from (text, line)
    start = _REASON.split(line, maxsplit=1)[0] if _RETRACTION.search(line) is None else line
    lines = [_LIST_LINE.fullmatch(part) for part in raw.strip().split("\n")]
    if all(lines):
        yield plain(", ".join(part[1] for part in lines if part is not None))
    head = plain(completion[:TAIL].partition("\n")[0]) if marked is None else ""
    for part in (line, start, head) if text.count("\n") <= 3 else (line, start):
        sentence = re.split(r"(?<=[^\W\d_]{2}[.!?]) +", part.strip())[-1]
        if _NEGATED.search(sentence) is None:
            yield _COPULA.split(sentence)[-1]
            yield sentence.rpartition("=")[2]
            if subject := _SUBJECT.match(sentence):
                yield subject[1]
            yield from map(plain, _BOLD.findall(last_line(raw))[-1:])
    if phrase is None:
        yield head
