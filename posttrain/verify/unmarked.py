"""Finds the answer of a completion that marks none: its last number, or its last formula."""

from __future__ import annotations

import re
from collections.abc import Collection

from posttrain.verify.numbers import Number, read_number, tidy
from posttrain.verify.units import CHANGES, word_set

LONGEST_TAIL = 2000  # characters at the end of a completion in which its last number or formula is looked for
SHORTEST_COPY = 8  # characters of a last line that may be a copy of the question

_LEAD = re.compile(r"(?:[A-Za-z][A-Za-z'’,-]+:? ){1,12}(?=\S{0,3}\d)")
_NOT_LEAD = CHANGES | word_set(
    "less more least most under above below between about step part option question problem page chapter figure"
)
_NUMERAL = re.compile(
    r"(?<![A-Za-z0-9.\\^{}/])(?<![A-Za-z0-9)}]_)(?:[$€£¥₹]\s?)?(?:\d+ ?(?=\\frac))?"
    r"(?:\\[dtc]?frac\{\d{1,30}\}\{\d{1,30}\}|\d[\d,]{0,40}(?:\.\d{1,40})?(?:[eE][-+]?\d{1,3})?(?:\s?/\s?\d{1,30})?)(?:\s?\\?%)?"
)
_SIGN = re.compile(r"(?:^|[\s=(:$])([-\u2212])\s?\$?$")
_OPEN = re.compile(
    r"(?:[\d)}\]%]|[A-Za-z]\s?=\s?)\s*(?:[-+*/^x×÷·,;:]|\\cdot|\\times|\\div|,?\s?\band\b|,?\s?\bor\b|\bto\b|\bminus\b|\bplus\b|\btimes\b)\s*[$\\(]{0,2}$"
    r"|\d\s+$|\^\{?$|(?:\bnot|\bminus|\bnegative|\bless than|\bmore than|\bover|\bdivided by|\btimes|\bplus)\s+\$?$",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"\s*(?:[-+*/^×÷·=<>!]\s*[\d$\\(a-zA-Z]|\\(?:cdot|times|div|sqrt|pi)|\^|[A-Za-z](?:\W|$))|\s*:\d")
_NEXT_WORD = re.compile(r"\s*-?([A-Za-z]{2,})")
_FORMULA = re.compile(r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\$([^$\n]{1,1000})\$|\\\((.{1,1000}?)\\\)", re.DOTALL)


def last_number(text: str, prompt: str = "") -> Number | None:
    """The last number of a text.

    ``None`` if there is none, if it is a term of something that is still to be worked out or one of a list, if the
    text ends with a question, or if its last line is a copy of the prompt.
    """
    tail = text[-LONGEST_TAIL:].rstrip()
    line = tail.rpartition("\n")[2].strip()
    if not tail or tail.endswith("?") or (len(line) >= SHORTEST_COPY and line in prompt):
        return None
    matches = list(_NUMERAL.finditer(tail))
    if not matches:
        return None
    start, end = matches[-1].span()
    before, after = tail[max(0, start - 40) : start], tail[end : end + 40]
    word = _NEXT_WORD.match(after)
    sign = _SIGN.search(before)
    before = before[: sign.start(1)] if sign else before
    if _OPEN.search(before) or _GOES_ON.match(after) or (word and word[1].lower() in CHANGES):
        return None
    written = ("-" if sign else "") + tail[start:end].rstrip(",")
    return read_number(tidy(written))


def last_formula(text: str) -> str:
    """The last displayed or inline formula of a text, else its last line."""
    tail = text[-LONGEST_TAIL:].strip()
    formulas = _FORMULA.findall(tail)
    return next(filter(None, formulas[-1])) if formulas else tail.rpartition("\n")[2].strip()


def number_after_words(clause: str, known: Collection[str]) -> Number | None:
    """The number at the end of a sentence's beginning: "Natalia sold 72 clips" is 72."""
    lead = _LEAD.match(clause)
    if lead is None or not _NOT_LEAD.isdisjoint(re.findall(r"[a-z]+", lead[0].lower())):
        return None
    return read_number(clause[lead.end() :], known=known)
