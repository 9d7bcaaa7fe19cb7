"""The thread that samples. Other threads submit jobs, and it calls them back with new tokens.

The engine and decoders that work token by token accept jobs while earlier jobs are sampled. Other decoders finish a
round of jobs with equal settings in one call; meanwhile plain jobs go on, and new jobs for the decoder wait.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.decoding.base import Decoder
from posttrain.decoding.shaping import Shaped
from posttrain.engines.base import Aborted, Completion, Engine, Request, RequestUpdate, Sampling
from posttrain.engines.stepping import SteppingEngine
from posttrain.seeds import sample_seed

OnUpdate = Callable[[int, RequestUpdate], None]
"""Callback in the worker's thread, with the index of a sample and its update; must not raise."""


@dataclass(eq=False, kw_only=True)
class Job:
    """A job of ``n`` completions of one prompt, equal to those that ``generate`` returns for this seed."""

    prompt: Sequence[int]
    sampling: Sampling
    n: int
    seed: int
    on_update: OnUpdate
    decoder: Engine  # engine or decoder that samples it
    strength: float | None = None  # strength of a token-wise decoder
    stream: bool = False
    numbers: dict[int, int] = field(default_factory=dict)  # the engine's number of each submitted sample
    ended: set[int] = field(default_factory=set)  # samples of a round that have been reported
    cancelled: bool = False


class _Closing(Exception):
    """The error for jobs that have not ended when the server ends."""


class Worker:
    """A thread that owns an engine; no other thread may use the engine while it runs.

    Args:
        engine: the engine that samples.
    """

    def __init__(self, engine: SteppingEngine) -> None:
        self._engine = engine
        engine.before_step = self._between_steps
        self._alone = False  # True: the running round allows no other requests
        self._commands: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []  # jobs for the next rounds
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: Exception | None = None  # error of the engine, after which it samples no more
        self.on_failure: Callable[[], None] = _nothing
        """Callback in the worker's thread after the engine has failed."""

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the current step. Jobs that have not ended get an error."""
        self._commands.put(None)
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Submits a job. Thread-safe."""
        self.call(lambda: self._take(job))

    def cancel(self, job: Job, sample: int | None = None) -> None:
        """Cancels a job, or one sample of it. Thread-safe."""
        self.call(lambda: self._cancel(job) if sample is None else self._abort(job, [sample]))

    def call(self, action: Callable[[], Any]) -> None:
        """Schedules a call between two steps. Thread-safe."""
        self._commands.put(action)

    @property
    def broken(self) -> Exception | None:
        """The error of the engine that ended the sampling; None while it samples, and after :meth:`close`."""
        return None if isinstance(self.failure, _Closing) else self.failure

    @property
    def alive(self) -> bool:
        """True while the thread samples."""
        return self._thread.is_alive() and self.failure is None

    def _run(self) -> None:
        try:
            while True:
                self._run_commands(wait=not self._engine.in_flight and not self._waiting)
                if self._waiting and not (_alone(self._waiting[0]) and self._engine.in_flight):
                    self._round()
                else:
                    self._engine.step()
        except Exception as error:  # reported to all jobs that wait, and by /health
            self.failure = error
        self._tell_all(self.failure)
        while not isinstance(self.failure, _Closing) and (command := self._commands.get()) is not None:
            command()

    def _tell_all(self, failure: Exception) -> None:
        """Tells all jobs that have not ended why, and that the engine is broken to those who wait for that."""
        closing = isinstance(failure, _Closing)
        try:
            self._engine.abort(self._engine.in_flight, None if closing else failure)
        except Exception as error:  # a broken engine may refuse this too; its requests have been told before
            failure.add_note(f"the engine could not abort its requests: {error!r}")
        for job in self._waiting:
            _fail(job, Aborted() if closing else failure)
        if not closing:
            self.on_failure()

    def _between_steps(self) -> None:
        if not self._alone:
            self._run_commands(wait=False)

    def _run_commands(self, *, wait: bool) -> None:
        """Carries out the calls since the last step; with ``wait`` blocks until there is one."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            if command is None:
                raise _Closing
            command()
            wait = False

    def _take(self, job: Job) -> None:
        if self.failure is not None:
            _fail(job, self.failure)
        elif job.cancelled:
            _fail(job, Aborted())
        elif job.decoder is self._engine or isinstance(job.decoder, Shaped):
            for sample in range(job.n):
                self._submit(job, sample)
        else:
            self._waiting.append(job)

    def _submit(self, job: Job, sample: int) -> None:
        request = Request(
            prompt=job.prompt,
            sampling=job.sampling,
            seed=sample_seed(job.seed, sample),
            on_update=lambda update: job.on_update(sample, update),
            stream=job.stream,
        )
        try:
            if isinstance(job.decoder, Shaped):
                number = job.decoder.submit(request, strength=job.strength)
            else:
                number = self._engine.submit(request)
        except Exception as error:  # the answer to this request; others go on
            job.on_update(sample, RequestUpdate(error=error))
        else:
            job.numbers[sample] = number

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        self._abort(job, job.numbers)
        if job in self._waiting:
            self._waiting.remove(job)
            _fail(job, Aborted())

    def _abort(self, job: Job, samples: Iterable[int]) -> None:
        self._engine.abort([job.numbers[sample] for sample in samples if sample in job.numbers])

    def _round(self) -> None:
        """Completes waiting jobs with equal settings in one call."""
        first = self._waiting[0]
        jobs = [job for job in self._waiting if _settings(job) == _settings(first)]
        self._waiting = [job for job in self._waiting if job not in jobs]
        self._alone = _alone(first)
        try:
            self._complete(jobs)
        finally:
            self._alone = False

    def _complete(self, jobs: Sequence[Job]) -> None:
        """Completes jobs in one call; if that fails, one by one, so that only those at fault get the error."""
        first = jobs[0]

        def ended(i: int, sample: int, completion: Completion) -> None:
            if sample not in jobs[i].ended:
                jobs[i].ended.add(sample)
                jobs[i].on_update(sample, RequestUpdate(completion.tokens, completion.logps, completion))

        prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
        try:
            first.decoder.generate(prompts, first.sampling, first.n, seeds=seeds, on_completion=ended)
        except _Closing:
            for job in jobs:
                _fail(job, Aborted())
            raise
        except Exception as error:  # reported to the jobs at fault
            if len(jobs) == 1:
                _fail(first, error)
                return
            waiting = [job for job in jobs if len(job.ended) < job.n]
            for place, job in enumerate(waiting):
                try:
                    self._complete([job])
                except _Closing:
                    for later in waiting[place + 1 :]:
                        _fail(later, Aborted())
                    raise


def _alone(job: Job) -> bool:
    return isinstance(job.decoder, Decoder) and job.decoder.alone


def _settings(job: Job) -> tuple[Any, ...]:
    return id(job.decoder), job.sampling, job.n


def _fail(job: Job, error: Exception) -> None:
    for sample in range(job.n):
        if sample not in job.ended:
            job.on_update(sample, RequestUpdate(error=error))


def _nothing() -> None:
    """The default callback after a failure: does nothing."""
