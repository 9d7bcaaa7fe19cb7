"""The base of all engines. Requests join and leave while others are sampled; ``generate`` is made of requests."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from posttrain.batch import Finish
from posttrain.engines.base import Aborted, Completion, OnCompletion, Request, RequestUpdate, Sampling, Shaper
from posttrain.engines.requests import check_prompts, check_settings, check_shaper, check_vocabulary
from posttrain.seeds import FreshSeeds, sample_seed

_numbers = itertools.count(1)  # numbers of requests, each used once in a process


@dataclass(slots=True)
class _InFlight:
    """A request that has not ended, with its tokens so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class SteppingEngine(ABC):
    """An engine that samples all its requests side by side, one token of each at every step.

    Requests may be submitted and aborted between steps. An engine belongs to one thread.

    Args:
        max_model_len: most tokens of a prompt and its completion together.
        seed: seed of the random seeds for calls of ``generate`` without seeds.
    """

    def __init__(self, *, max_model_len: int, seed: int) -> None:
        self.version = 0
        self.max_model_len = max_model_len
        self._fresh_seeds = FreshSeeds(seed)
        self._in_flight: dict[int, _InFlight] = {}
        self.vocab_size: int | None = None  # number of tokens of the model, if it is known
        self.before_step: Callable[[], None] = _nothing
        """Hook before every step, also within ``generate``. It may submit and abort requests."""

    def submit(self, request: Request) -> int:
        """Accepts a request and returns its number. The caller gets an update for each token, or for the end only.

        Raises:
            RefusedRequest: if the engine cannot take the request: the prompt leaves no room or has tokens
                that the model lacks, a setting is out of range, or a shaper comes with filters.
        """
        check_settings(request.sampling)
        check_prompts([request.prompt], request.sampling.max_tokens, self.max_model_len)
        check_vocabulary([request.prompt], self.vocab_size)
        check_shaper(request.shaper, request.sampling)
        number = next(_numbers)
        self._add(number, request)
        self._in_flight[number] = _InFlight(request)
        return number

    @property
    def in_flight(self) -> list[int]:
        """Numbers of the requests that have not ended."""
        return [*self._in_flight]

    def step(self) -> None:
        """Samples the next tokens. An error of a shaper ends only the requests with that shaper."""
        self.before_step()
        if self._in_flight:
            self._advance()

    def abort(self, numbers: Iterable[int], error: Exception | None = None) -> None:
        """Aborts requests, which get an update that says so. Requests that have ended are ignored.

        Args:
            error: the reason, for the update; :class:`posttrain.engines.base.Aborted` by default.
        """
        running = [number for number in numbers if number in self._in_flight]
        for number in running:
            self._fail(number, error or Aborted())
        if running:
            self._drop(running)

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
        """See :meth:`posttrain.engines.base.ShapingEngine.generate`. Requests in flight go on meanwhile."""
        check_settings(sampling)
        check_prompts(prompts, sampling.max_tokens, self.max_model_len)
        check_vocabulary(prompts, self.vocab_size)
        seeds = self._fresh_seeds.unless(seeds, len(prompts))
        done: list[list[Completion]] = [[None] * n for _ in prompts]  # type: ignore[list-item]
        ended: deque[tuple[int, int, RequestUpdate]] = deque()

        def collector(i: int, j: int) -> Callable[[RequestUpdate], None]:
            return lambda update: ended.append((i, j, update))

        pending: dict[tuple[int, int], int] = {}
        try:
            for i, prompt in enumerate(prompts):
                for j in range(n):
                    seed = sample_seed(seeds[i], j)
                    settings = {"sampling": sampling, "seed": seed, "shaper": shaper, "place": (i, j)}
                    pending[i, j] = self.submit(Request(prompt=prompt, on_update=collector(i, j), **settings))
            while pending:
                self.step()
                while ended:
                    i, j, update = ended.popleft()
                    done[i][j] = completion = _completed(update)
                    del pending[i, j]
                    if on_completion is not None:
                        on_completion(i, j, completion)
        finally:  # after an exception, such as one of a callback, no request may stay for the next call
            self.abort(pending.values())
        return done

    @abstractmethod
    def forget_prefixes(self) -> None:
        """Forgets cached prefixes, so that what comes next does not depend on what came before."""

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`."""

    @abstractmethod
    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`."""

    @abstractmethod
    def _add(self, number: int, request: Request) -> None:
        """Adds a request, which is sampled from the next step on."""

    @abstractmethod
    def _advance(self) -> None:
        """Samples the next tokens and calls :meth:`_grow` and :meth:`_fail`."""

    @abstractmethod
    def _drop(self, numbers: Sequence[int]) -> None:
        """Stops sampling requests that are no longer in flight."""

    def _grow(self, number: int, tokens: list[int], logps: list[float], finish: Finish | None) -> None:
        """Reports new tokens of a request; with ``finish`` they are its last tokens."""
        flight = self._in_flight[number]
        flight.tokens += tokens
        flight.logps += logps
        completion = None
        if finish is not None:
            del self._in_flight[number]
            completion = Completion(flight.tokens, flight.logps, finish, self.version)
        flight.request.on_update(RequestUpdate(tokens, logps, completion))

    def _fail(self, number: int, error: Exception) -> None:
        """Ends a request with an error instead of a completion."""
        self._in_flight.pop(number).request.on_update(RequestUpdate(error=error))


def _nothing() -> None:
    """The default hook before a step: does nothing."""


def _completed(update: RequestUpdate) -> Completion:
    if update.error is not None:
        raise update.error
    assert update.completion is not None
    return update.completion
