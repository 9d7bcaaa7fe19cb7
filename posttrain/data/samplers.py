"""Prompt samplers choose the next rows. Each is a pure function of its state, so that all processes draw the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from posttrain.errors import DataError

SMALLEST = 1e-9  # least weight of a row: rows of weight 0 are drawn when there is no other row left


class PromptSampler(Protocol):
    """A part of the slot ``prompts``, built as ``cls(size=..., seed=..., **options)``."""

    def draw(self, n: int) -> list[int]:
        """Draws the next ``n`` rows."""
        ...

    def update(self, index: Sequence[int], outcomes: Sequence[Sequence[float]]) -> None:
        """Learns from the scores of the prompts ``index`` of all processes; NaN is unscored."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """State for a checkpoint: plain numbers, strings and lists."""
        ...

    @state.setter
    def state(self, state: dict[str, Any]) -> None: ...


class _Epochs:
    """Passes over all rows, each in an order that depends only on the seed and the pass."""

    def __init__(self, *, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = _checked(size), seed, shuffle
        self.epoch, self.offset = 0, 0
        self._order = self._order_of(0)

    def draw(self, n: int) -> list[int]:
        """Draws the next ``n`` rows; a new pass begins where one ends."""
        drawn: list[int] = []
        while len(drawn) < n:
            if self.offset == self.size:
                self.epoch, self.offset = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            rows = self._order[self.offset : self.offset + n - len(drawn)]
            self.offset += len(rows)
            drawn += rows.tolist()
        return drawn

    def update(self, index: Sequence[int], outcomes: Sequence[Sequence[float]]) -> None:
        """Does nothing: this order does not depend on scores."""

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
    """Sampler that :func:`by_failure` makes."""

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
        """Draws ``n`` rows, each at most once until all have been drawn."""
        drawn: list[int] = []
        while len(drawn) < n:
            noise = np.random.default_rng([self.seed, self.draws]).gumbel(size=self.size)
            self.draws += 1
            # The n largest of log weight + Gumbel noise are a draw without replacement (Kool et al. 2019, 1903.06059).
            order = np.argsort(-(np.log(np.maximum(self.weights, SMALLEST)) + noise), kind="stable")
            drawn += order[: n - len(drawn)].tolist()
        return drawn

    def update(self, index: Sequence[int], outcomes: Sequence[Sequence[float]]) -> None:
        """Counts tries, and adds scores, clamped to [0, 1]."""
        for row, scores in zip(index, outcomes, strict=True):
            scored = np.array([score for score in scores if not math.isnan(score)])
            self._tries[row] += len(scored)
            self._successes[row] += scored.clip(0, 1).sum()

    @property
    def state(self) -> dict[str, Any]:
        """Number of draws, and tries and successes of the rows that have been tried."""
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
    """Goes through all rows in random order, reshuffled for every pass."""
    return _Epochs(size=size, seed=seed, shuffle=True)


def sequential(*, size: int, seed: int) -> PromptSampler:
    """Goes through all rows in the order of the dataset, again and again; ``seed`` changes nothing."""
    return _Epochs(size=size, seed=seed, shuffle=False)


def by_failure(*, size: int, seed: int, unseen: float = 1.0, floor: float = 0.0) -> PromptSampler:
    """Draws rows with probability proportional to 1 - success rate.

    Kimi Team 2025 (arXiv:2501.12599), prioritized sampling.

    Args:
        unseen: weight of a row that has not been tried.
        floor: least weight of a row that has been tried, so that solved ones are drawn again.
    """
    return _ByFailure(size=size, seed=seed, unseen=unseen, floor=floor)


def _checked(size: int) -> int:
    if size < 1:
        raise ValueError(f"a sampler needs rows to draw from; size is {size}")
    return size


def _check_size(saved: int, size: int) -> None:
    if saved != size:
        raise DataError(
            f"the checkpoint's prompt sampler was saved for a dataset of {saved} rows, but this one has {size}: "
            "resume with the same `data` section, or start a new run"
        )
