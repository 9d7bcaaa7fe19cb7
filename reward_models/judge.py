"""Judges: a language model behind an OpenAI-compatible endpoint that rates completions or compares them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch
from posttrain.errors import RecipeError
from posttrain.parts.preference.games import Rivals
from reward_models.comparing import Comparer
from reward_models.loading import prompts_of

RATE = (
    "Rate how well the answer does what is asked for, from 1 (not at all) to 10 (perfectly). Judge what is right and "
    "helpful, not length or style. Give your reasons in one or two sentences, and end with the rating as [[7]].\n\n"
    "[What was asked]\n{prompt}\n\n[The answer]\n{completion}"
)
COMPARE = (
    "Which of the two answers does better what is asked for? Judge what is right and helpful, not length, style or the "
    "order in which they stand. Give your reasons in one or two sentences, and end with [[A]], [[B]], or [[C]] for a "
    "tie.\n\n[What was asked]\n{prompt}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}"
)
RATING, CHOICE = r"\[\[(-?\d+(?:\.\d+)?)\]\]", r"\[\[([ABC])\]\]"
FIRST_WINS = {"A": 1.0, "B": 0.0, "C": 0.5}
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class JudgeError(RuntimeError):
    """The endpoint does not answer, or does not answer in the form that was asked for."""


class Endpoint:
    """An OpenAI-compatible ``/chat/completions``, asked with bounded concurrency.

    Args:
        url: up to the version, such as ``http://localhost:8000/v1``.
        model: its name there.
        key_variable: environment variable with the key; without it none is sent.
        temperature: of the judge.
        max_tokens: of its answer.
        concurrent: requests at the same time.
        timeout: seconds for one request.
        retries: further attempts after a timeout, a broken connection, a status such as 429 or 503, or an answer
            without a verdict.
        backoff: seconds before the first further attempt; doubled each time.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        temperature: float = 0.0,
        max_tokens: int = 512,
        concurrent: int = 16,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise RecipeError(f"judge: url {url!r} begins neither with http:// nor https://")
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.temperature, self.max_tokens = temperature, max_tokens
        self.concurrent, self.timeout, self.retries, self.backoff = concurrent, timeout, retries, backoff

    def ask(self, questions: Sequence[str], read: Callable[[str], float | None]) -> list[float]:
        """The verdict on each question.

        Args:
            read: the judge's words to a number; None where there is no verdict in them.

        Raises:
            JudgeError: for a question that found no verdict in all attempts.
        """
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with (
            httpx.Client(timeout=self.timeout, headers=headers) as client,
            ThreadPoolExecutor(max_workers=self.concurrent) as threads,
        ):
            waiting = [threads.submit(self._verdict, client, question, read) for question in questions]
            try:
                return [future.result() for future in waiting]
            except JudgeError:
                threads.shutdown(cancel_futures=True)  # the others would be asked for nothing
                raise

    def _verdict(self, client: httpx.Client, question: str, read: Callable[[str], float | None]) -> float:
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            answer, problem = self._answer(client, question)
            if answer is not None:
                if (verdict := read(answer)) is not None:
                    return verdict
                problem = f"there is no verdict in its answer {answer[-200:]!r}"
        raise JudgeError(f"judge {self.model!r} at {self.url}: {problem} ({self.retries + 1} attempts)")

    def _answer(self, client: httpx.Client, question: str) -> tuple[str | None, str]:
        """What the judge says, or None and what went wrong.

        Raises:
            JudgeError: for a status that another attempt would not change.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        try:
            response = client.post(f"{self.url}/chat/completions", json=body)
        except httpx.TimeoutException:
            return None, f"no answer in {self.timeout:g} s"
        except httpx.TransportError as error:
            return None, f"{type(error).__name__}: {error}"
        if response.status_code in RETRIED:
            return None, f"status {response.status_code}: {response.text[:200]}"
        if response.status_code != 200:
            raise JudgeError(
                f"judge {self.model!r} at {self.url}: status {response.status_code}: {response.text[:200]}"
            )
        try:
            return str(response.json()["choices"][0]["message"]["content"] or ""), ""
        except (ValueError, LookupError, TypeError):
            return None, f"not an answer of a chat model: {response.text[:200]!r}"


class Judge:
    """A rating of each completion.

    r = (rating - low) / (high - low), in [0, 1] for ratings from ``low`` to ``high``

    Zheng et al. 2023 (single-answer grading), section 3.1, arXiv:2306.05685.

    Args:
        template: of the question; ``{prompt}`` and ``{completion}`` are filled in.
        pattern: regular expression whose first group is the rating; the last match counts.
        low: rating that is worth 0.
        high: rating that is worth 1.
        endpoint: see :class:`Endpoint`: ``url``, ``model``, ...

    Raises:
        RecipeError: for a template without its places.
    """

    def __init__(
        self, *, template: str = RATE, pattern: str = RATING, low: float = 1.0, high: float = 10.0, **endpoint: Any
    ) -> None:
        check_template(template, ("prompt", "completion"))
        self.template, self.pattern, self.low, self.high = template, re.compile(pattern), low, high
        self.endpoint = make_endpoint(endpoint)

    def needs(self) -> set[str]:
        """Fields of the batch that it reads."""
        return {"rows", "texts"}

    def __call__(self, batch: Batch) -> Float[Tensor, " N"]:
        """The reward of each completion."""
        return self.of_texts(prompts_of(batch), batch.texts)

    def of_texts(self, prompts: Sequence[Any], completions: Sequence[str]) -> Float[Tensor, " M"]:
        """The rewards of completions in text."""
        pairs = zip(prompts, completions, strict=True)
        questions = [filled(self.template, prompt=as_text(prompt), completion=text) for prompt, text in pairs]
        ratings = self.endpoint.ask(questions, self._read)
        return (torch.tensor(ratings) - self.low) / (self.high - self.low)

    def _read(self, answer: str) -> float | None:
        """The last rating in the answer, if it lies between ``low`` and ``high``."""
        found = self.pattern.findall(answer)
        rating = float(found[-1]) if found else None
        return rating if rating is not None and self.low <= rating <= self.high else None


class PairwiseJudge(Comparer):
    """The share of a group's other completions that a completion beats, by a judge who is asked in both orders.

    See :class:`reward_models.comparing.Comparer`; a tie is ½.

    Args:
        template: of the question; ``{prompt}``, ``{a}`` and ``{b}`` are filled in.
        pattern: regular expression whose first group is A, B or C (a tie); the last match counts.
        against: see :class:`reward_models.comparing.Comparer`.
        itself: see there.
        center: see there.
        endpoint: see :class:`Endpoint`: ``url``, ``model``, ...

    Raises:
        RecipeError: for a template without its places.
    """

    def __init__(
        self,
        *,
        template: str = COMPARE,
        pattern: str = CHOICE,
        against: Rivals = "group",
        itself: bool = False,
        center: float = 0.0,
        **endpoint: Any,
    ) -> None:
        check_template(template, ("prompt", "a", "b"))
        super().__init__(against=against, itself=itself, center=center)
        self.template, self.pattern, self.endpoint = template, re.compile(pattern), make_endpoint(endpoint)

    def needs(self) -> set[str]:
        """Fields of the batch that it reads."""
        return {"rows", "texts", "group"}

    def first_wins(self, ordered: Sequence[tuple[Any, str, str]]) -> Float[Tensor, " Q"]:
        """See :meth:`reward_models.comparing.Comparer.first_wins`."""
        questions = [filled(self.template, prompt=as_text(prompt), a=a, b=b) for prompt, a, b in ordered]
        return torch.tensor(self.endpoint.ask(questions, self._read))

    def _read(self, answer: str) -> float | None:
        found = self.pattern.findall(answer)
        return FIRST_WINS.get(found[-1]) if found else None


def make_endpoint(options: dict[str, Any]) -> Endpoint:
    """
    Raises:
        RecipeError: for options that an endpoint does not have, or without those that it must have.
    """
    try:
        return Endpoint(**options)
    except TypeError as error:
        raise RecipeError(f"judge: {str(error).removeprefix('Endpoint.__init__() ')}") from None


def as_text(prompt: Any) -> str:
    """A prompt as a judge reads it: messages under their roles, or the user's only one as it is."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def filled(template: str, **values: str) -> str:
    """The template with its places filled in one pass: braces in what is filled in are left alone."""
    places = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({places})\}}", lambda match: values[match[1]], template)


def check_template(template: str, places: Iterable[str]) -> None:
    """
    Raises:
        RecipeError: for a template without one of its places.
    """
    missing = [place for place in places if f"{{{place}}}" not in template]
    if missing:
        raise RecipeError(f"judge: the template has no place {{{missing[0]}}}")
