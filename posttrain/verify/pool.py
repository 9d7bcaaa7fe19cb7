"""The pool of verifiers: completions are submitted as they end, verdicts are collected together."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessPool
from pebble.pool.process import WORKERS_NAME

from posttrain.errors import VerifierError
from posttrain.system.interrupts import uninterrupted
from posttrain.verify import worker
from posttrain.verify.event_loop import EventLoop
from posttrain.verify.functions import IN_PROCESS, WRONG_IF_STUCK
from posttrain.verify.leftovers import end_leftovers, new_mark
from posttrain.verify.output import WorkerOutput
from posttrain.verify.signature import Signature, batch_arguments, signature_of
from posttrain.verify.worker import Failed, Outcome, Source

if TYPE_CHECKING:
    from posttrain.recipe.part import Part

CALLS_PER_WORKER = 20_000  # then a fresh process takes over, so that caches and leaks of verifiers stay bounded


@dataclass(frozen=True, slots=True)
class Verdict:
    """The score of a completion and the value of each verifier."""

    score: float  # sum of weight * value over the verifiers that apply; NaN: unscored; 0 in a recipe with none at all
    values: Mapping[str, float | None]  # value of each verifier; None: does not apply, or failed (``on_error: skip``)


@dataclass(frozen=True, slots=True)
class Verifier:
    """A part of the slot ``verify``, in the form in which the pool calls it."""

    name: str  # unique in the recipe
    part: Part
    signature: Signature
    quick: Callable[..., float | None] | None  # fast version, which decides in this process if it can
    wrong_if_stuck: bool  # True: a completion that it is stuck on scores 0
    source: Source


@dataclass(slots=True)
class _Item:
    """A submitted completion and the outcomes of its verifiers so far."""

    text: str
    token_ids: Sequence[int]
    row: Mapping[str, Any]
    place: str
    finish: str = ""
    prompt_text: str = ""
    outcomes: dict[str, Outcome | Future[Any] | _Element] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Element:
    """One completion's share of a batch function's result."""

    whole: Future[Any]
    position: int


class VerifierPool:
    """Runs the verifiers of a recipe; a context manager.

    The package's own cheap verifiers run in the calling process, async ones in an event loop, and the rest in worker
    processes that are killed and replaced at the time limit. TRL-style functions run once, at :meth:`collect`.

    ``failures`` counts for each verifier the calls that raised, took too long, killed their worker or gave no number;
    ``first_failures`` has the first problem of each.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        workers: int | None = None,
        plain_text: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """
        Args:
            parts: the ``verify`` slot.
            plain_text: token ids to text without special tokens, for verifiers with ``special_tokens: false``.
            workers: number of processes. Default: this process's share of the cores, at most 8.
        """
        self.verifiers = _verifiers(parts)
        self.names = tuple(verifier.name for verifier in self.verifiers)
        self.weights = tuple(verifier.part.weight for verifier in self.verifiers)
        self.failures: Counter[str] = Counter()
        self.first_failures: dict[str, str] = {}
        self._items: dict[Hashable, _Item] = {}
        self._plain_text = plain_text
        self._workers = workers or max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self._processes: ProcessPool | None = None
        self._output: WorkerOutput | None = None
        self._mark = ""  # of the workers: see leftovers.py
        self._worker_ids: set[int] = set()
        self._event_loop: EventLoop | None = None
        if any(verifier.quick is None and not verifier.signature.asynchronous for verifier in self.verifiers):
            self._schedule(worker.ready, (), None)  # a worker's imports take seconds: better while the model loads

    def submit(
        self,
        key: Hashable,
        text: str,
        token_ids: Sequence[int],
        row: Mapping[str, Any],
        *,
        place: str = "",
        finish: str = "",
        prompt_text: str = "",
    ) -> None:
        """Starts the verification of a completion. Returns at once.

        Args:
            key: key of the verdict in the result of :meth:`collect`; keys can be sorted, and are unique until then.
            text: the completion as it was written, with special tokens and without the token that ended it.
            token_ids: tokens of the completion.
            row: columns of the dataset for this prompt.
            place: place of the row, for messages, such as ``problems.jsonl:7``.
            finish: how the completion ended: ``stopped``, ``length`` or ``aborted``.
            prompt_text: the prompt as the model read it.
        """
        if key in self._items:
            raise ValueError(f"completion {key!r} was submitted already")
        item = self._items[key] = _Item(text, token_ids, row, place or f"completion {key!r}", finish, prompt_text)
        for index, verifier in enumerate(self.verifiers):
            if not verifier.signature.batch:
                item.outcomes[verifier.name] = self._start(index, verifier, item)

    def collect(self) -> dict[Hashable, Verdict]:
        """Waits for the verdicts of all completions since the last call, and returns them in the order of keys.

        Raises:
            VerifierError: for the first completion that a verifier with ``on_error: stop`` failed on.
        """
        keys = sorted(self._items)  # type: ignore[type-var]
        items = [self._items[key] for key in keys]
        self._items = {}
        try:
            for index, verifier in enumerate(self.verifiers):
                if verifier.signature.batch:
                    self._start_batch(index, verifier, items)
            if self._processes is not None:
                self._note_workers()
            return {key: self._verdict(item) for key, item in zip(keys, items, strict=True)}
        finally:
            for item in items:
                _cancel(item)

    def close(self) -> None:
        """Ends the worker processes, even busy ones, and all that they started. Closing twice is harmless."""
        with uninterrupted():
            self._stop_processes()
            if self._output is not None:
                end_leftovers(self._worker_ids, self._mark)
                Path(self._mark).unlink(missing_ok=True)
                self._output.close()
                self._output = None
            if self._event_loop is not None:
                self._event_loop.close()
                self._event_loop = None

    def _stop_processes(self) -> None:
        if self._processes is not None:
            self._note_workers()
            self._processes.stop()
            self._processes.join()
            self._processes = None

    def _note_workers(self) -> None:
        children = multiprocessing.active_children()
        self._worker_ids.update(child.pid for child in children if child.name == WORKERS_NAME and child.pid)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, index: int, verifier: Verifier, item: _Item) -> Outcome | Future[Any]:
        columns = verifier.signature.columns(item.row)
        filled = {"completion_ids": list(item.token_ids), "finish": item.finish, "prompt_text": item.prompt_text}
        columns |= {name: value for name, value in filled.items() if verifier.signature.takes(name)}
        text = self._text_for(verifier, item)
        if verifier.quick is not None:
            arguments = {**verifier.part.options, **columns}
            outcome = worker.guarded(verifier.quick, lambda call: worker.as_value(call(text, **arguments)))
            if outcome is not None:
                return outcome
        if verifier.signature.asynchronous:
            call = functools.partial(_await_value, verifier.part.call, text, columns)
            return self._loop.submit(call, verifier.part.time_limit)
        return self._schedule(worker.call_one, (index, text, columns), verifier.part.time_limit)

    @property
    def reads_prompts(self) -> bool:
        """True if a verifier asks for the text of the prompt."""
        return any(verifier.signature.takes("prompt_text") for verifier in self.verifiers)

    def _text_for(self, verifier: Verifier, item: _Item) -> str:
        if verifier.part.special_tokens or self._plain_text is None:
            return item.text
        return self._plain_text(item.token_ids)

    def _start_batch(self, index: int, verifier: Verifier, items: Sequence[_Item]) -> None:
        if not items:
            return
        texts, ids, rows = (
            [self._text_for(verifier, i) for i in items],
            [i.token_ids for i in items],
            [i.row for i in items],
        )
        filled = [{"finish": i.finish, "prompt_text": i.prompt_text} for i in items]
        arguments = batch_arguments(verifier.signature, texts, ids, rows, filled)
        limit = verifier.part.time_limit * len(items)
        if verifier.signature.asynchronous:
            call = functools.partial(_await_values, verifier.part.call, len(items), arguments)
            whole = self._loop.submit(call, limit)
        else:
            whole = self._schedule(worker.call_batch, (index, len(items), arguments), limit)
        for position, item in enumerate(items):
            item.outcomes[verifier.name] = _Element(whole, position)

    def _schedule(self, function: Callable[..., Any], arguments: tuple, limit: float | None) -> Future[Any]:
        # The pool ends with its workers, even with idle ones.
        if self._processes is not None and not self._processes.active:
            self._stop_processes()
        if self._output is None:
            self._output, self._mark = WorkerOutput(), new_mark()
        if self._processes is None:
            self._processes = ProcessPool(
                max_workers=self._workers,
                max_tasks=CALLS_PER_WORKER,
                initializer=worker.start,
                initargs=([verifier.source for verifier in self.verifiers], self._output.writer, self._mark),
                context=multiprocessing.get_context("spawn"),
            )
        with uninterrupted():
            return self._processes.schedule(function, args=arguments, timeout=limit)

    @property
    def _loop(self) -> EventLoop:
        if self._event_loop is None or self._event_loop.blocked:
            self._event_loop = EventLoop()
        return self._event_loop

    def _verdict(self, item: _Item) -> Verdict:
        values: dict[str, float | None] = {}
        score, applicable, failed = 0.0, 0, False
        for verifier in self.verifiers:
            value = self._value(verifier, item)
            values[verifier.name] = None if isinstance(value, Failed) else value
            if isinstance(value, Failed):
                failed = True
            elif value is not None:
                score += verifier.part.weight * value
                applicable += 1
        scored = not failed and (applicable > 0 or not self.verifiers)
        return Verdict(score if scored else float("nan"), values)

    def _value(self, verifier: Verifier, item: _Item) -> Outcome:
        outcome, stuck = self._settle(verifier, item.outcomes[verifier.name])
        if not isinstance(outcome, Failed):
            return outcome
        self.failures[verifier.name] += 1
        self.first_failures.setdefault(verifier.name, outcome.problem)
        if stuck and verifier.wrong_if_stuck:
            return 0.0
        if verifier.part.on_error == "skip":
            return outcome
        columns, place = verifier.signature.columns(item.row), item.place
        if verifier.signature.batch:
            place = f"all completions of this round, the first of which is {place}"
        raise VerifierError(verifier.name, outcome.problem, place, columns, item.text, outcome.trace)

    def _settle(self, verifier: Verifier, pending: Outcome | Future[Any] | _Element) -> tuple[Outcome, bool]:
        """The result of a call, and True if the call was stuck: out of time, or its process gone."""
        if isinstance(pending, _Element):
            whole, stuck = self._settle(verifier, pending.whole)
            return (whole if isinstance(whole, Failed) else whole[pending.position]), stuck  # type: ignore[index]
        if not isinstance(pending, Future):
            return pending, False
        try:
            if verifier.signature.asynchronous:
                return self._loop.wait(pending, verifier.part.time_limit), False
            return pending.result(), False
        except TimeoutError:
            limit = f"{verifier.part.time_limit:g} s" + (" a completion" if verifier.signature.batch else "")
            return Failed(f"took longer than {limit} (`time_limit` in the recipe)"), True
        except ProcessExpired as error:
            return Failed(f"ended its worker process (exit code {error.exitcode})"), True
        except BrokenProcessPool:
            return Failed(
                "lost its worker processes, which ended without a call (were they killed for lack of memory?)"
            ), False
        except PICKLING_ERRORS as error:
            return Failed(f"cannot be sent to a worker process: {error}"), False


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PICKLING_ERRORS = (AttributeError, TypeError, pickle.PicklingError)


def numbered_names(parts: Sequence[Part]) -> tuple[str, ...]:
    """The names of parts; one that occurs again gets a number: length, length (2)."""
    seen: Counter[str] = Counter()
    names = []
    for part in parts:
        seen[part.name] += 1
        names.append(part.name if seen[part.name] == 1 else f"{part.name} ({seen[part.name]})")
    return tuple(names)


def _verifiers(parts: Sequence[Part]) -> tuple[Verifier, ...]:
    """Makes the verifiers of a slot's parts."""
    verifiers = []
    for name, part in zip(numbered_names(parts), parts, strict=True):
        signature = signature_of(part.call, part.options)
        quick, wrong_if_stuck = IN_PROCESS.get(part.target), part.target in WRONG_IF_STUCK
        verifiers.append(Verifier(name, part, signature, quick, wrong_if_stuck, _source(name, part, signature)))
    return tuple(verifiers)


def _source(name: str, part: Part, signature: Signature) -> Source:
    """Everything that a worker needs to find the verifier again.

    Raises:
        TypeError: if it exists in this process only.
    """
    if part.spec or signature.asynchronous:  # async verifiers are never called in a worker
        return Source(part.spec, part.options, None)
    try:
        pickle.dumps(part.call)
    except PICKLING_ERRORS as error:
        raise TypeError(
            f"verifier {name!r} cannot be sent to a worker process: define it at the top level of a file ({error})"
        ) from None
    return Source("", part.options, part.call)


async def _await_value(call: Callable[..., Any], text: str, columns: Mapping[str, Any]) -> float | None:
    return worker.as_value(await call(text, **columns))


async def _await_values(call: Callable[..., Any], size: int, arguments: Mapping[str, Any]) -> list[float | None]:
    return worker.as_values(await call(**arguments), size)


def _cancel(item: _Item) -> None:
    for pending in item.outcomes.values():
        future = pending.whole if isinstance(pending, _Element) else pending
        if isinstance(future, Future):
            future.cancel()
