"""An OpenAI-compatible server from a YAML file: ``posttrain serve recipes/serve/guided.yaml``."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from posttrain.decoding.build import build_decoder, check_models
from posttrain.engines.base import Sampling
from posttrain.engines.for_policy import engine_of_length
from posttrain.engines.stepping import SteppingEngine
from posttrain.errors import UserError
from posttrain.models.load import context_length, load_tokenizer
from posttrain.recipe.loading import run_file
from posttrain.recipe.yaml_reader import Overrides
from posttrain.seeds import FreshSeeds
from posttrain.serving.app import make_app
from posttrain.serving.limits import Limit
from posttrain.serving.recipe import Server, ServeRecipe
from posttrain.serving.routing import Served
from posttrain.serving.worker import Worker
from posttrain.system.processes import Processes

LONGEST = 8192
"""Default of ``engine.max_model_len`` if the model's own context is longer."""

PATIENCE = 5
"""Seconds until requests that still run after Ctrl-C are stopped."""


def run_serve(path: str | Path, overrides: Overrides = ()) -> None:
    """Serves the recipe of a YAML file until Ctrl-C.

    Raises:
        UserError: if the input is wrong; the message says what to change.
    """
    run_file(ServeRecipe, path, overrides, serve)


def serve(recipe: ServeRecipe) -> None:
    """Serves until Ctrl-C or SIGTERM. Requests that run then have some seconds to end.

    Raises:
        UserError: if the input is wrong; the message says what to change.
        RuntimeError: if the engine is broken; running requests have been told.
        SystemExit: with code 143 after SIGTERM.
    """
    with terminated(), closing(listening(recipe.server)) as listener, application(recipe) as app:
        host, port = listener.getsockname()[:2]
        print(f"{recipe.model_name}: http://{host}:{port}/v1 (Ctrl-C ends)", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=PATIENCE)
        server, worker = uvicorn.Server(config), app.state.served.worker

        def end() -> None:
            server.should_exit = True

        worker.on_failure = end
        server.run(sockets=[listener])
        if worker.broken is not None:
            raise RuntimeError(f"the engine failed, and the server has ended: {worker.broken}") from worker.broken


@contextmanager
def terminated() -> Iterator[None]:
    """Ends the block in order on SIGTERM, like an exception would, with exit code 143."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def application(recipe: ServeRecipe) -> Iterator[FastAPI]:
    """Makes the application of a recipe, with its engine.

    Raises:
        UserError: if the input is wrong; the message says what to change.
    """
    check_models(recipe.decoder)
    tokenizer = load_tokenizer(recipe.policy)
    with Processes(dtype=recipe.policy.dtype) as processes:
        if processes.world > 1:
            raise UserError("posttrain serve: runs in one process; start it without accelerate launch")
        with closing(_engine(recipe, tokenizer)) as engine:
            served = Served(
                name=recipe.model_name,
                tokenizer=tokenizer,
                engine=engine,
                decoder=build_decoder(recipe.decoder, engine, tokenizer, processes, recipe.policy) or engine,
                sampling=Sampling.of(recipe.sampling),
                limit=Limit(recipe.server.requests, recipe.server.queue),
                worker=Worker(engine),
                seeds=FreshSeeds(recipe.seed),
            )
            app = make_app(served, max_body=recipe.server.max_body_mb * 2**20)
            app.state.served = served
            yield app


def _engine(recipe: ServeRecipe, tokenizer: PreTrainedTokenizerBase) -> SteppingEngine:
    limit = context_length(recipe.policy) or LONGEST
    length = recipe.engine.max_model_len or min(limit, LONGEST)
    engine = engine_of_length(recipe.policy, recipe.engine, length, tokenizer=tokenizer, seed=recipe.seed)
    assert isinstance(engine, SteppingEngine)
    return engine


def listening(server: Server) -> socket.socket:
    """Opens the server's socket before models are loaded, so that a port in use is found early.

    Raises:
        UserError: if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"server.port: cannot listen on {server.host}:{server.port}: {error.strerror or error}. Is another server "
            "running? --server.port=0 takes a free port"
        ) from None
    return listener
