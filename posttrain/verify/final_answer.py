r"""Finds the final answer in a completion, in time that grows with its length and no faster.

The model writes the text, and the process that trains reads it: every search here is bounded.
"""

from __future__ import annotations

import re

FINAL_MARK = "####"  # GSM8K, Cobbe et al. 2021, arXiv:2110.14168
LONGEST_TEXT = 100_000  # characters at the end of a completion in which a mark is looked for
LONGEST_ANSWER = 1000  # characters; a longer text is no final answer, and neither regular expressions nor sympy read it
LONGEST_SAID = 10_000  # characters at the end in which "the answer is" is looked for
MOST_BOXES = 20  # boxes that are read as one list
MOST_HEADINGS = 20  # "####" that are passed over as headings

_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]{0,3}\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(
    r"[\s$.,;:)(\]\[\\]{0,20}(?:(?:and|or)\b[\s$]{0,10})?(?:[A-Za-z](?:_\w)?\s?=\s?)?", re.IGNORECASE
)
_ANSWER_IS = re.compile(
    r"\banswer\b(?:(?:[^\n.:=?!]|\.(?=\d)){0,60}?"
    r"\b(?:is|are|was|equals|(?:would|should|must) be)\b(?:\s{0,3}:)?|[^\n.:=?!]{0,60}?[:=]|[*_ \t]{0,4}\n)[*_\s]{0,8}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$|\*|\")")
_CLAUSE_END = re.compile(
    r",?\s+(?:because|since|as|so|which|where|given)\b|,\s+(?:the|an?|because|since|so|which|that|not)\s"
    r"|\s[-\u2013\u2014]\s+(?=[A-Za-z]{2})|\s\((?=[A-Za-z]{2}|\d[^()]{0,80}[A-Za-z=])|[.;?](?=\s|$)",
    re.IGNORECASE,
)
_DISPLAY = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}


def final_answer(completion: str, *, truncated: bool = False) -> str | None:
    r"""The answer that a completion marks; ``None`` if it marks none, and "" if the mark holds none or is cut off.

    The marks, from the first that counts to the last: ``<answer>...</answer>`` and the marks inside of it;
    ``\boxed{...}``; ``#### ...`` that is no heading; "the answer is ..." or "answer: ...". The last one of its kind
    counts. Boxes with nothing but a comma, "and" or "or" between them are one list. Thoughts (``<think>``) are left
    out.

    Args:
        truncated: the completion was cut off, so that an answer which nothing ends is not known.
    """
    text = without_thoughts(completion)[-LONGEST_TEXT:]
    start = text.rfind("<answer>")
    if start < 0:
        return _marked(text, truncated)
    inside, closing, _ = text[start + len("<answer>") :].partition("</answer>")
    if not closing and truncated:
        return ""
    deeper = _marked(inside, truncated=False)
    return inside.strip() if deeper is None else deeper


def without_thoughts(completion: str) -> str:
    """The text behind the last ``</think>``, up to a ``<think>`` that nothing closes."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def gold_answer(answer: str | int | float) -> str:
    r"""The gold answer, also if the column holds a worked solution that ends in ``#### 72`` or ``\boxed{72}``."""
    text = str(answer).strip()
    if FINAL_MARK in text:
        return text.rpartition(FINAL_MARK)[2].strip()
    boxed = boxed_answer(text)
    return text if boxed is None else boxed


def _marked(text: str, truncated: bool) -> str | None:
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    line = _after_hashes(text, truncated)
    said = said_answer(line if line else text, truncated=truncated and not line)
    return line if said is None or line == "" else said


def boxed_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, or of several in a row; ``None`` without a box, "" if it is cut off."""
    starts = [(match.start(), match.end()) for match in _BOX.finditer(text)]
    if not starts:
        return None
    contents: list[str] = []
    following = len(text)  # start of the box that was read last
    for start, begin in reversed(starts[-MOST_BOXES:]):
        end = _closing_brace(text, begin)
        if end is None or end > following:
            break
        if contents and not (following - end < 60 and _BETWEEN_BOXES.fullmatch(text, end + 1, following)):
            break
        contents.append(text[begin:end].strip())
        following = start
    return ", ".join(dict.fromkeys(reversed(contents)))


def _closing_brace(text: str, begin: int) -> int | None:
    depth = 1
    for match in _BRACES.finditer(text, begin, begin + LONGEST_ANSWER + 1):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _after_hashes(text: str, truncated: bool) -> str | None:
    """The line behind the last ``####`` that is no heading: a heading begins with a word, and lines follow it."""
    end = len(text)
    for _ in range(MOST_HEADINGS):
        start = text.rfind(FINAL_MARK, 0, end)
        if start < 0:
            return None
        line, newline, rest = text[start + len(FINAL_MARK) :].lstrip().partition("\n")
        if not (line[:1].isalpha() and rest[:LONGEST_ANSWER].strip()):
            return "" if truncated and not newline else line.strip()
        end = start
    return None


def said_answer(text: str, *, truncated: bool = False) -> str | None:
    """The sentence behind the last "the answer is" or "answer:"; ``None`` without one, "" if it is cut off.

    One in which nothing can be an answer to a question for a number ("the answer is correct") is passed over if an
    earlier one has digits.
    """
    tail = text[-LONGEST_SAID:]
    found = [_sentence(tail[match.end() :]) for match in _ANSWER_IS.finditer(tail)]
    found = [(sentence, open_end) for sentence, open_end in found if sentence]
    if not found:
        return None
    with_digits = [pair for pair in found[-5:] if any(map(str.isdigit, pair[0]))]
    sentence, open_end = (with_digits or found)[-1]
    return "" if truncated and open_end else sentence


def _sentence(text: str) -> tuple[str, bool]:
    """The first sentence or displayed formula of a text, and True if only the end of the text ends it."""
    text = text[: LONGEST_ANSWER + 1].lstrip()
    if (closing := _DISPLAY.get(text[:2])) is not None:
        inside, closed, _ = text[2:].partition(closing)
        if closed:
            return inside.strip(), False
    line, newline, _ = text.partition("\n")
    ends = _SENTENCE_END.search(line)
    sentence = line if ends is None else line[: ends.start()]
    return sentence.strip(), ends is None and not newline


def first_clause(sentence: str) -> str:
    """A said answer without its reason: "blue because the sky is blue" is "blue"."""
    ends = _CLAUSE_END.search(sentence)
    return sentence if ends is None or not ends.start() else sentence[: ends.start()]
