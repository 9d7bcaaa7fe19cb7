"""Prompt samplers: which rows come next. Each is a pure function of its state, so that all processes draw the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from posttrain.errors import DataError

SMALLEST = 1e-9  # weight of a row that would never be drawn, so that a draw larger than the others can end


class PromptSampler(Protocol):
    """What the ``prompts`` slot holds; built as ``cls(size=..., seed=..., **options)``."""

    def draw(self, n: int) -> list[int]:
        """The next ``n`` rows."""
        ...

    def update(self, index: Sequence[int], outcomes: Sequence[Sequence[float]]) -> None:
        """Learns from the scores of each of the prompts ``index``, those of all processes; NaN is unscored."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers, strings and lists."""
        ...

    @state.setter
    def state(self, state: dict[str, Any]) -> None: ...


class _Epochs:
    """Passes over all rows, each in an order that depends on the seed and the pass alone."""

    def __init__(self, *, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = _checked(size), seed, shuffle
        self.epoch, self.offset = 0, 0
        self._order = self._order_of(0)

    def draw(self, n: int) -> list[int]:
        """The next ``n`` rows; a new pass begins where one ends."""
        drawn: list[int] = []
        while len(drawn) < n:
            if self.offset == self.size:
                self.epoch, self.offset = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            taken = self._order[self.offset : self.offset + n - len(drawn)]
            self.offset += len(taken)
            drawn += taken.tolist()
        return drawn

    def update(self, index: Sequence[int], outcomes: Sequence[Sequence[float]]) -> None:
        """Nothing to learn."""

    @property
    def state(self) -> dict[str, Any]:
        """Position in the current pass."""
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "offset": self.offset}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        _check_size(state["size"], self.size)
        self.seed, self.epoch, self.offset = state["seed"], state["epoch"], state["offset"]
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)


class _ByFailure:
    """See :func:`by_failure`."""

    def __init__(self, *, size: int, seed: int, unseen: float, floor: float) -> None:
        self.size, self.seed, self.unseen, self.floor = _checked(size), seed, unseen, floor
        self.draws = 0
        self._tries = np.zeros(size)
        self._successes = np.zeros(size)

    @property
    def weights(self) -> np.ndarray:
        """Unnormalised probability of each row."""
        rate = self._successes / np.maximum(self._tries, 1)
        return np.where(self._tries > 0, np.maximum(1.0 - rate, self.floor), self.unseen)

    def draw(self, n: int) -> list[int]:
        """``n`` rows, each at most once until all have been drawn."""
        drawn: list[int] = []
        while len(drawn) < n:
            noise = np.random.default_rng([self.seed, self.draws]).gumbel(size=self.size)
            self.draws += 1
            # The n largest of log weight + Gumbel noise are a draw without replacement (Kool et al. 2019, 1903.06059).
            order = np.argsort(-(np.log(np.maximum(self.weights, SMALLEST)) + noise), kind="stable")
            drawn += order[: n - len(drawn)].tolist()
        return drawn

    def update(self, index: Sequence[int], outcomes: Sequence[Sequence[float]]) -> None:
        """Counts tries and scores, clamped to [0, 1]."""
        for row, scores in zip(index, outcomes, strict=True):
            scored = np.array([score for score in scores if not math.isnan(score)])
            self._tries[row] += len(scored)
            self._successes[row] += scored.clip(0, 1).sum()

    @property
    def state(self) -> dict[str, Any]:
        """Number of draws, and tries and successes of the rows seen."""
        seen = np.flatnonzero(self._tries)
        counts = {
            "rows": seen.tolist(),
            "tries": self._tries[seen].tolist(),
            "successes": self._successes[seen].tolist(),
        }
        return {"size": self.size, "seed": self.seed, "draws": self.draws, **counts}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        _check_size(state["size"], self.size)
        self.seed, self.draws = state["seed"], state["draws"]
        self._tries, self._successes = np.zeros(self.size), np.zeros(self.size)
        self._tries[state["rows"]] = state["tries"]
        self._successes[state["rows"]] = state["successes"]


def uniform(*, size: int, seed: int) -> PromptSampler:
    """All rows in shuffled order, then all of them in another one."""
    return _Epochs(size=size, seed=seed, shuffle=True)


def sequential(*, size: int, seed: int) -> PromptSampler:
    """All rows as they come, again and again; ``seed`` changes nothing."""
    return _Epochs(size=size, seed=seed, shuffle=False)


def by_failure(*, size: int, seed: int, unseen: float = 1.0, floor: float = 0.0) -> PromptSampler:
    """Rows with probability proportional to 1 - success rate: Kimi Team 2025 (arXiv:2501.12599), prioritized sampling.

    Args:
        unseen: weight of a row that has not been tried.
        floor: least weight of a row that has, so that solved ones are visited again.
    """
    return _ByFailure(size=size, seed=seed, unseen=unseen, floor=floor)


def _checked(size: int) -> int:
    if size < 1:
        raise ValueError(f"a sampler needs rows to draw from; size is {size}")
    return size


def _check_size(saved: int, size: int) -> None:
    if saved != size:
        raise DataError(
            f"the checkpoint's prompt sampler is of a data set of {saved} rows, this one has {size}: "
            "resume with the same `data` section, or start a new run"
        )
