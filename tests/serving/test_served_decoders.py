"""Tests of ``posttrain serve`` with other decoders, from the command line, and with every recipe."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from exact_world import make_world, table_score
from runs import environment
from served import guide, recipe_file, save_scalar_value, serving

from posttrain.commands.cli import main
from posttrain.decoding.nodes import best_first
from posttrain.decoding.particles import tilted
from posttrain.decoding.population import Population
from posttrain.decoding.shaping import Shaped
from posttrain.decoding.tree import TreeSearch
from posttrain.engines.base import Sampling
from posttrain.recipe.loading import load_as
from posttrain.seeds import FreshSeeds
from posttrain.serving.errors import ApiError
from posttrain.serving.limits import Limit
from posttrain.serving.protocol import Guide
from posttrain.serving.recipe import ServeRecipe
from posttrain.serving.routing import Served
from posttrain.serving.server import listening
from posttrain.serving.worker import Worker

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def value_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scalar_value(tmp_path_factory.mktemp("value"), tiny_model_folder)


@pytest.mark.engine
def test_a_population_is_served_in_rounds(tiny_model_folder: Path, value_folder: Path, tmp_path: Path):
    decoder = {"use": "population", "branch": 4, "block": 4, "pick": {"use": "tilted"}, "strength": 3.0}
    decoder["score"] = {"use": "value", "model": str(value_folder)}
    with serving(recipe_file(tmp_path, tiny_model_folder, decoder=decoder)) as server:
        prompt = server.served.tokenizer("Hello")["input_ids"]
        whole = server.complete(seed=4, n=2)
        expected = server.served.decoder.generate([prompt], server.served.sampling, 2, seeds=[4])[0]
        decode = server.served.tokenizer.decode
        assert [c.text for c in whole.choices] == [decode(c.tokens, skip_special_tokens=True) for c in expected]
        assert whole.choices[0].measured["scored"] == expected[0].measured["scored"]
        streamed = ["", ""]
        for event in server.complete(seed=4, n=2, stream=True):
            streamed[event.choices[0].index] += event.choices[0].text
        assert streamed == [choice.text for choice in whole.choices]
        requests = [{"seed": 4, "extra_body": {"guide": {"strength": s}}} for s in (0.5, 30.0, 3.0)]
        requests.append({"seed": 4, "extra_body": {"guide": False}})
        alone = [server.complete(**request).choices[0].text for request in requests]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda request: server.complete(**request).choices[0].text, requests)) == alone
        assert alone[2] == whole.choices[0].text
    with (
        serving(recipe_file(tmp_path, tiny_model_folder, decoder=decoder | {"pick": {"use": "top"}})) as server,
        pytest.raises(openai.BadRequestError, match="whatever the strength"),
    ):
        server.complete(extra_body=guide(1.0))


@pytest.mark.engine
def test_edited_hidden_states_are_not_those_of_plain_requests(
    tiny_model_folder: Path, value_folder: Path, tmp_path: Path
):
    decoder = {"use": "edited", "model": str(value_folder), "step_size": 0.3, "steps": 5}
    with serving(recipe_file(tmp_path, tiny_model_folder, decoder=decoder), "--engine.max_concurrent=2") as server:
        requests = [{"seed": i // 2, "extra_body": {"guide": i % 2 == 0}} for i in range(12)]
        alone = [server.complete(**request).choices[0].text for request in requests]
        assert alone[0] != alone[1]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda request: server.complete(**request).choices[0].text, requests))
        assert together == alone


@pytest.mark.engine
@pytest.mark.parametrize(("sent", "code", "said"), [(signal.SIGINT, 130, "SIGINT: stopped"), (signal.SIGTERM, 143, "")])
def test_the_command_line_serves_until_it_is_stopped(tiny_model_folder: Path, tmp_path: Path, sent, code, said):
    path = recipe_file(tmp_path, tiny_model_folder)
    command = [sys.executable, "-m", "posttrain", "serve", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        address = re.fullmatch(r"tiny: (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C ends\)\n", line)
        assert address, line + process.stderr.read()
        client = openai.OpenAI(base_url=address[1], api_key="none", max_retries=20)
        assert client.completions.create(model="tiny", prompt="Hello").choices[0].finish_reason
        process.send_signal(sent)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code and errors.strip() == said


def test_a_port_in_use_is_found_before_anything_is_loaded(tmp_path: Path, capsys):
    path = recipe_file(tmp_path, tmp_path / "nothing")
    with closing(listening(load_as(ServeRecipe, path).server)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        assert main(["serve", str(path), f"--server.port={port}"]) == 2
    assert f"--server.port={port}: cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("path", [*sorted((RECIPES / "serve").glob("*.yaml")), RECIPES / "decode" / "smc.yaml"])
def test_recipes_are_servable(path: Path):
    recipe = load_as(ServeRecipe, path)
    assert recipe.model_name == "Qwen/Qwen2.5-1.5B-Instruct"


@pytest.mark.parametrize("path", sorted((RECIPES / "serve").glob("*.yaml")), ids=lambda path: path.name)
def test_commands_in_serve_recipes_name_folders_that_recipes_make_or_ask_for_one(path: Path):
    (command,) = re.findall(r"^# +posttrain serve (\S+) (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert (RECIPES.parent / command[0]).samefile(path)
    models = re.findall(r"model=(\S+)", command[1])
    assert models and all(model.isupper() or (RECIPES.parent / model).exists() for model in models)


def test_a_strength_is_refused_where_the_decoder_has_none():
    world = make_world()
    score = table_score(world.mean_values())
    search = TreeSearch(engine=(engine := world.engine()), score=score, select=best_first)
    shared: dict[str, Any] = {"name": "world", "tokenizer": None, "engine": engine, "sampling": world.sampling}
    shared |= {"limit": Limit(1, 1), "worker": Worker(engine), "seeds": FreshSeeds(0)}
    served = Served(decoder=search, **shared)
    assert served.route(True, world.sampling) == (search, None)
    assert served.route(False, world.sampling) == served.route(Guide(strength=0.0), world.sampling) == (engine, None)
    with pytest.raises(ApiError, match="TreeSearch, has no strength"):
        served.route(Guide(strength=1.0), world.sampling)
    served = Served(decoder=Population(engine, score, branch=2, pick=tilted), **shared)
    decoder, _ = served.route(Guide(strength=3.0), world.sampling)
    assert isinstance(decoder, Population) and decoder.strength == 3.0
    assert served.route(Guide(strength=3.0), world.sampling)[0] is decoder
    with pytest.raises(ApiError, match="cut the distribution"):
        Served(decoder=Shaped(engine, score), **shared).route(True, Sampling(top_p=0.5))
