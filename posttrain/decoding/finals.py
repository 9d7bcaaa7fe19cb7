"""Which particle of a population is the answer, and what an answer is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

from posttrain.decoding import particles as rules
from posttrain.decoding.context import Answer
from posttrain.decoding.particles import Particle
from posttrain.engines.choice import Chooser
from posttrain.verify.mathematics import marked_answer, read_number, said_answer, tidy

Decode = Callable[[Sequence[int]], str]


def best(particles: Sequence[Particle], choose: Chooser, decode: Decode) -> int:
    """The highest score; the first of several."""
    return rules.best(particles, choose)


def weighted(particles: Sequence[Particle], choose: Chooser, decode: Decode) -> int:
    """Drawn with probability proportional to the importance weights."""
    return rules.weighted(particles, choose)


def mathematics(text: str) -> Hashable:
    r"""What the completion marks as its answer (``\boxed{}``, ``####``, "answer is"), numbers as numbers."""
    marked = marked_answer(text)
    written = said_answer(text) if marked is None else marked
    if written is None or not (plain := tidy(written)):
        return None
    number = read_number(plain)
    return plain if number is None else number[0]


def whole_text(text: str) -> Hashable:
    """The completion itself, without spaces at its ends."""
    return text.strip() or None


def vote(
    particles: Sequence[Particle],
    choose: Chooser,
    decode: Decode,
    *,
    answer: Answer = mathematics,
    by: Literal["count", "sum", "max"] = "count",
) -> int:
    """The best-scored completion with the answer that gets most votes: see :func:`posttrain.decoding.particles.vote`.

    Majority (self-consistency): Wang et al. 2023, arXiv:2203.11171; votes weighted by scores: Feng et al. 2024,
    arXiv:2309.17179.
    """
    return rules.vote(particles, choose, answer=lambda tokens: answer(decode(tokens)), by=by)
