"""Compares answers that are words, choices, times or dates: as such, and not as products of letters."""

from __future__ import annotations

import re
from datetime import date, datetime

from posttrain.verify.units import word_set

_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ ,.'’/&-]+[^\W\d_]+)*")
_NOT_WORDS = word_set("pi sin cos tan sec csc cot log ln exp sqrt infinity inf infty")
_FORMULA = re.compile(r"[\\^*/+=_{}\d]")
_ARTICLE = re.compile(r"(?:the|an?) (?=\w)")
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOSEN = re.compile(
    r"(?:(?:option|choice|answer)\s)?(?:\(([A-J])\)|([A-J])(?:[).:](?=\s|$)|$))(.*)", re.IGNORECASE | re.DOTALL
)
_ANOTHER_CHOICE = re.compile(r"\([A-J]\)|\b[A-J][).:]|\s*,?\s*(?:or|and)\b|\b[B-HJ]\b")
_TIME = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?(?:\s?([ap])\.?m)?", re.IGNORECASE)
_NUMERIC_DATE = re.compile(r"(\d{1,4})([-/.])(\d{1,2})\2(\d{1,4})")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|,|\.|\bof\b")
_DATE_FORMATS = ("%Y-%m-%d", "%Y/%m/%d", "%B %d %Y", "%b %d %Y", "%d %B %Y", "%d %b %Y")


def same_wording(written: str, clause: str, gold: str) -> bool | None:
    """True or False for a gold answer that is a choice, words, a time or a date; ``None`` for another.

    Args:
        written: the answer, tidy.
        clause: the answer without its reason ("blue because the sky is blue"), tidy.
        gold: the gold answer, tidy.
    """
    if (choice := _CHOICE.fullmatch(gold)) is not None:
        return _chosen(written) == choice[1] or _chosen(clause) == choice[1]
    if (gold_time := _time(gold)) is not None:
        return any(_same_time(_time(text), gold_time) for text in (written, clause))
    if (gold_date := _date(gold)) is not None:
        return any(_date(text) == gold_date for text in (written, clause))
    if not _is_words(gold):
        return None
    if _plain(gold) in (_plain(written), _plain(clause)):
        return True
    return None if len(gold) <= 3 and _FORMULA.search(clause) else False  # ab may be a product: a\cdot b


def _is_words(text: str) -> bool:
    return _WORDS.fullmatch(text) is not None and _NOT_WORDS.isdisjoint(re.split(r"\W+", text.lower()))


def _plain(text: str) -> str:
    words = " ".join(re.sub(r"[.,;:!?\"“”]", " ", text.casefold().replace("’", "'")).split())
    return _ARTICLE.sub("", words, count=1) if _ARTICLE.match(words) else words


def _chosen(text: str) -> str | None:
    match = _CHOSEN.fullmatch(text)
    if match is None or _ANOTHER_CHOICE.search(match[3]):
        return None
    return (match[1] or match[2]).upper()


def _time(text: str) -> tuple[int, int, int, str] | None:
    match = _TIME.fullmatch(text)
    if match is None or int(match[1]) > 24 or int(match[2]) > 59:
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0), (match[4] or "").lower()


def _same_time(written: tuple[int, int, int, str] | None, gold: tuple[int, int, int, str]) -> bool:
    """True if two times are the same; "2:30 pm" is 14:30, and "2:30" is not "2:30 pm"."""
    return written is not None and (written[:3] == gold[:3] if not gold[3] else _of_day(written) == _of_day(gold))


def _of_day(time: tuple[int, int, int, str]) -> tuple[int, int, int]:
    hour, minute, second, half = time
    return (hour % 12 + (12 if half == "p" else 0) if half else hour), minute, second


def _date(text: str) -> date | tuple[int, int, int] | None:
    words = " ".join(_ORDINAL.sub(" ", text).split())
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(words if "%B" in form or "%b" in form else text, form).date()
        except ValueError:
            continue
    match = _NUMERIC_DATE.fullmatch(text)
    return (int(match[1]), int(match[3]), int(match[4])) if match else None
