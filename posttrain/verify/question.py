"""Compares an answer with the question, so that an answer which repeats the question is not paid for."""

from __future__ import annotations

import re
from functools import lru_cache

from posttrain.verify.numbers import tidy
from posttrain.verify.units import word_set

LONGEST_PROMPT = 20_000  # characters at the end of a prompt that an answer is compared with
SHORTEST_COPY = 2  # characters without spaces

_WORD = re.compile(r"[A-Za-z]{3,}")
_SPACES = re.compile(r"\s+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s?\{[a-z*]+\}")
_PROSE = re.compile(r"[a-z]{3,}")
_IN_FORMULAS = word_set("and sqrt sin cos tan sec csc cot log exp frac infinity inf infty arcsin arccos arctan abs")
_VARIABLE = re.compile(r"(?<![A-Za-z])(?![ei](?![A-Za-z]))[A-Za-z]")
_SUMS = re.compile(r"(?<=[\w)\]}])\s?[-+]|\d\s?(?:\*|\\cdot|\\times|×)\s?\d")


def compact(text: str) -> str:
    """A tidy text without spaces, in lower case."""
    return _SPACES.sub("", tidy(text)).lower()


@lru_cache(maxsize=256)
def _compact_prompt(prompt: str) -> str:
    return compact(prompt[-LONGEST_PROMPT:])


@lru_cache(maxsize=256)
def words_of(prompt: str) -> frozenset[str]:
    """The words of a question, in lower case, in singular and plural."""
    words = {word.lower() for word in _WORD.findall(prompt[-LONGEST_PROMPT:])}
    return frozenset(words | {f"{word}s" for word in words} | {word.removesuffix("s") for word in words})


def stands_in(written: str, prompt: str) -> bool:
    """True if an answer stands in the prompt as it is written, but for spaces."""
    plain = compact(written)
    if len(plain) < SHORTEST_COPY or not prompt:
        return False
    return re.search(rf"(?<![\d.]){re.escape(plain)}(?!\d)", _compact_prompt(prompt)) is not None


def prose_in(written: str, gold: str) -> bool:
    """True if an expression has words in it that the gold expression lacks; math-verify multiplies their letters."""
    words = set(_PROSE.findall(_COMMAND.sub(" ", _ENVIRONMENT.sub(" ", written.lower()))))
    return not words <= _IN_FORMULAS | set(_PROSE.findall(gold.lower()))


def more_to_work_out(written: str, gold: str) -> bool:
    """True if an answer leaves more sums and products of numbers to be worked out than a gold without variables."""
    if _VARIABLE.search(_COMMAND.sub(" ", gold)):
        return False
    return _sums(written) > _sums(gold)


def _sums(text: str) -> int:
    return len(_SUMS.findall(text)) + 2 * text.count("\\pm")
