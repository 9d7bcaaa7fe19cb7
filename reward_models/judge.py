"""Judges: language models behind an OpenAI-compatible endpoint that rate completions or compare them."""

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
from posttrain.system.long_work import LongWork
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
    """The endpoint does not answer, or its answer has no verdict in the requested form."""


class Endpoint:
    """A client of an OpenAI-compatible ``/chat/completions``, with a bounded number of requests at the same time.

    Args:
        url: address up to the version, such as ``http://localhost:8000/v1``.
        model: name of the judge at the endpoint.
        key_variable: environment variable with the key. No key is sent if the variable is not set.
        temperature: sampling temperature of the judge.
        max_tokens: most tokens of an answer.
        concurrent: most requests at the same time.
        timeout: seconds for one request.
        retries: number of further attempts after a timeout, a broken connection, a status such as 429 or 503, or an
            answer without a verdict.
        backoff: seconds before the first further attempt; doubled before each next one.

    Raises:
        RecipeError: if ``url`` is not an http address.
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
        """Asks all questions and returns the verdict on each.

        Args:
            read: finds the verdict in the judge's answer, as a number; None if there is none.

        Raises:
            JudgeError: if a question got no verdict in any attempt.
        """
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with (
            httpx.Client(timeout=self.timeout, headers=headers) as client,
            ThreadPoolExecutor(max_workers=self.concurrent) as threads,
        ):
            futures = [threads.submit(self._verdict, client, question, read) for question in questions]
            work = LongWork("judge, answers", len(questions))
            try:
                return [_counted(future.result(), work) for future in futures]
            except (JudgeError, KeyboardInterrupt):
                threads.shutdown(cancel_futures=True)  # the remaining answers would not be used
                raise

    def _verdict(self, client: httpx.Client, question: str, read: Callable[[str], float | None]) -> float:
        """Asks one question until the answer holds a verdict or no attempt is left."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            answer, problem = self._answer(client, question)
            if answer is not None:
                if (verdict := read(answer)) is not None:
                    return verdict
                problem = f"no verdict in its answer {answer[-200:]!r}"
        raise JudgeError(f"judge {self.model!r} at {self.url}: {problem} ({self.retries + 1} attempts)")

    def _answer(self, client: httpx.Client, question: str) -> tuple[str | None, str]:
        """The judge's answer, or None and the problem.

        Raises:
            JudgeError: if the status is one that another attempt would not change.
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
            return None, f"its answer has not the format of a chat completion: {response.text[:200]!r}"


def _counted(verdict: float, work: LongWork) -> float:
    """Returns the verdict, and counts it."""
    work.count()
    return verdict


class Judge:
    """Rates each completion with a judge.

    r = (rating - low) / (high - low), in [0, 1] for ratings from ``low`` to ``high``

    Zheng et al. 2023 (single-answer grading), section 3.1, arXiv:2306.05685.

    Args:
        template: template of the question; ``{prompt}`` and ``{completion}`` are filled in.
        pattern: regular expression whose first group is the rating; the last match counts.
        low: lowest rating, which gives reward 0.
        high: highest rating, which gives reward 1.
        endpoint: options of :class:`Endpoint`: ``url``, ``model``, ...

    Raises:
        RecipeError: if a placeholder is missing in the template.
    """

    def __init__(
        self, *, template: str = RATE, pattern: str = RATING, low: float = 1.0, high: float = 10.0, **endpoint: Any
    ) -> None:
        check_template(template, ("prompt", "completion"))
        self.template, self.pattern, self.low, self.high = template, re.compile(pattern), low, high
        self.endpoint = make_endpoint(endpoint)

    def needs(self) -> set[str]:
        """Fields of the batch that the judge reads."""
        return {"rows", "texts"}

    def __call__(self, batch: Batch) -> Float[Tensor, " N"]:
        """The reward of each completion."""
        return self.of_texts(prompts_of(batch), batch.texts)

    def of_texts(self, prompts: Sequence[Any], completions: Sequence[str]) -> Float[Tensor, " M"]:
        """The rewards of completions in text form."""
        pairs = zip(prompts, completions, strict=True)
        questions = [filled(self.template, prompt=as_text(prompt), completion=text) for prompt, text in pairs]
        ratings = self.endpoint.ask(questions, self._read)
        return (torch.tensor(ratings) - self.low) / (self.high - self.low)

    def _read(self, answer: str) -> float | None:
        """The last rating in the answer; None if there is none, or if it is not between ``low`` and ``high``."""
        matches = self.pattern.findall(answer)
        rating = float(matches[-1]) if matches else None
        return rating if rating is not None and self.low <= rating <= self.high else None


class PairwiseJudge(Comparer):
    """Win rates by a judge that compares two completions of a prompt, in both orders.

    See :class:`reward_models.comparing.Comparer`; a tie counts ½.

    Args:
        template: template of the question; ``{prompt}``, ``{a}`` and ``{b}`` are filled in.
        pattern: regular expression whose first group is A, B or C (a tie); the last match counts.
        against: see :class:`reward_models.comparing.Comparer`.
        itself: see :class:`reward_models.comparing.Comparer`.
        center: see :class:`reward_models.comparing.Comparer`.
        endpoint: options of :class:`Endpoint`: ``url``, ``model``, ...

    Raises:
        RecipeError: if a placeholder is missing in the template.
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
        """Fields of the batch that the judge reads."""
        return {"rows", "texts", "group"}

    def first_wins(self, ordered: Sequence[tuple[Any, str, str]]) -> Float[Tensor, " Q"]:
        """Implements :meth:`reward_models.comparing.Comparer.first_wins`."""
        questions = [filled(self.template, prompt=as_text(prompt), a=a, b=b) for prompt, a, b in ordered]
        return torch.tensor(self.endpoint.ask(questions, self._read))

    def _read(self, answer: str) -> float | None:
        """The last verdict in the answer as a score of the first completion; None if there is none."""
        matches = self.pattern.findall(answer)
        return FIRST_WINS.get(matches[-1]) if matches else None


def make_endpoint(options: dict[str, Any]) -> Endpoint:
    """Builds an endpoint from a part's options.

    Raises:
        RecipeError: if an option is unknown, or if ``url`` or ``model`` is missing.
    """
    try:
        return Endpoint(**options)
    except TypeError as error:
        raise RecipeError(f"judge: {str(error).removeprefix('Endpoint.__init__() ')}") from None


def as_text(prompt: Any) -> str:
    """Formats a prompt for a judge: messages under their roles; a single message or a text without a role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def filled(template: str, **values: str) -> str:
    """Fills in all placeholders of a template in one pass, so that braces in the values stay as they are."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)


def check_template(template: str, names: Iterable[str]) -> None:
    """Checks that a template has all placeholders.

    Raises:
        RecipeError: if a placeholder is missing.
    """
    missing = [name for name in names if f"{{{name}}}" not in template]
    if missing:
        raise RecipeError(f"judge: the template has no placeholder {{{missing[0]}}}; add it where the text goes")
