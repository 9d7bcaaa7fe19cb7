"""Decodes tokens to text as they arrive, and stops at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # replacement character, which decoders write for an incomplete character


class TextStream:
    """The text of tokens that come one by one. Joined, its pieces are the text of all tokens, up to a stop string.

    Args:
        decode: function from token ids to text.
        stop: strings that end the text and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        self._shown = self._context = 0  # number of tokens whose text is known; index of the first that it depends on
        self._held = ""  # text that may be the beginning of a stop string
        self.length = 0  # number of characters of the known text of all tokens so far
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds a token and returns the text that is now complete."""
        self._tokens.append(token)
        known, new = self._texts()
        if new.endswith(INCOMPLETE):
            return ""
        # Decoders of SentencePiece's kind drop the space before the first text, so the context must have some text.
        if self._decode(self._tokens[self._shown :]):
            self._context = self._shown
        self._shown = len(self._tokens)
        return self._up_to_stop(new[len(known) :])

    def finish(self) -> str:
        """Returns the remaining text: incomplete characters, and text that might have begun a stop string."""
        if self.stopped:
            return ""
        known, new = self._texts()
        text = self._up_to_stop(new[len(known) :])
        return text if self.stopped else text + self._held

    def _texts(self) -> tuple[str, str]:
        """Returns the text of the last complete tokens, without and with the tokens after them."""
        known = self._decode(self._tokens[self._context : self._shown])
        return known, self._decode(self._tokens[self._context :])

    def _up_to_stop(self, text: str) -> str:
        self.length += len(text)
        text = self._held + text
        stops = [position for position in map(text.find, self._stop) if position >= 0]
        if stops:
            self.stopped, self._held = True, ""
            return text[: min(stops)]
        keep = longest_beginning(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Number of characters at the end of ``text`` that may begin a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
