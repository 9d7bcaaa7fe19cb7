"""Helpers for tests of ``posttrain serve``: a recipe, a server in a thread, and its clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn
import yaml
from tiny_values import save_random_value

from posttrain.models.value import ValueSpec
from posttrain.recipe.loading import load_as
from posttrain.recipe.sections import HeadSection
from posttrain.serving.recipe import ServeRecipe
from posttrain.serving.routing import Served
from posttrain.serving.server import application, listening

MESSAGES: Any = [{"role": "user", "content": "2+2"}]


def recipe_file(folder: Path, model: Path, **sections: Any) -> Path:
    """Writes a serve recipe for a model, with the sections that are passed."""
    recipe = {
        "policy": {"model": str(model)},
        "sampling": {"max_tokens": 12},
        "engine": {"use": "transformers", "cache_mb": 64, "max_model_len": 160},
        "server": {"port": 0, "name": "tiny"},
    } | sections
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def save_scalar_value(folder: Path, model: Path) -> Path:
    """Saves a value model on the tiny decoder, with random weights in its head."""
    spec = ValueSpec(head=HeadSection(type="scalar"), shift=0.5, scale=2.0)
    return save_random_value(folder, model, spec)


def guide(strength: float) -> dict[str, Any]:
    """Makes the extra body of a request that sets the guide's strength and asks for token ids."""
    return {"guide": {"lambda": strength}, "return_token_ids": True}


class Server:
    """A running server and its client."""

    def __init__(self, url: str, served: Served) -> None:
        self.url, self.served = url, served
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def complete(self, prompt: Any = "Hello", **request: Any) -> Any:
        """Sends a completion request."""
        return self.client.completions.create(model="tiny", prompt=prompt, **request)

    def chat(self, **request: Any) -> Any:
        """Sends a chat request."""
        return self.client.chat.completions.create(model="tiny", messages=MESSAGES, **request)

    def idle(self, seconds: float = 5.0) -> bool:
        """Waits until nothing is sampled any more; False if that takes longer."""
        until = time.monotonic() + seconds
        while self.served.engine.in_flight and time.monotonic() < until:
            time.sleep(0.02)
        return not self.served.engine.in_flight


@contextmanager
def serving(path: Path, *overrides: str) -> Iterator[Server]:
    """Serves a recipe in a thread until the end of the block."""
    recipe = load_as(ServeRecipe, path, overrides)
    with closing(listening(recipe.server)) as listener, application(recipe) as app:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", app.state.served)
        finally:
            server.should_exit = True
            thread.join()
