"""Tests of ``posttrain serve`` with OpenAI's own client: log-probs, streams, clients at once, limits and errors."""

from __future__ import annotations

import socket
import time
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from function_score import FunctionScore
from odd_requests import BODIES, ENDPOINTS, odd_requests
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from served import MESSAGES, Server, guide, recipe_file, save_scalar_value, serving
from transformers import AutoModelForCausalLM

from posttrain.models.value_files import load_value

LOGPS = {"logprobs": 0, "extra_body": {"return_token_ids": True}}


@pytest.fixture(scope="module")
def value_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scalar_value(tmp_path_factory.mktemp("value"), tiny_model_folder)


@pytest.fixture(scope="module")
def plain(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a guide, on the transformers engine; one request runs, and two may wait."""
    server = {"port": 0, "name": "tiny", "requests": 1, "queue": 2}
    with serving(recipe_file(tmp_path_factory.mktemp("plain"), tiny_model_folder, server=server)) as server:
        yield server


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.engine) for name in ("transformers", "vllm")]
)
def guided(request, tiny_model_folder: Path, value_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    if request.param == "vllm":
        pytest.importorskip("vllm")
    decoder = {"use": "shaped", "k": 4, "strength": 2.0, "score": {"use": "value", "model": str(value_folder)}}
    path = recipe_file(tmp_path_factory.mktemp("guided"), tiny_model_folder, decoder=decoder)
    with serving(path, f"--engine.use={request.param}") as server:
        yield server


# ------------------------------------------------------------------------------------------------------- log-probs


@torch.no_grad()
def base_logps(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The model's log-probs [tokens, V] at each token, from a plain forward pass."""
    logits = model(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def guided_logps(model: Any, value: Any, prompt: list[int], tokens: list[int], strength: float) -> torch.Tensor:
    """Guided log-probs by definition: the four most probable tokens, each with the value of the extended text."""
    rows = []
    for t, logps in enumerate(base_logps(model, prompt, tokens)):
        top = logps.topk(4)
        extended = torch.tensor([[*prompt, *tokens[:t], int(token)] for token in top.indices])
        states = torch.zeros_like(extended, dtype=torch.bool)
        states[:, -1] = True
        values = value(extended, states)[0][:, -1]
        rows.append(torch.full_like(logps, -torch.inf).scatter(0, top.indices, top.values + strength * values))
    return torch.stack(rows).log_softmax(-1)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


def test_log_probs_are_those_of_a_forward_pass(guided: Server, model, value_folder: Path):
    value = load_value(str(value_folder)).eval()
    for body in ({"guide": False, "return_token_ids": True}, guide(0.0), guide(1.5), {"return_token_ids": True}):
        (choice,) = guided.complete(seed=1, max_tokens=8, logprobs=0, extra_body=body).choices
        tokens, prompt = choice.token_ids, choice.prompt_token_ids
        strength = {"guide": 2.0}.get("guide", 0) if "guide" not in body else body["guide"] and body["guide"]["lambda"]
        logps = guided_logps(model, value, prompt, tokens, strength) if strength else base_logps(model, prompt, tokens)
        expected = logps.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(tokens)
        assert choice.logprobs.top_logprobs is None
        assert ("measured" in choice.model_extra) == bool(strength)


def test_log_probs_of_a_chat(guided: Server, model):
    request = {"seed": 2, "max_tokens": 8, "logprobs": True}
    (choice,) = guided.chat(**request, extra_body={"guide": False, "return_token_ids": True}).choices
    tokens, prompt = choice.token_ids, choice.prompt_token_ids
    assert guided.served.tokenizer.decode(prompt) == "<|user|>2+2<|end|><|assistant|>"
    expected = base_logps(model, prompt, tokens).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(expected, abs=1e-3)
    for token, number in zip(choice.logprobs.content, tokens, strict=True):
        assert token.token == guided.served.tokenizer.decode([number])
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


@pytest.mark.engine
def test_values_of_every_beginning(guided: Server, value_folder: Path):
    reply = httpx.post(f"{guided.url}/values", json={"model": "tiny", "prompt": "Hi", "completion": "abc"}).json()
    value = load_value(str(value_folder)).eval()
    tokens = torch.tensor([guided.served.tokenizer("Hiabc")["input_ids"]])
    with torch.no_grad():
        expected = value(tokens, torch.ones_like(tokens, dtype=torch.bool))[0][0, 1:]
    assert reply["values"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert (reply["tokens"], reply["kind"]) == (["a", "b", "c"], "mean")
    chat = {"model": "tiny", "messages": MESSAGES, "completion": "abc"}
    rendered = {"model": "tiny", "prompt": "<|user|>2+2<|end|><|assistant|>", "completion": "abc"}
    values = [httpx.post(f"{guided.url}/values", json=body).json()["values"] for body in (chat, rendered)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


# ------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("body", [{"guide": False}, {}, {"guide": {"strength": 0.5}}], ids=str)
def test_a_stream_joined_is_the_whole(guided: Server, body: dict[str, Any]):
    request = {"seed": 5, "n": 4, "logprobs": 0, "extra_body": body}
    whole = guided.complete(**request)
    texts, logps, finishes, pieces = [""] * 4, [[], [], [], []], [None] * 4, 0
    for event in guided.complete(**request, stream=True, stream_options={"include_usage": True}):
        if not event.choices:
            assert event.usage == whole.usage
            continue
        assert event.usage is None
        (choice,) = event.choices
        texts[choice.index] += choice.text
        logps[choice.index] += choice.logprobs.token_logprobs
        finishes[choice.index] = choice.finish_reason
        pieces += 1
    assert texts == [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3] and len(set(texts)) > 1
    assert finishes == [choice.finish_reason for choice in whole.choices]
    for streamed, choice in zip(logps, whole.choices, strict=True):
        assert streamed == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)
    assert pieces == whole.usage.completion_tokens  # each event has one token
    assert whole.usage.prompt_tokens == 5


def test_a_streamed_chat_joined_is_the_whole(guided: Server):
    whole = guided.chat(seed=5, n=2)
    events = list(guided.chat(seed=5, n=2, stream=True))
    for index, choice in enumerate(whole.choices):
        pieces = [event.choices[0] for event in events if event.choices[0].index == index]
        assert pieces[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        assert pieces[-1].finish_reason == choice.finish_reason
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert len({event.id for event in events}) == 1


def test_a_stop_string_ends_the_text_before_it(guided: Server):
    (whole,) = guided.complete(seed=1).choices
    stop = whole.text[3]
    expected = whole.text[: whole.text.index(stop)]
    stopped = guided.complete(seed=1, stop=["never to be seen", stop])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (expected, "stop")
    assert stopped.usage.completion_tokens < 12
    events = [event.choices[0] for event in guided.complete(seed=1, stop=stop, stream=True)]
    assert "".join(event.text for event in events) == expected
    assert events[-1].finish_reason == "stop"
    assert guided.idle()


# ------------------------------------------------------------------------------------------------ several at a time


def test_clients_with_different_strengths_at_once_do_not_mix(guided: Server):
    requests = [{"seed": i, "logprobs": 0, "extra_body": guide(0.5 * (i % 4))} for i in range(8)]

    def answer(request: dict[str, Any]) -> tuple[list[int], list[float]]:
        (choice,) = guided.complete(["Hello", "Hi", "x"][request["seed"] % 3], **request).choices
        return choice.token_ids, choice.logprobs.token_logprobs

    alone = [answer(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, requests))
    for (tokens, logps), (expected, expected_logps) in zip(together, alone, strict=True):
        assert tokens == expected
        assert logps == pytest.approx(expected_logps, abs=1e-4)


def test_prompts_of_a_request(guided: Server):
    ids = guided.served.tokenizer("Hello")["input_ids"]
    request = {"seed": 3, "n": 2, "extra_body": {"return_token_ids": True}}
    single = guided.complete("Hello", **request)
    assert [c.text for c in guided.complete(ids, **request).choices] == [c.text for c in single.choices]
    both = guided.complete([ids, [5, 6]], **request)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.prompt_token_ids for choice in both.choices] == [ids, ids, [5, 6], [5, 6]]
    assert [c.text for c in both.choices[:2]] == [c.text for c in single.choices]
    twice = guided.complete(["Hello", "Hello"], **request)
    assert twice.choices[0].text != twice.choices[2].text  # each prompt has its own seed
    assert both.usage.prompt_tokens == len(ids) + 2


def test_sampling_stops_when_a_client_hangs_up(guided: Server):
    endless = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    stream = guided.complete(stream=True, **endless)
    next(iter(stream))
    stream.close()
    assert guided.idle()
    with pytest.raises(openai.APITimeoutError):
        guided.client.with_options(timeout=0.05).completions.create(model="tiny", prompt="Hello", **endless)
    assert guided.idle()


def test_an_error_of_a_score_reaches_only_its_own_requests(guided: Server, monkeypatch: pytest.MonkeyPatch):
    expected = guided.complete(seed=1, extra_body={"guide": False}).choices[0].text

    def broken(prefixes: Any) -> list[float]:
        raise ArithmeticError("no value")

    with monkeypatch.context() as patch:
        patch.setattr(guided.served.decoder, "score", FunctionScore(function=broken))
        with ThreadPoolExecutor(2) as pool:
            plain = pool.submit(guided.complete, seed=1, extra_body={"guide": False})
            failing = pool.submit(guided.complete, seed=1)
            with pytest.raises(openai.InternalServerError, match="ArithmeticError: no value"):
                failing.result()
            assert plain.result().choices[0].text == expected
        with pytest.raises(openai.APIError, match="ArithmeticError: no value"):
            list(guided.complete(seed=1, stream=True))
    assert guided.complete(seed=1).choices[0].finish_reason == "length"


# ------------------------------------------------------------------------------------------------------ the limit


def long_answer(server: Server, seed: int) -> Any:
    """Sends a request that takes a while, and returns the answer."""
    return server.complete(seed=seed, max_tokens=60, extra_body={"ignore_eos": True})


@pytest.mark.engine
def test_requests_over_the_limit_wait_or_are_refused_and_none_is_lost(plain: Server):
    alone = [long_answer(plain, seed).choices[0].text for seed in range(3)]
    answers: dict[int, str] = {}
    refused: list[openai.RateLimitError] = []

    def ask(seed: int) -> None:
        try:
            answers[seed] = long_answer(plain, seed % 3).choices[0].text
        except openai.RateLimitError as error:
            refused.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert len(answers) + len(refused) == 8 and len(answers) >= 3 and refused
    assert all(text == alone[seed % 3] for seed, text in answers.items())
    body: Any = refused[0].body
    assert (refused[0].status_code, body["type"], body["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert refused[0].response.headers["retry-after"] == "1"
    assert long_answer(plain, 0).choices[0].text == alone[0]  # the slots are free again


def test_a_client_that_hangs_up_in_the_queue_frees_its_place(plain: Server):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(long_answer, plain, 0)
        time.sleep(0.05)
        with pytest.raises(openai.APITimeoutError):
            plain.client.with_options(timeout=0.05).completions.create(model="tiny", prompt="x", max_tokens=100)
        first.result()
    assert plain.served.limit.waiting == 0
    assert plain.complete(seed=1).choices[0].text


# ---------------------------------------------------------------------------------------------------------- errors

REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "other"}, 404, "model", "this server has 'tiny'"),
    ({"prompt": []}, 400, "prompt", "a list of token ids"),
    ({"prompt": ""}, 400, "prompt", "is empty"),
    ({"prompt": [1, "a"]}, 400, "prompt", "a list of token ids"),
    ({"prompt": [7, 100000]}, 400, "prompt", "token 100000"),
    ({"prompt": None}, 400, "prompt", "should be a string"),
    ({"prompt": "x" * 200}, 400, "prompt", "maximum context length is 160 tokens: the prompt has 200"),
    ({"max_tokens": 156}, 400, "max_tokens", "the prompt has 5, and max_tokens asks for 156"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
    ({"temperature": 1e-40}, 400, "temperature", "should be 0"),
    ({"temperature": True}, 400, "temperature", "valid number"),
    ({"temperature": [1]}, 400, "temperature", "valid number"),
    ({"n": 600, "prompt": ["a", "b"]}, 400, "n", "more than 1024"),
    ({"prompt": "a" * 10_000}, 400, "prompt", "stand for at most"),
    ({"temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"temprature": 1.0}, 400, "temprature", "unknown argument"),
    ({"logprobs": 5}, 400, "logprobs", "logprobs: "),
    ({"echo": True}, 400, "echo", "echo: "),
    ({"best_of": 3}, 400, "best_of", "best_of: "),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
    ({"stop": [""]}, 400, "stop", "at least 1 character"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    ({"guide": {"strength": 1.0}}, 400, "guide", "its recipe has no decoder"),
    ({"guide": {"strenght": 1.0}}, 400, "guide", "unknown argument"),
]


@pytest.mark.parametrize(("change", "status", "param", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_malformed_requests_get_errors_in_openais_shape(plain: Server, change, status, param, message):
    body = {"model": "tiny", "prompt": "Hello"} | change
    reply = httpx.post(f"{plain.url}/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"]


def test_errors_are_the_clients_own_kinds(plain: Server):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        plain.client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        plain.chat(logprobs=True, top_logprobs=3)
    with pytest.raises(openai.BadRequestError, match="is not JSON|JSON object"):
        plain.client.post("/completions", cast_to=object, content=b"{no")
    with pytest.raises(openai.NotFoundError):
        plain.client.embeddings.create(model="tiny", input="Hello")
    assert httpx.get(f"{plain.url}/completions").json()["error"]["message"] == "Method Not Allowed"


def test_models_and_health(plain: Server):
    (listed,) = plain.client.models.list().data
    assert (listed.id, listed.max_model_len, listed.guide) == ("tiny", 160, None)
    assert plain.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        plain.client.models.retrieve("other")
    assert httpx.get(plain.url.replace("/v1", "/health")).status_code == 200


# ------------------------------------------------------------------------------------------------------ odd requests


def check_odd_requests(server: Server) -> None:
    """Sends odd requests and checks that each is answered by an error of its own, and that the server goes on."""
    good = {"model": "tiny", "prompt": "Hello", "seed": 1, "guide": False}
    before = httpx.post(f"{server.url}/completions", json=good).json()["choices"]
    requests = odd_requests()
    assert len(requests) >= 300
    with httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=20) as client:
        for method, path, headers, body in requests:
            reply = client.request(method, path, headers=headers, content=body)
            assert 400 <= reply.status_code < 500, (method, path, body[:200], reply.status_code, reply.text)
            if method != "HEAD":
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert server.idle()
    assert httpx.get(server.url.replace("/v1", "/health")).status_code == 200
    assert httpx.post(f"{server.url}/completions", json=good).json()["choices"] == before


def test_odd_requests_get_errors_and_the_server_goes_on(plain: Server):
    check_odd_requests(plain)


@pytest.mark.engine
def test_odd_requests_to_a_guided_server(guided: Server):
    check_odd_requests(guided)


def test_a_long_body_is_refused_before_it_is_read_as_json(plain: Server):
    for path in ENDPOINTS:
        start = time.monotonic()
        reply = httpx.post(f"{plain.url}{path}", content=b'{"prompt": "' + b"a" * 5_000_000)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_long")
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("path", ENDPOINTS)
def test_clients_that_hang_up_within_a_body_leave_nothing(plain: Server, path: str):
    port = int(plain.url.rpartition(":")[2].removesuffix("/v1"))
    for part in (b"", b'{"model": "tiny"', b'{"model": "tiny", "prompt": "Hello"}'):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = (
                f"POST /v1{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
            )
            connection.sendall(head.encode() + part)
    assert plain.complete(seed=1).choices[0].text and plain.served.limit.waiting == 0


def test_a_message_of_the_server_can_be_sent_back(plain: Server):
    message = plain.chat(max_tokens=3).choices[0].message
    full = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None, "reasoning_content": None}
    for answer in (message, message.model_dump(), message.model_dump() | full):
        second: Any = [*MESSAGES, answer, {"role": "user", "content": "3"}]
        reply = plain.client.chat.completions.create(model="tiny", messages=second, max_tokens=3)
        assert reply.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("/completions", completion_create_params.CompletionCreateParamsNonStreaming),
        ("/chat/completions", chat_create_params.CompletionCreateParamsNonStreaming),
    ],
    ids=["completions", "chat"],
)
def test_every_argument_of_openais_client_may_be_null_and_strange_values_are_named(plain: Server, path: str, kinds):
    body = BODIES[path]
    for name in typing.get_type_hints(kinds):
        if name in body:
            continue
        reply = httpx.post(f"{plain.url}{path}", json=body | {name: None})
        assert reply.status_code == 200, (name, reply.text)
        reply = httpx.post(f"{plain.url}{path}", json=body | {name: [[7]]})
        assert reply.status_code == 400 and name in reply.json()["error"]["message"], (name, reply.text)
