"""Limits on the requests that run and that wait; further ones are refused."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from posttrain.serving.errors import ApiError
from posttrain.serving.protocol import MAX_CHOICES


class Limit:
    """Lets requests in, first come first served.

    Args:
        requests: number of requests that run at the same time.
        queue: number of requests that may wait for a slot.
    """

    def __init__(self, requests: int, queue: int) -> None:
        self._slots, self._queue = asyncio.Semaphore(requests), queue
        self.waiting = 0

    async def enter(self) -> None:
        """Waits for a slot, which :meth:`leave` releases.

        Raises:
            ApiError: 429 if too many wait already.
        """
        if self._slots.locked() and self.waiting >= self._queue:
            message = f"the server is full: {self.waiting} requests wait. Try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=1)
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1

    def leave(self) -> None:
        """Releases the slot."""
        self._slots.release()


def check_texts(
    text: str | Sequence[object], param: str, tokenizer: PreTrainedTokenizerBase, max_model_len: int
) -> None:
    """Refuses texts that are not Unicode or too long for the model, before they are tokenised, which takes time.

    A token stands for at most as many bytes as the longest one of the vocabulary.

    Args:
        text: one text, or several; token ids among them are not counted.
        param: key of the request.

    Raises:
        ApiError: if a text has half of a surrogate pair, or more bytes than any text of ``max_model_len`` tokens.
    """
    most = max_model_len * longest_token(tokenizer)
    for one in [text] if isinstance(text, str) else text:
        if not isinstance(one, str):
            continue
        try:
            size = len(one.encode())
        except UnicodeEncodeError as error:
            message = f"{param}: holds half of a surrogate pair, which is no character"
            raise ApiError(400, message, param=param, code="invalid_value") from error
        if size > most:
            message = f"{param}: This model's maximum context length is {max_model_len} tokens, which "
            message += f"stand for at most {most} bytes; a text has {size}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")


@functools.lru_cache(maxsize=8)
def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the longest token of a vocabulary."""
    return max(len(token.encode("utf-8", "surrogatepass")) for token in tokenizer.get_vocab())


def check_choices(prompts: int, n: int) -> None:
    """Raises ``ApiError`` if a request asks for too many completions."""
    if prompts * n > MAX_CHOICES:
        message = f"n: {prompts} prompts with {n} completions each are more than {MAX_CHOICES} completions in a request"
        raise ApiError(400, message, param="n", code="invalid_value")
