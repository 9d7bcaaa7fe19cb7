"""What all engines share: requests that join and leave while others are sampled, and ``generate`` on top of them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from posttrain.batch import Finish
from posttrain.engines.base import Aborted, Completion, OnCompletion, Request, RequestUpdate, Sampling, Shaper
from posttrain.engines.requests import check_prompts, check_shaper
from posttrain.seeds import FreshSeeds, sample_seed

_numbers = itertools.count(1)  # of requests: no two of a process are equal


@dataclass(slots=True)
class _InFlight:
    request: Request
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class SteppingEngine(ABC):
    """An engine that samples all requests it has been given side by side, a token of each at every step.

    Requests may be submitted and aborted between steps. An engine belongs to one thread.

    Args:
        max_model_len: most tokens of a prompt and its completion together.
        seed: of the seeds drawn where ``generate`` is given none.
    """

    def __init__(self, *, max_model_len: int, seed: int) -> None:
        self.version = 0
        self.max_model_len = max_model_len
        self._fresh_seeds = FreshSeeds(seed)
        self._in_flight: dict[int, _InFlight] = {}
        self.before_step: Callable[[], None] = _nothing
        """Called before every step, those of ``generate`` too: the moment to submit or abort other requests."""

    def submit(self, request: Request) -> int:
        """Takes a request in; returns its number. Its caller is told of each token or of the end alone.

        Raises:
            ValueError: for a prompt that leaves no room, or a shaper together with filters.
        """
        check_prompts([request.prompt], request.sampling.max_tokens, self.max_model_len)
        check_shaper(request.shaper, request.sampling)
        number = next(_numbers)
        self._add(number, request)
        self._in_flight[number] = _InFlight(request)
        return number

    @property
    def in_flight(self) -> list[int]:
        """The numbers of requests that have not ended."""
        return [*self._in_flight]

    def step(self) -> None:
        """Samples on. What a shaper raises ends its requests and no others."""
        self.before_step()
        if self._in_flight:
            self._advance()

    def abort(self, numbers: Iterable[int]) -> None:
        """Takes requests back, who are told so; those that have ended are left alone."""
        taken = [number for number in numbers if number in self._in_flight]
        for number in taken:
            self._fail(number, Aborted())
        if taken:
            self._drop(taken)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
        shaper: Shaper | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.ShapingEngine.generate`. Requests in flight go on beside these."""
        check_prompts(prompts, sampling.max_tokens, self.max_model_len)
        seeds = self._fresh_seeds.unless(seeds, len(prompts))
        done: list[list[Completion]] = [[None] * n for _ in prompts]  # type: ignore[list-item]
        ended: deque[tuple[int, int, RequestUpdate]] = deque()

        def teller(i: int, j: int) -> Callable[[RequestUpdate], None]:
            return lambda update: ended.append((i, j, update))

        pending: dict[tuple[int, int], int] = {}
        try:
            for i, prompt in enumerate(prompts):
                for j in range(n):
                    seed = sample_seed(seeds[i], j)
                    terms = {"sampling": sampling, "seed": seed, "shaper": shaper, "place": (i, j)}
                    pending[i, j] = self.submit(Request(prompt=prompt, on_update=teller(i, j), **terms))
            while pending:
                self.step()
                while ended:
                    i, j, update = ended.popleft()
                    done[i][j] = completion = _completed(update)
                    del pending[i, j]
                    if on_completion is not None:
                        on_completion(i, j, completion)
        finally:  # an exception, of a callback for one, must not leave requests behind for the next call
            self.abort(pending.values())
        return done

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`."""

    @abstractmethod
    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`."""

    @abstractmethod
    def _add(self, number: int, request: Request) -> None:
        """The request will be sampled from the next step on."""

    @abstractmethod
    def _advance(self) -> None:
        """Samples on, calling :meth:`_grow` and :meth:`_fail`."""

    @abstractmethod
    def _drop(self, numbers: Sequence[int]) -> None:
        """These requests are no longer in flight: no more time should go into them."""

    def _grow(self, number: int, tokens: list[int], logps: list[float], finish: Finish | None) -> None:
        """Tells of new tokens; with ``finish`` they are the last."""
        flight = self._in_flight[number]
        flight.tokens += tokens
        flight.logps += logps
        completion = None
        if finish is not None:
            del self._in_flight[number]
            completion = Completion(flight.tokens, flight.logps, finish, self.version)
        flight.request.on_update(RequestUpdate(tokens, logps, completion))

    def _fail(self, number: int, error: Exception) -> None:
        """The request ends without a completion."""
        self._in_flight.pop(number).request.on_update(RequestUpdate(error=error))


def _nothing() -> None:
    """Nobody has anything to do before a step."""


def _completed(update: RequestUpdate) -> Completion:
    if update.error is not None:
        raise update.error
    assert update.completion is not None
    return update.completion
