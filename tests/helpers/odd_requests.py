"""Makes requests that a server has to refuse: wrong methods, bodies, arguments and values, for every endpoint."""

from __future__ import annotations

import json
from typing import Any

MESSAGES = [{"role": "user", "content": "2+2"}]
BODIES: dict[str, dict[str, Any]] = {
    "/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 2},
    "/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 2},
    "/values": {"model": "tiny", "prompt": "Hi", "completion": "a"},
}
"""A body that each endpoint accepts."""
ENDPOINTS = tuple(BODIES)

Wire = tuple[str, str, dict[str, str], bytes]
"""Method, path, headers and body of a request."""

STRANGE: list[Any] = [{}, [[7]], "x\ud83d", -1, 10**30, float("nan"), float("inf"), -1e308, [None], {"a": {"b": None}}]
NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "logprobs", "presence_penalty"]
OTHERS = ["stop", "stop_token_ids", "ignore_eos", "stream", "stream_options", "guide", "return_token_ids", "logit_bias"]
WRONG: dict[str, list[Any]] = {
    "temperature": [2.5, 1e-40, -0.0001, True, "1", 2.0001],
    "top_p": [0, -1, 1.5, True, "0.5"],
    "top_k": [0.5, True, "3", 2**31],
    "min_p": [1, 2, True],
    "max_tokens": [0, 1.5, True, "5", 2**31, 159],
    "n": [0, 1025, 1.0, True],
    "seed": [2**63, 0.5, True, "1"],
    "stop": ["", [""], [1], ["a"] * 17],
    "stop_token_ids": [[-1], [2**31], [0.5], [True]],
    "guide": [{"strength": "1"}, {"strength": True}, {"x": 1}],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["required"],
    "response_format": [{"type": "json_object"}],
    "logit_bias": [{"1": 5}],
    "echo": [True],
    "store": [True],
}
MESSAGE_LISTS: list[Any] = [
    None, [], {}, "x", [None], [[]], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": None, "content": "x"}],
    [{"role": "", "content": "x"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": 7}], [{"role": "user", "content": {"text": "x"}}],
    [{"role": "user", "content": "half \udc00"}], [{"role": "user", "content": "x", "weight": 0}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "x" * 500}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}], [{"role": "assistant", "content": "x", "refusal": "no"}],
]  # fmt: skip
PROMPTS: list[Any] = [
    None, "", [], {}, 7, True, [""], [[]], [1, "a"], [[1], "a"], [-1], [10**9], [10**30], [1.5], [True], "x" * 500,
    "x\ud83d", ["a", None], [[[1]]], [1] * 500, {"a": 1},
]  # fmt: skip


def odd_requests() -> list[Wire]:
    """Makes more than 300 requests; a server answers each of them by a status from 400 to 499."""
    return [*_bodies(), *_raw(), *_methods()]


def _bodies() -> list[Wire]:
    bodies: list[tuple[str, dict[str, Any]]] = []
    for path in ("/completions", "/chat/completions"):
        for name in [*NUMBERS, *OTHERS]:
            accepted = {"logprobs": [-1] if path == "/completions" else [], "seed": [-1]}.get(name, [])
            kept = [value for value in STRANGE if name != "seed" or value != -1]
            kept = [value for value in kept if not (value == {} and name in ("logit_bias", "stream_options", "guide"))]
            bodies += [(path, {name: value}) for value in [*kept, *(value for value in accepted if name != "seed")]]
        bodies += [(path, {name: value}) for name, values in WRONG.items() for value in values]
    bodies += [("/chat/completions", {"messages": messages}) for messages in MESSAGE_LISTS]
    bodies += [("/completions", {"prompt": prompt}) for prompt in PROMPTS]
    bodies += [
        ("/values", {key: value})
        for key in ("prompt", "completion")
        for value in PROMPTS
        if value != "" or key == "prompt"
    ]
    bodies += [(path, {key: value}) for path in ENDPOINTS for key in ("model", "unknown") for value in (7, {}, [1])]
    bodies += [(path, {"model": "\ud83d"}) for path in ENDPOINTS] + [(path, {"\ud83d": 1}) for path in ENDPOINTS]
    for arguments in ({"chat_template": "{{ 1 }}"}, {"x": "\ud83d"}, {"tools": [1]}):
        bodies.append(("/chat/completions", {"chat_template_kwargs": arguments}))
    return [_post(path, json.dumps(BODIES[path] | change).encode()) for path, change in bodies]


def _raw() -> list[Wire]:
    deep, long = b"[" * 100_000, b'{"n": ' + b"9" * 10_000 + b"}"
    raw = [b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"\x00", b'{"a": 1} x', deep, b'{"a":' * 50_000, long]
    return [_post(path, body) for path in ENDPOINTS for body in raw] + [
        _post(path, json.dumps(BODIES[path]).encode(), kind)
        for path in ENDPOINTS
        for kind in ("text/plain", "multipart/form-data", "x")
    ]


def _methods() -> list[Wire]:
    wrong = [(method, f"/v1{path}") for path in ENDPOINTS for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD")]
    wrong += [(method, path) for path in ("/health", "/v1/models") for method in ("POST", "PUT", "DELETE")]
    wrong += [("GET", path) for path in ("/", "/v1", "/v1/models/other", "/v1/models/%00", "/v1/%ff", "/v1/embeddings")]
    return [(method, path, {}, b"") for method, path in wrong]


def _post(path: str, body: bytes, kind: str = "application/json") -> Wire:
    return "POST", f"/v1{path}", {"Content-Type": kind}, body
