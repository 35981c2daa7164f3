"""Rewrite what models typeset, in Unicode, LaTeX and Markdown, into one plain form."""

from __future__ import annotations

import re
import unicodedata

# Signs that NFKC leaves alone. LaTeX commands become signs, so that both are compared as one.
_SIGNS = {"−": "-", "—": " - ", "―": " - ", "。": ". ", "、": ", ", "⁄": "/", "÷": "/", "·": "*"}
_SIGNS |= {"×": "*", "⋅": "*", "∗": "*", "٫": ".", "٬": ",", "º": "°", "’": "'", "‘": "'", "⇒": "→"}
_SIGNS |= dict.fromkeys("「」『』", '"')
_COMMANDS = {"infty": "∞", "pi": "π", "pm": "±", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥"}
_COMMANDS |= {"neq": "≠", "ne": "≠", "approx": "≈", "times": "*", "cdot": "*", "div": "/"}
_COMMANDS |= {"to": "→", "rightarrow": "→", "implies": "→", "degree": "°", "in": "∈"}
_COMMANDS |= {"langle": "(", "rangle": ")", "euro": "€", "pounds": "£", "lbrace": "{"}
_COMMANDS |= {"emptyset": "∅", "varnothing": "∅"}
_COMMANDS |= {"rbrace": "}", "cup": "∪", "cap": "∩", "left": "", "right": "", "displaystyle": ""}
_COMMANDS |= dict.fromkeys(("bf", "it", "rm", "tt", "sf", "em"), "")
_COMMANDS |= {"quad": " ", "qquad": " ", "big": "", "Big": "", "bigl": "", "bigr": ""}

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt|bb)|operatorname|[mhf]box|boxed|ce"
    r"|emph|underline|bm)\*?\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))"
)
_POWER_OF_TEN = re.compile(r"(?<=[\d.])\s*(?:\*|[xX](?=\s*10\s*\^))\s*10\s*\^\s*\{?([-+]?\d+)\}?")
_DELIMITED = re.compile(
    r"\$\$(.{1,500}?)\$\$|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]"
    r"|(?<![\\\w])\$(?=\S)([^$\n]{1,500}?)(?<=\S)\$(?!\d)",
    re.DOTALL,
)
_BLANKS = re.compile(r"\s{2,}|\t")
# An operator with spaces around it; a minus sign only between digits, brackets and variables.
_OPERATOR = re.compile(r"[ \t]*([=+*/^<>≤≥≈≠±])[ \t]*")
_MINUS = re.compile(r"(?<=[\w)}])(?<![^\W\d_]{2}) - (?=[\d(\\√π$€£]|[a-z]\b)")
_LINE_START = re.compile(r"^[ \t]*(?:> ?)+|(?<=\n)[ \t]*[-*+] +", re.MULTILINE)
# Between a digit and a script whose words may touch it: 共42个.
_SCRIPT_EDGE = re.compile(
    "(?<=[0-9])(?=[{0}])|(?<=[{0}])(?=[0-9])".format("\u0590-\u1fff\u2e80-\ufaff\uff00-\U0003ffff")
)
_LETTER = re.compile(
    r"LATIN (?:SMALL|CAPITAL) (?:LETTER|LIGATURE) (?:DOTLESS )?(\w\w?)(?: WITH .*)?"
)


class _Characters(dict[int, str]):
    """The plain form of each character but those that NFKC has one for; filled as they occur."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)
        tag, _, codes = unicodedata.decomposition(character).partition(" ")
        parts = "".join(chr(int(part, 16)) for part in codes.split()) if tag[:1] == "<" else ""
        if character in _SIGNS:
            plain = _SIGNS[character]
        elif kind == "Nd":
            plain = str(unicodedata.decimal(character))
        elif tag == "<super>" and parts in "0123456789+−-":
            plain = f"^{{{parts.replace('−', '-')}}}"
        elif tag == "<fraction>":
            plain = f" {parts.replace('⁄', '/')} "
        elif kind in ("Pi", "Pf"):
            plain = '"'
        elif kind in ("Pd", "Zs", "Zl", "Zp"):
            plain = "-" if kind == "Pd" else " "
        elif (kind in ("Cf", "Cc") and not character.isspace()) or 0xFE00 <= code <= 0xFE0F:
            plain = ""  # direction marks, joiners, NUL, the style of an emoji
        else:
            plain = character
        self[code] = plain
        return plain


_characters = _Characters()


def plain_characters(text: str) -> str:
    """Turn digits, minus signs, spaces and quotes of all scripts into ASCII."""
    if text.isascii():
        return text.replace("\0", "")
    text = unicodedata.normalize("NFKC", text.translate(_characters))
    return text.replace("}^{", "")  # from one superscript character after another


def plain(text: str) -> str:
    """Turn LaTeX into what it prints, where that is plain text, and remove Markdown.

    An expression is written without spaces: \\(x = \\frac{84}{2}\\) becomes x=84/2.
    """
    text = _LINE_START.sub("", _BLANKS.sub(_shortest_blank, plain_characters(text)))
    text = _DELIMITED.sub(lambda found: f" {_tight(next(filter(None, found.groups())))} ", text)
    if "\\" in text or "^" in text or "{,}" in text or "~" in text:
        text = _without_commands(text)
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)|`|<[|/]?\w+\|?>", " ", text.replace("**:", ":** "))
    text = _BLANKS.sub(_shortest_blank, text)
    text = re.sub(r"[=-]{1,3}>", "→", text.replace(">=", "≥").replace("<=", "≤"))
    text = _MINUS.sub("-", _OPERATOR.sub(r"\1", text))
    text = _POWER_OF_TEN.sub(r"e\1", text)
    return _SCRIPT_EDGE.sub(" ", text)


def _shortest_blank(found: re.Match[str]) -> str:
    return "\n" if "\n" in found[0] else " "


def _tight(latex: str) -> str:
    """Remove the spaces of a formula, but not those inside \\text{}."""
    return re.sub(
        r"\s*([-=+*/^_<>(){}&|]|\\(?!text|[ ,;:!]|mathrm|q?quad)[a-zA-Z]+)\s*", r"\1", latex
    )


def _without_commands(text: str) -> str:
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,;: ]|,\\!|~)(?=\d{3})", ",", text)
    text = re.sub(r"\\[,;: ]|~|\\\\", " ", text.replace("\\!", ""))
    text = re.sub(r"\\circ(?=[CF]\b|[^a-zA-Z]|$)", "°", text)  # of ^\circ\text{C} too
    for _ in range(5):  # as deep as anyone nests them
        text = _TEXT.sub(r"\1", text)
    text = _FRACTION.sub(
        lambda found: " {}/{}".format(*filter(None, found.groups())).replace(" -", "-"), text
    )
    text = re.sub(r"\\([a-zA-Z]+)[ ]?", lambda found: _COMMANDS.get(found[1], found[0]), text)
    text = re.sub(r"\\([%$&#_{}])", r"\1", text)
    text = re.sub(r"\\f?box(?:ed)?\b\s*\{?", " ", text)  # not closed
    return re.sub(r"\s*\^\s*(?:\{\s*°\s*\}|°)", "°", text)


def fold(text: str) -> str:
    """Remove case, and marks that writers of Latin, Greek and Cyrillic letters leave out.

    Marks of other scripts make other letters (か and が), and so do breves and the like in Cyrillic
    (и and й).
    """
    text = text.casefold()
    if text.isascii():
        return text
    folded = []
    for letter in unicodedata.normalize("NFC", text):
        if unicodedata.combining(letter) and folded and folded[-1] < "\u0530":
            continue
        name = unicodedata.name(letter, "")
        script = name.partition(" ")[0]
        if latin := _LETTER.fullmatch(name):
            letter = latin[1].lower()
        elif script == "GREEK":
            letter = unicodedata.normalize("NFD", letter)[0]
        elif letter == "ё":
            letter = "е"
        folded.append(letter)
    return "".join(folded)
