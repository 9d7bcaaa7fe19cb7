"""A world small enough to enumerate: every string, every value, and the distribution of any decoder.

A decoder is run once for every sequence of choices that it, or the engine below it, can make; the probability of a
sequence is the product of its choices' probabilities. The code that runs is the one that runs on vLLM.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from function_score import FunctionScore
from tabular_engine import TabularEngine

from posttrain.decoding.prefixes import Prefix, ScoreKind
from posttrain.engines.base import Completion, Sampling
from posttrain.engines.choice import MakeChooser, seeded_chooser

PROMPT = (0,)
Outcome = TypeVar("Outcome", bound=Hashable)
String = tuple[int, ...]


@dataclass(frozen=True)
class World:
    """A distribution of strings of at most ``length`` tokens, which end early with ``eos``, and a reward for each."""

    logits: Mapping[String, list[float]]  # by prefix, the prompt included
    reward: Mapping[String, float]  # by whole string, the prompt not included
    vocabulary: int
    length: int
    eos: int | None = None
    beta: float = 0.7

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.length)

    def engine(self, make_chooser: MakeChooser = seeded_chooser) -> TabularEngine:
        return TabularEngine(
            self.logits,
            eos=() if self.eos is None else (self.eos,),
            max_model_len=len(PROMPT) + self.length,
            make_chooser=make_chooser,
        )

    def next_distribution(self, string: String) -> list[float]:
        """Scalar softmax of the table."""
        powers = [math.exp(logit) for logit in self.logits[PROMPT + string]]
        return [power / sum(powers) for power in powers]

    def ended(self, string: String) -> bool:
        return len(string) == self.length or (len(string) > 0 and string[-1] == self.eos)

    @property
    def strings(self) -> dict[String, float]:
        """p0 of every whole string."""
        return {s: p for s, p in self.prefixes.items() if self.ended(s)}

    @property
    def prefixes(self) -> dict[String, float]:
        """p0 of every prefix, the empty one and whole strings included."""
        found: dict[String, float] = {(): 1.0}
        level: list[String] = [()]
        while level:
            following = {
                (*s, a): found[s] * p
                for s in level
                if not self.ended(s)
                for a, p in enumerate(self.next_distribution(s))
            }
            found |= following
            level = list(following)
        return found

    def recursive(self, backup: Callable[[list[float], list[float]], float]) -> dict[String, float]:
        """Values of all prefixes by recursion from rewards: ``backup(values, probabilities)`` of the next ones."""
        values: dict[String, float] = {}
        for string in sorted(self.prefixes, key=len, reverse=True):
            if self.ended(string):
                values[string] = self.reward[string]
            else:
                distribution = self.next_distribution(string)
                values[string] = backup([values[(*string, a)] for a in range(self.vocabulary)], distribution)
        return values

    def mean_values(self) -> dict[String, float]:
        return self.recursive(
            lambda values, distribution: sum(p * v for v, p in zip(values, distribution, strict=True))
        )

    def soft_values(self, beta: float | None = None) -> dict[String, float]:
        b = beta or self.beta
        return self.recursive(
            lambda values, distribution: (
                b * math.log(sum(p * math.exp(v / b) for v, p in zip(values, distribution, strict=True)))
            )
        )

    def max_values(self) -> dict[String, float]:
        return self.recursive(lambda values, distribution: max(values))

    def tilted(self, beta: float | None = None) -> dict[String, float]:
        """p0(y) exp(r(y) / β) / Z."""
        weights = {y: p * math.exp(self.reward[y] / (beta or self.beta)) for y, p in self.strings.items()}
        return {y: w / sum(weights.values()) for y, w in weights.items()}

    def log_z(self, beta: float | None = None) -> float:
        return math.log(sum(p * math.exp(self.reward[y] / (beta or self.beta)) for y, p in self.strings.items()))

    def objective(self, distribution: Mapping[String, float], beta: float | None = None) -> float:
        """E[r] - β KL to p0."""
        return sum(p * self.reward[y] for y, p in distribution.items()) - (beta or self.beta) * kl(
            distribution, self.strings
        )


def make_world(seed: int = 0, *, vocabulary: int = 3, length: int = 3, eos: bool = False) -> World:
    """Random logits and rewards, without ties."""
    draw = random.Random(seed)
    end = vocabulary - 1 if eos else None
    strings = [s for n in range(length + 1) for s in itertools.product(range(vocabulary), repeat=n)]
    going = [s for s in strings if len(s) < length and end not in s]
    logits = {PROMPT + s: [draw.gauss(0, 1) for _ in range(vocabulary)] for s in going}
    whole = [s for s in strings if s and s[:-1] in going and (len(s) == length or s[-1] == end)]
    return World(logits, {s: draw.gauss(0, 1) for s in whole}, vocabulary, length, end)


def kl(distribution: Mapping[String, float], base: Mapping[String, float]) -> float:
    return sum(p * math.log(p / base[y]) for y, p in distribution.items() if p > 0)


def distance(one: Mapping[Outcome, float], other: Mapping[Outcome, float]) -> float:
    """Largest difference of two distributions."""
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})


def total_variation(one: Mapping[Outcome, float], other: Mapping[Outcome, float]) -> float:
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other}) / 2


class Script:
    """A chooser that follows a list of choices and from its end on takes the first possible one."""

    def __init__(self, choices: Sequence[int]) -> None:
        self.choices = list(choices)
        self.made = 0
        self.probability = 1.0
        self.alternatives: list[list[int]] = []  # scripts that leave this one where it went beyond its list

    def __call__(self, probabilities: Sequence[float]) -> int:
        if self.made == len(self.choices):
            first, *others = [index for index, p in enumerate(probabilities) if p > 0]
            self.alternatives += [[*self.choices, index] for index in others]
            self.choices.append(first)
        index = self.choices[self.made]
        self.made += 1
        self.probability *= probabilities[index] / sum(probabilities)
        return index


def distribution_of(run: Callable[[MakeChooser], Outcome]) -> dict[Outcome, float]:
    """The distribution of what ``run`` returns, by running it once for every sequence of choices.

    Args:
        run: given the maker of all choosers, returns an outcome; whatever is random in it comes from them.
    """
    distribution: dict[Outcome, float] = {}
    waiting: list[list[int]] = [[]]
    while waiting:
        script = Script(waiting.pop())
        outcome = run(functools.partial(_same, script))
        distribution[outcome] = distribution.get(outcome, 0.0) + script.probability
        waiting += script.alternatives
    assert abs(sum(distribution.values()) - 1) < 1e-9
    return distribution


def _same(script: Script, seed: int) -> Script:
    """One chooser serves all seeds."""
    return script


def tokens_of(completions: list[list[Completion]]) -> String:
    """The first completion of the first prompt."""
    return tuple(completions[0][0].tokens)


def table_score(values: Mapping[String, float], kind: ScoreKind = "mean", beta: float | None = None) -> FunctionScore:
    """A score that looks values up by what was generated."""
    return FunctionScore(
        function=lambda prefixes: [values[tuple(prefix.generated)] for prefix in prefixes], kind=kind, beta=beta
    )


@dataclass(frozen=True)
class TableOfNext:
    """Score read from a table, as vectors over the vocabulary."""

    values: Mapping[String, float]
    vocabulary: int
    kind: ScoreKind = "mean"
    beta: float | None = None
    scale: float = 1.0

    def score(self, prefixes: Sequence[Prefix]) -> torch.Tensor:
        return torch.tensor([self.values[tuple(prefix.generated)] for prefix in prefixes], dtype=torch.float64)

    def score_next(self, prefixes: Sequence[Prefix]) -> torch.Tensor:
        rows = [[self.values[(*prefix.generated, a)] for a in range(self.vocabulary)] for prefix in prefixes]
        return torch.tensor(rows, dtype=torch.float64)
