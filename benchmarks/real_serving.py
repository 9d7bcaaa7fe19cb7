"""Starts ``posttrain serve`` and asks it for held-out sums with OpenAI's client: a process of ``real_model.py``."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai

from posttrain.system.files import read_rows


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(client: openai.OpenAI, server: subprocess.Popen[bytes], seconds: float = 300) -> str:
    """Waits for the server; returns the name of its model."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return client.models.list().data[0].id
        except openai.APIConnectionError:
            time.sleep(1)
    raise RuntimeError(f"the server did not answer within {seconds:.0f} s; it returned {server.poll()}")


def ask(client: openai.OpenAI, model: str, messages: Any) -> str:
    """The answer to a conversation."""
    reply = client.chat.completions.create(model=model, messages=messages)
    return reply.choices[0].message.content or ""


def main(recipe: str, rows: str, count: str, result: str) -> None:
    """Writes the share of right sums among the first ``count`` rows."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "posttrain", "serve", recipe, f"--server.port={port}"])
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        model = wait_until_ready(client, server)
        asked = read_rows(Path(rows))[: int(count)]
        answers = [ask(client, model, row["prompt"]) for row in asked]
    finally:
        server.terminate()
        server.wait(60)
    for row, answer in zip(asked, answers, strict=True):
        print(row["prompt"][-1]["content"], "->", answer)
    right = [
        (re.findall(r"\d+", answer) or [""])[-1] == row["answer"] for row, answer in zip(asked, answers, strict=True)
    ]
    Path(result).write_text(json.dumps({"after": sum(right) / len(right), "rows": len(right)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
