"""Numbers with units: read them from text and compare them.

A percentage and "million" are scales; kilometers, dollars and apples are units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple

from reference.training.tasks.plain_text import fold

LONGEST = 4000  # digits; longer numbers are compared as text
_SCALES = {"%": Fraction(1, 100), "percent": Fraction(1, 100), "k": 1000, "hundred": 100}
_SCALES |= {"thousand": 1000, "million": 10**6, "mn": 10**6, "billion": 10**9, "bn": 10**9}
_SCALES |= {"trillion": 10**12, "millones": 10**6, "millionen": 10**6, "万": 10**4, "億": 10**8}
_SCALES |= {"亿": 10**8, "dozen": 12}
# Names of a unit, its base unit and how many of them it is; metric names take prefixes.
_METRIC = {"m": "meter metre", "g": "gram gramme", "l": "liter litre L", "W": "watt", "J": "joule"}
_METRIC |= {"s": "second sec", "Hz": "hertz", "V": "volt", "A": "ampere amp", "Pa": "pascal"}
_METRIC |= {"N": "newton", "B": "byte", "cal": "calorie", "mol": "mole", "eV": "electronvolt"}
_PREFIXES = {"": ("", 1), "k": ("kilo", 1000), "M": ("mega", 10**6), "G": ("giga", 10**9)}
_PREFIXES |= {"c": ("centi", Fraction(1, 100)), "d": ("deci", Fraction(1, 10))}
_PREFIXES |= {"m": ("milli", Fraction(1, 1000)), "μ": ("micro", Fraction(1, 10**6))}
_PREFIXES |= {"n": ("nano", Fraction(1, 10**9)), "T": ("tera", 10**12)}
_OTHERS = {
    "s": {"min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800},
    "m": {"in inch inches": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144"}
    | {"mi mile": "1609.344"},
    "g": {"t tonne": 10**6, "lb lbs": "453.59237", "oz ounce": "28.349523125"},
    "month": {"month": 1},
    "year": {"year yr": 1},
    "°": {"° degree deg": 1},
    "rad": {"rad radian": 1},
    "°C": {"°C celsius ℃": 1},
    "°F": {"°F fahrenheit": 1},
    "K": {"K kelvin": 1},
    "$": {"$ US$ dollar usd buck": 1, "cent ¢": "0.01"},
    "€": {"€ euro eur": 1},
    "£": {"£ gbp pound": 1},
    "¥": {"¥ yen jpy yuan cny rmb 元 円": 1},
    "₹": {"₹ rupee inr rs": 1},
}
_UNITS: dict[str, tuple[Fraction, str]] = {
    prefix + name: (Fraction(factor), base)
    for base, names in _METRIC.items()
    for symbol, (long, factor) in _PREFIXES.items()
    for prefix, name in [(symbol, base), *((long, name) for name in names.split())]
}
_UNITS |= {
    name: (Fraction(factor), base)
    for base, units in _OTHERS.items()
    for names, factor in units.items()
    for name in names.split()
}
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "sqm": "m^2", "kWh": "kW*h"}
_NO_UNITS = frozenset({"st", "nd", "rd", "th", "of"})

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: i for i, word in enumerate(_ONES)} | {w: 20 + 10 * i for i, w in enumerate(_TENS)}
_WORDS |= {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_SPELLED = re.compile(
    rf"\b(?:{'|'.join([*_ONES, *_TENS])}|an?(?= (?:hundred|thousand|million|billion)\b))\b"
    rf"(?:(?:[ -]|(?<=hundred) and |(?<=thousand) and )(?:{'|'.join(_WORDS)})\b)*",
    re.IGNORECASE,
)
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6}
_PARTS |= {"eighth": 8, "tenth": 10}
_PART = re.compile(
    rf"\b(?:(?P<count>an?|one|\d+)[ -](?P<part>{'|'.join(_PARTS)})s?|half)\b", re.IGNORECASE
)
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:[ '_]\d{3})+(?:[.,]\d+)?"
    r"|\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d+(?:[.,]\d*)?|\.\d+)"
)
_CURRENCY = r"[A-Z]{0,2}[$€£¥₹]|USD|EUR|GBP|JPY|INR|CNY|Rs\.?"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<currency>{_CURRENCY})?\s?(?P<inner>[-+]?)"
    rf"(?:(?P<power>10\^\{{?[-+]?\d{{1,12}}\}}?)"
    rf"|(?:(?P<whole>\d+)\s+)?(?P<top>{_DIGITS})/(?P<bottom>-?{_DIGITS})"
    rf"|(?P<digits>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,12}}))?)"
    r"\s*(?P<unit>[^\d\s.,;:!?=<>][^,;:!?=<>]{0,60}?)?",
    re.DOTALL,
)
SUM_OF_UNITS = re.compile(r"\d+ ?[^\W\d_]+\.?(?:,? (?:and )?\d+ ?[^\W\d_]+\.?){1,3}")
_UNIT_PART = re.compile(
    r"([*/ ]?)\s*([^\W\d_]+\$|[^\W\d_]+|°[CF]?|[$€£¥₹¢%])(?:\^?\{?(-?\d)\}?)?\s*"
)


class Quantity(NamedTuple):
    """number * scale * factor, in units with powers; `factor` converts to base units."""

    number: Fraction
    scale: Fraction = Fraction(1)
    factor: Fraction = Fraction(1)
    units: Mapping[str, int] = MappingProxyType({})

    def equals(self, other: Quantity) -> bool:
        """Test if both are the same; a bare number stands for any unit and either scale."""
        if self.is_bare or other.is_bare:
            return any(
                _close(mine, its)
                for mine in {self.number, self.number * self.scale}
                for its in {other.number, other.number * other.scale}
            )
        if self.units and other.units and self.units != other.units:
            return False
        return _close(*(q.number * q.scale * (q.factor if q.units else 1) for q in (self, other)))

    @property
    def is_bare(self) -> bool:
        return not self.units and self.scale == 1


def _close(x: Fraction, y: Fraction) -> bool:
    """Test equality, to six decimal places where one has no finite decimal form."""
    if x == y:
        return True
    endless = any(pow(10, 4 * LONGEST, z.denominator) != 0 for z in (x, y))
    return endless and abs(x - y) <= Fraction(1, 2_000_000)


def parse_quantity(text: str, *, only_known_units: bool = False) -> Quantity | None:
    """Read a whole plain text as one number with its unit, or return None."""
    text = text.strip()
    while text[:1] + text[-1:] in ("()", "[]", "{}"):
        text = text[1:-1].strip()
    text = text.rstrip(".;:, ")
    found = _QUANTITY.fullmatch(text) if len(text) <= LONGEST else None
    if found is None or (found["sign"] and found["inner"]) or re.fullmatch(r"[12]\d\d0s", text):
        return None  # nor are the 1990s a number
    number = _number(found)
    unit = found["unit"] or ""
    if found["currency"] and found["currency"] not in unit:
        unit = f"{unit} {found['currency'].removesuffix('.')}"
    parsed = parse_unit(unit, only_known=only_known_units)
    if number is None or parsed is None:
        return _sum_of_units(text)
    scale, factor, units = parsed
    return Quantity(number, scale, factor, units)


def _sum_of_units(text: str) -> Quantity | None:
    """Read "3 hours 20 minutes"."""
    if len(text) > 60 or not SUM_OF_UNITS.fullmatch(text):
        return None
    parts = re.findall(r"\d+ ?[^\W\d_]+", text)
    terms = [parse_quantity(part, only_known_units=True) for part in parts]
    first = terms[0]
    if first is None or any(term is None or term.units != first.units for term in terms):
        return None
    total = sum(term.number * term.factor for term in terms if term is not None)
    return first._replace(number=total / first.factor) if first.units else None


def with_digits(text: str) -> str:
    """Spell numbers with digits, in a text without any; "one" may be a pronoun: 1 only after "is".

    Half and two thirds are 1/2 and 2/3.
    """
    text = re.sub(r"\b(?:minus|negative) (?=\d)", "-", text)
    if re.search(r"\d", text):
        return text

    def digits(found: re.Match[str]) -> str:
        total = part = 0
        words = re.findall(r"(?!and\b)\b[a-z]+", found[0].lower())
        for word in words:
            value = _WORDS.get(word, 1)  # a hundred
            if value >= 1000:
                total, part = total + part * value, 0
            else:
                part = part * 100 if value == 100 else part + value
        before, after = text[: found.start()], text[found.end() :]
        is_number = re.search(r"(?:^|\b(?:is|be|equals) )$", before) and not re.search(r"\w", after)
        return found[0] if words == ["one"] and not is_number else str(total + part)

    def fraction(found: re.Match[str]) -> str:
        count, part = found["count"] or "a", found["part"] or "half"
        return f"{count if count.isdigit() else 1}/{_PARTS[part.lower()]}"

    text = _PART.sub(fraction, _SPELLED.sub(digits, text))
    text = re.sub(r"(?<=\d) and (?=1/)", " ", text)  # two and a half
    return re.sub(r"\b(?:minus|negative) (?=\d)", "-", text)


def _number(found: re.Match[str]) -> Fraction | None:
    exponent = int(found["exponent"] or 0)
    if found["power"]:
        exponent = int(found["power"][3:].strip("{}"))
    if abs(exponent) > LONGEST:
        return None
    if found["top"]:
        bottom = _decimal(found["bottom"])
        if bottom == 0:
            return None
        number = Fraction(found["whole"] or 0) + _decimal(found["top"]) / bottom
    else:
        number = _decimal(found["digits"] or "1") * Fraction(10) ** exponent
    return -number if "-" in (found["sign"], found["inner"]) else number


def _decimal(digits: str) -> Fraction:
    """Read digits whose last comma or point may be the decimal one."""
    digits = re.sub(r"[ '_]", "", digits)
    comma, point = digits.rfind(","), digits.rfind(".")
    if comma > point and (
        point >= 0 or not re.fullmatch(r"-?[1-9]\d{0,2}(,\d{2,3})*,\d{3}", digits)
    ):
        digits = digits.replace(".", "").replace(",", ".")
    elif digits.count(".") > 1:
        digits = digits.replace(".", "")
    return Fraction(Decimal(digits.replace(",", "")))


def parse_unit(
    text: str, *, only_known: bool = False
) -> tuple[Fraction, Fraction, dict[str, int]] | None:
    """Read scale, factor and units of "km/h" or "million dollars", or return None.

    A word that is no known unit counts as one itself, unless only_known.
    """
    text = re.sub(r"\bper ?cent(?:age)?\b|\bpct\b", "%", text.strip())
    text = re.sub(r"\s+per\s+", "/", text)
    text = re.sub(
        r"(?i:(?:°|\bdegrees?) ?([cf])(?:elsius|ahrenheit)?)(?![^\W\d_])",
        lambda found: f"°{found[1].upper()}",
        text,
    )
    text = re.sub(r"\b(?:square|sq\.?) ([^\W\d_]+)", r"\1^2", text)
    text = re.sub(r"\b(?:cubic|cu\.?) ([^\W\d_]+)", r"\1^3", text)
    text = re.sub(r"[^\W\d_]+", lambda word: _COMPOUND.get(word[0], word[0]), text)
    scale, factor, units, end = Fraction(1), Fraction(1), {}, 0
    while end < len(text):
        part = _UNIT_PART.match(text, end)
        if part is None:
            return None
        end = part.end()
        joint, name, power = part.groups()
        if name in _NO_UNITS:
            continue
        if (lower := name.lower()) in _SCALES:
            scale *= _SCALES[lower]
            continue
        stem = lower.removesuffix("s")
        known = next((_UNITS[x] for x in (name, lower, stem) if x in _UNITS), None)
        if known is None and (only_known or (len(name) == 1 and name < "\u0e00")):
            return None  # 2x and 3π
        size, base = known or (Fraction(1), fold(stem))
        power = int(power or 1) * (-1 if joint == "/" else 1)
        factor *= size**power
        units[base] = units.get(base, 0) + power
    return scale, factor, units
