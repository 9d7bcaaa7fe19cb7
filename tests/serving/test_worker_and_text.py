"""Tests of the worker thread, of text that arrives token by token, and of request bodies."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import time
from typing import Any

import pytest
from exact_world import PROMPT, make_world
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from served import MESSAGES

from posttrain.engines.base import RefusedRequest, RequestUpdate
from posttrain.engines.stepping import SteppingEngine
from posttrain.seeds import sample_seed
from posttrain.serving.errors import ApiError
from posttrain.serving.protocol import ChatRequest, CompletionRequest
from posttrain.serving.text import TextStream
from posttrain.serving.worker import Job, Worker

# ------------------------------------------------------------------------------------------------------- the worker


def test_a_closed_worker_ends_all_jobs():
    world = make_world()
    worker = Worker(engine := world.engine())
    updates: list[RequestUpdate] = []
    done = threading.Event()

    def on_update(sample: int, update: RequestUpdate) -> None:
        updates.append(update)
        done.set()

    settings = {"prompt": PROMPT, "sampling": world.sampling, "n": 2, "seed": 0, "on_update": on_update}
    worker.start()
    worker.submit(Job(**settings, decoder=engine))
    assert done.wait(5)
    worker.close()
    expected = engine.generate([PROMPT], world.sampling, 2, seeds=[0])[0]
    assert sorted(p.completion.tokens for p in updates if p.completion) == sorted(c.tokens for c in expected)
    assert not worker.alive


def test_all_jobs_get_the_error_of_the_engine(monkeypatch: pytest.MonkeyPatch):
    world = make_world()
    worker = Worker(engine := world.engine())
    updates: list[RequestUpdate] = []

    failed = threading.Event()

    def fail(self: SteppingEngine) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(type(engine), "_advance", fail)
    job = {"prompt": PROMPT, "sampling": world.sampling, "n": 1, "seed": 0, "decoder": engine}
    job["on_update"] = lambda sample, update: updates.append(update)
    worker.on_failure = failed.set
    worker.submit(Job(**job))
    worker.start()
    until = time.monotonic() + 5
    while not updates and time.monotonic() < until:
        time.sleep(0.01)
    worker.submit(Job(**job))
    worker.close()
    assert len(updates) == 2 and all(isinstance(update.error, MemoryError) for update in updates)
    assert failed.is_set() and isinstance(worker.broken, MemoryError)
    assert not worker.alive


def test_an_error_of_a_submission_is_its_own_clients_answer(monkeypatch: pytest.MonkeyPatch):
    world = make_world()
    worker = Worker(engine := world.engine())
    add, updates = type(engine)._add, {}

    def refuse(self: SteppingEngine, number: int, request: Any) -> None:
        if request.seed == sample_seed(7, 0):
            raise ArithmeticError("not this one")
        add(self, number, request)

    monkeypatch.setattr(type(engine), "_add", refuse)
    settings = {"prompt": PROMPT, "n": 1, "decoder": engine, "sampling": world.sampling}
    for seed in (6, 7, 8):
        on_update = functools.partial(lambda seed, sample, update: updates.update({seed: update}), seed)
        worker.submit(Job(**settings, seed=seed, on_update=on_update))
    too_hot = dataclasses.replace(world.sampling, temperature=2.5)
    on_update = functools.partial(lambda sample, update: updates.update(hot=update))
    worker.submit(Job(**settings | {"sampling": too_hot}, seed=9, on_update=on_update))
    worker.start()
    until = time.monotonic() + 5
    while len(updates) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert worker.alive
    worker.close()
    assert isinstance(updates[7].error, ArithmeticError) and updates[6].completion and updates[8].completion
    assert isinstance(updates["hot"].error, RefusedRequest) and "0.01 to 2" in str(updates["hot"].error)


# ------------------------------------------------------------------------------------------------- text and requests


def decode(tokens: Any) -> str:
    return bytes(tokens).decode(errors="replace")


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_pieces_of_text_joined_are_the_text_of_all_tokens(data: bytes):
    stream = TextStream(decode)
    pieces = [stream.add(byte) for byte in data]
    assert "".join(pieces) + stream.finish() == decode(data)
    assert stream.length == len(decode(data))


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4))
def test_text_ends_before_a_stop_string(text: str, stop: str):
    stream, shown = TextStream(decode, [stop]), ""
    for byte in text.encode():
        if not stream.stopped:
            shown += stream.add(byte)
    assert shown + stream.finish() == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


def test_a_stream_keeps_the_space_behind_a_special_token():
    """SentencePiece's decoders drop the space before the first text alone."""

    def sentencepiece(tokens: Any) -> str:
        return "".join("" if token == 0 else chr(token) for token in tokens).removeprefix(" ")

    for text in (" a\0 b", "\0 a\0\0 b c", " \0 \0 a", "a\0b"):
        stream, tokens = TextStream(sentencepiece), [ord(character) for character in text]
        assert "".join(map(stream.add, tokens)) + stream.finish() == sentencepiece(tokens)


def test_text_that_might_begin_a_stop_string_is_held_back():
    stream = TextStream(decode, ["END", "\n\n"])
    assert [stream.add(byte) for byte in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert stream.finish() == "EN" and not stream.stopped


def test_request_bodies_are_those_of_openai():
    request = CompletionRequest(model="m", prompt=[[1, 2], [3]], stop="x", guide={"lambda": 2})  # type: ignore[arg-type]
    assert request.stop == ["x"] and request.guide.strength == 2.0  # type: ignore[union-attr]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 7}
    )
    assert chat.messages[0].for_template == {"role": "user", "content": parts} and chat.max_tokens == 7


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"tools": [{}]},
        {"response_format": {"type": "json_object"}},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_unsupported_settings_of_a_chat_are_refused(change: dict[str, Any]):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"model": "m", "messages": MESSAGES} | change)


def test_an_error_has_openais_keys():
    body = ApiError(429, "full", code="rate_limit_exceeded").body
    assert json.loads(json.dumps(body)) == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    }
