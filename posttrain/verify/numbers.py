r"""Reads numbers as people, LaTeX and programs write them, exactly.

A number is an integer, a decimal, a fraction, a mixed number, a percentage or a number in scientific notation, perhaps
with a currency and a unit. A sum, a product, a power or a root is none: it is still to be worked out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from posttrain.verify.units import SCALES, contradicts, unit_of

LONGEST_NUMBER = 200  # characters
LARGEST_EXPONENT = 400  # of scientific notation

_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|boldsymbol)\s?\{([^{}]*)\}"
)
_PERCENT = re.compile(r"\s*(?:\\?%|\b(?:percent|percentage|pct)\b)", re.IGNORECASE)
_DEGREES = re.compile(r"\s?\^\s?\{?\s?\\(?:circ|degree)\s?\}?|\\degree\b")
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad\b|[\u00a0\u2009\u202f]|\s+")
_REMOVED = re.compile(r"\\\$|\$|\\\(|\\\)|\\\[|\\\]|\\!|\\displaystyle\b|\\left\b|\\right\b|\\bigl?\b|\\bigr\b|`")
_QUOTES = "\"'“”‘’"
_ABOUT = re.compile(r"(?:\\approx|≈|about\b|approximately\b|exactly\b|only\b)\s*", re.IGNORECASE)
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT_POWER = re.compile(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)")

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_FRACTION = (
    r"(?:\\frac\s?\{\s?(?P<top>-?\d+)\s?\}\s?\{\s?(?P<bottom>-?\d+)\s?\}"
    r"|\\frac\s?(?P<top1>\d)\s?(?P<bottom1>\d)|(?P<top2>\d+)\s?/\s?(?P<bottom2>\d+))"
)
NUMBER = re.compile(
    rf"(?P<sign>(?:[-+]|minus\b|negative\b)?)\s?(?P<currency>(?:US|USD|EUR|GBP|Rs\.?|[€£¥₹])?)\s?(?P<sign2>-?)"
    rf"(?:(?:(?P<whole>\d+)(?:\s?(?=\\frac)|\s(?=\d+\s?/)))?{_FRACTION}"
    rf"|(?P<plain>{_INTEGER}(?:\.\d*)?|\.\d+)(?:\\(?:overline|bar)\{{(?P<repeated>\d{{1,20}})\}})?"
    r"(?:[eE](?P<e>[-+]?\d{1,4})(?!\w)|\s?(?:\\times|\\cdot|[x×*·])\s?10\s?(?:\^|\*\*)\s?\{?\s?(?P<ten>[-+]?\d{1,4})\s?\}?)?)"
    rf"(?:\s(?P<scale>{'|'.join(SCALES)})\b)?(?P<percent>%?)",
    re.IGNORECASE,
)
_NAME = re.compile(r"[A-Za-z]\w*(?:\s?_\s?\{?\w+\}?)?")
_SIDES = re.compile(r"=|\\approx\b|≈")

Kind = Literal["integer", "decimal", "fraction", "scientific", "percent"]


@dataclass(frozen=True)
class Number:
    """A number and how it was written."""

    value: Fraction
    kind: Kind
    parts: tuple[int, int] | None = None  # of a fraction as it was written
    unit: tuple[str, ...] = ()
    name: str = ""  # x in x = 5
    text: str = ""  # without unit and name

    def same_form(self, other: Number) -> bool:
        """True if two equal numbers are written alike, but for separators and units."""
        return self.kind == other.kind and self.parts == other.parts


def tidy(text: str) -> str:
    r"""A text without delimiters, emphasis and final full stop, with spaces, signs and fractions in one form."""
    text = text.strip().replace("\u2212", "-").replace("\u2013", "-").replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    for sign, fraction in _VULGAR.items():
        text = text.replace(sign, f" {fraction} ")
    text = _SUPERSCRIPT_POWER.sub(lambda match: f"10^{match[1].translate(_SUPERSCRIPTS)}", text)
    text = _DEGREES.sub("°", _WRAPPED.sub(r" \1 ", text))
    text = _SPACES.sub(" ", _PERCENT.sub("%", _REMOVED.sub("", text))).strip()
    for _ in range(2):  # emphasis around a full stop, and a full stop behind emphasis
        text = text.strip("*_ ").rstrip(".").rstrip()
        if len(text) > 2 and text[0] in _QUOTES and text[-1] in _QUOTES:
            text = text[1:-1].strip()
    return text


def read_number(text: str, *, known: Collection[str] = ()) -> Number | None:
    """Reads a tidy text as a number with its unit; ``None`` if it is not one number.

    Of an equation the last side counts: ``x = 5`` and ``2 + 3 = 5`` are 5.

    Args:
        known: further words that may be units, such as those of the question.
    """
    if len(text) > 4 * LONGEST_NUMBER:
        return None
    first, *others = _SIDES.split(text)
    last = _without_brackets((others[-1] if others else first).strip())
    if any(sign in text for sign in ("\\neq", "!=", "<", ">", "\\ne")):
        return None
    match = NUMBER.match(_ABOUT.sub("", last, count=1) if _ABOUT.match(last) else last)
    if match is None or len(match[0]) > LONGEST_NUMBER:
        return None
    number = _value(match)
    unit = unit_of(match.string[match.end() :].strip(" ."), known)
    if number is None or unit is None:
        return None
    name = first.strip() if others and _NAME.fullmatch(first.strip()) else ""
    value, kind, parts = number
    currency = match["currency"].lower().strip(".")
    return Number(value, kind, parts, unit or ((currency,) if currency else ()), name, match[0])


def _without_brackets(text: str) -> str:
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("{", "}")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            return text[len(opening) : -len(closing)].strip()
    return text


def _value(match: re.Match[str]) -> tuple[Fraction, Kind, tuple[int, int] | None] | None:
    """The value of a match, its kind, and the parts of a fraction; ``None`` for a division by zero and the like."""
    top = match["top"] or match["top1"] or match["top2"]
    kind: Kind
    parts = None
    if top is not None:
        parts = int(top), int(match["bottom"] or match["bottom1"] or match["bottom2"])
        whole = int(match["whole"] or 0)
        if parts[1] == 0 or (match["whole"] and not 0 <= parts[0] < parts[1]):
            return None
        value, kind = whole + Fraction(*parts), "fraction"
        parts = (whole * parts[1] + parts[0], parts[1])
    else:
        plain = re.sub(r"[, ]", "", match["plain"])
        value, kind = Fraction(plain.rstrip(".") or "0"), "decimal" if "." in plain else "integer"
        if match["repeated"]:
            places = len(plain.partition(".")[2])
            value += Fraction(int(match["repeated"]), (10 ** len(match["repeated"]) - 1) * 10**places)
            kind = "fraction"
        exponent = match["e"] or match["ten"]
        if exponent is not None:
            if abs(int(exponent)) > LARGEST_EXPONENT or (match["ten"] and not 1 <= value < 10):
                return None
            value, kind = value * Fraction(10) ** int(exponent), "scientific"
    if match["scale"]:
        value, kind = value * SCALES[match["scale"].lower()], "integer"
    negative = (match["sign"] not in ("", "+")) != (match["sign2"] == "-")
    return -value if negative else value, "percent" if match["percent"] else kind, parts


def same_number(left: Number, right: Number) -> bool:
    """True if two numbers are equal and their units do not contradict each other.

    A decimal may be a fraction rounded to six places, as in math-verify, and a float with the error of its last digits.
    """
    if contradicts(left.unit, right.unit) or (left.name and right.name and left.name != right.name):
        return False
    a, b = left.value, right.value
    if (left.kind == "percent") != (right.kind == "percent"):
        a, b = (a, b) if left.kind == "percent" else (b, a)
        return a == b or _close(a / 100, b, exact=False)
    if "decimal" not in (left.kind, right.kind):
        return a == b
    return _close(a, b, exact="integer" in (left.kind, right.kind))


def _close(a: Fraction, b: Fraction, *, exact: bool) -> bool:
    """True if two numbers, one of them a decimal, are equal but for rounding."""
    gap, size = abs(a - b), min(abs(a), abs(b))
    if exact:
        return gap * 10**14 <= size  # 71.99999999999999, as a program prints 72
    return 2 * gap * 10**6 <= 1 and gap * 10**5 <= size
