"""Rules that choose the answer among the particles of a population, and that read the answer in a text.

A rule is ``(particles, choose, decode) -> index``. ``decode`` turns token ids into text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Literal

from posttrain.decoding.particles import Particle, highest, most_voted, softmax
from posttrain.engines.choice import Chooser
from posttrain.models.text import Decode
from posttrain.option_types import Inner
from posttrain.verify.final_answer import final_answer
from posttrain.verify.numbers import read_number, tidy

Answer = Annotated[Callable[[str], Hashable], Inner("posttrain.decoding.answers", ("text",))]
"""Reads the answer in a completion; ``None`` if there is none."""

Final = Annotated[
    Callable[[Sequence[Particle], Chooser, Decode], int],
    Inner("posttrain.decoding.answers", ("particles", "choose", "decode")),
]
"""A rule that chooses the answer."""


def best(particles: Sequence[Particle], choose: Chooser, decode: Decode) -> int:
    """The particle with the highest score; the first one of several."""
    return highest(particles)


def weighted(particles: Sequence[Particle], choose: Chooser, decode: Decode) -> int:
    """A particle drawn with probability proportional to the importance weights."""
    return choose(softmax([particle.log_weight for particle in particles]))


def mathematics(text: str) -> Hashable:
    r"""Reads the answer that a completion marks (``\boxed{}``, ``####``, "answer is"); numbers become numbers."""
    answer = final_answer(text)
    if answer is None or not (plain := tidy(answer)):
        return None
    number = read_number(plain)
    return plain if number is None else number.value


def whole_text(text: str) -> Hashable:
    """Takes the whole completion as the answer, without spaces at its ends."""
    return text.strip() or None


def vote(
    particles: Sequence[Particle],
    choose: Chooser,
    decode: Decode,
    *,
    answer: Answer = mathematics,
    by: Literal["count", "sum", "max"] = "count",
) -> int:
    """The best-scored completion with the answer that gets most votes: majority, or votes weighted by scores.

    Majority (self-consistency): Wang et al. 2022, arXiv:2203.11171; votes weighted by scores: Feng et al. 2023
    (TS-LLM), arXiv:2309.17179. See :func:`posttrain.decoding.particles.most_voted`.

    Args:
        answer: reads the answer in a completion; a completion without one has no vote.
        by: ``count`` for a majority; ``sum`` or ``max`` of the scores.
    """
    answers = [answer(decode(particle.prefix.generated)) for particle in particles]
    winner = most_voted(answers, [particle.potential for particle in particles], by)
    return highest(particles) if winner is None else winner
