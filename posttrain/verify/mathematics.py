r"""The ``math`` verifier, which compares the final answer of a completion with the gold answer.

Numbers are compared exactly with fractions in microseconds; everything else goes to math-verify, which reads LaTeX into
sympy (tens of milliseconds). Where both give a verdict they agree, but for four cases decided otherwise on purpose:

* ``5.`` is 5: math-verify cannot read the sentence's full stop;
* ``50%`` is 50, 50.0 and 0.5: math-verify accepts 50 and 0.5, but not 50.0;
* ``3 dollars`` or ``3 apples`` is 3: math-verify drops known units and multiplies the letters of other words;
* words are compared as words: to math-verify ``Paris`` is the product a*i*p*r*s, and so is ``pairs``.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction

FINAL_MARK = "####"  # GSM8K, Cobbe et al. 2021, arXiv:2110.14168
LONGEST_ANSWER = 1000  # characters; a longer text is no final answer, and neither regular expressions nor sympy read it

_ANSWER_IS = re.compile(r"answer(?:\s+is)?\s*:?\s*([^\n]{1,200})", re.IGNORECASE)
_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_NUMBER = re.compile(rf"[-+]?(?:(?:{_INTEGER})?(\.\d+)|(?:{_INTEGER}))")
_FRACTION = re.compile(r"([-+]?)(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|\\[dt]?frac(\d)(\d)|(\d+)/(\d+))")
_FACTORS = (
    "hundred|thousand|million|billion|trillion|dozen|half|sqrt|sin|cos|tan|log|exp|mod|choose|times|plus|minus|and"
)
_UNIT = re.compile(
    rf"(?<=\d) ?(?:cm|mm|km|kg|mg|ml|(?!(?:{_FACTORS})\b)(?<= )[A-Za-z]{{3,20}})(?: [A-Za-z]{{2,20}}){{0,2}}"
)
_PERCENT = re.compile(r"\s*(?:\\?%|percent\b)", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")


def math(completion: str, *, answer: str | int | float) -> float:
    r"""1 if the completion's final answer equals ``answer``, else 0.

    The final answer is the last ``\boxed{}``, else what follows the last ``####``, else what follows "answer is" or
    "answer:", else whatever expression math-verify finds last. Text up to the last ``</think>`` is left out. ``answer``
    may be a worked solution that marks its answer in one of the first two ways.
    """
    verdict = math_quick(completion, answer=answer)
    return _symbolic(completion, gold_answer(answer)) if verdict is None else verdict


def math_quick(completion: str, *, answer: str | int | float) -> float | None:
    """Fast version of :func:`math` for numbers and words, without sympy; ``None`` if they do not decide."""
    marked = marked_answer(completion)
    final = said_answer(completion) if marked is None else marked
    if final is None:
        return None
    if len(final) > LONGEST_ANSWER:
        return 0.0
    left, right = tidy(final), tidy(gold_answer(answer))
    if left == right and left:
        return 1.0
    if not left:
        return 0.0
    if _WORDS.fullmatch(right):
        return float(left.casefold() == right.casefold())
    number, gold = read_number(left), read_number(right)
    return None if number is None or gold is None else float(same_number(number, gold))


def marked_answer(completion: str) -> str | None:
    r"""The content of the last ``\boxed{}``, else the text after the last ``####``; ``None`` without either."""
    text = _after_thinking(completion)
    boxed = last_boxed(text)
    if boxed is None and FINAL_MARK in text:
        return text.rpartition(FINAL_MARK)[2].strip().partition("\n")[0]
    return boxed


def said_answer(completion: str) -> str | None:
    """The rest of the line after the last "answer is" or "answer:"; ``None`` without one."""
    said = _ANSWER_IS.findall(_after_thinking(completion))
    return said[-1].strip() if said else None


def gold_answer(answer: str | int | float) -> str:
    r"""The gold answer, also if the column holds a worked solution that ends in ``#### 72`` or ``\boxed{72}``."""
    text = str(answer).strip()
    if FINAL_MARK in text:
        return text.rpartition(FINAL_MARK)[2].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` with balanced braces; ``None`` if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return None


def tidy(text: str) -> str:
    """The text without delimiters, currency, emphasis and final full stop, with spaces and minus signs in one form."""
    text = text.strip().replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\,", " ")
    for mark in ("\\$", "$", "\\(", "\\)", "**"):
        text = text.replace(mark, "")
    text = _PERCENT.sub("%", _TEXT.sub(r"\1", text))
    return text.strip().rstrip(".").rstrip()


Number = tuple[Fraction, str]
"""A value and how it was written: integer, decimal, fraction or percent."""


def read_number(text: str) -> Number | None:
    """Reads a tidy text as a number, without its unit; ``None`` if it is not one number."""
    bare = _UNIT.sub("", text)
    percent = bare.endswith("%")
    bare = bare.removesuffix("%").replace("- ", "-").strip()
    if match := _NUMBER.fullmatch(bare):
        value, kind = Fraction(bare.replace(",", "")), "decimal" if match[1] else "integer"
    elif match := _FRACTION.fullmatch(bare):
        top, bottom = (int(part) for part in match.groups()[1:] if part is not None)
        if bottom == 0:
            return None
        value, kind = Fraction(-top if match[1] == "-" else top, bottom), "fraction"
    else:
        return None
    return value, "percent" if percent else kind


def same_number(left: Number, right: Number) -> bool:
    """True if two numbers are equal: to six decimals if one is written as a decimal, as in math-verify."""
    (a, a_kind), (b, b_kind) = left, right
    if (a_kind == "percent") != (b_kind == "percent"):
        a, b = (a, b) if a_kind == "percent" else (b, a)
        return a == b or round(a / 100, 6) == round(b, 6)
    if "decimal" in (a_kind, b_kind) and "integer" not in (a_kind, b_kind):
        return round(a, 6) == round(b, 6)
    return a == b


def _symbolic(completion: str, gold: str) -> float:
    # math-verify limits time with signals, which cannot stop sympy's C code; the pool's limit kills the process.
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # at every start it warns that the limit is missing
    marked = marked_answer(completion)
    text = _after_thinking(completion) if marked is None else _as_boxed(marked)
    expected = parse(_as_boxed(gold), parsing_timeout=0)
    return float(verify(expected, parse(text, parsing_timeout=0), timeout_seconds=0))


def _as_boxed(text: str) -> str:
    return text if "$" in text else f"\\boxed{{{text}}}"


def _after_thinking(completion: str) -> str:
    return completion.rpartition("</think>")[2]
