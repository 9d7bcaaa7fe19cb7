"""Tests of recipes that nobody should run: each ends at once with one short message and no traceback."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from recipe_texts import GOOD, edit

from posttrain.commands.cli import main
from posttrain.data.read import read
from posttrain.errors import RecipeError, UserError
from posttrain.recipe.executors import executor_problem
from posttrain.recipe.file_text import LARGEST
from posttrain.recipe.resolve import resolve
from posttrain.recipe.sections import DataSection
from posttrain.recipe.validation import dataclass_in
from posttrain.recipe.yaml_reader import DEEPEST, parse, single
from posttrain.training.recipe import Recipe, load_recipe

ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in itertools.pairwise("abcdefghijkl")
)
HOSTILE = {
    # name: (text, what the message says)
    "aliases of aliases": (GOOD + ALIAS_BOMB, ["r.yaml:", "more than 100,000 values, counting those behind aliases"]),
    "nested lists": (GOOD + "x: " + "[" * 500 + "]" * 500, ["r.yaml:15:36: not valid YAML: more than 32 levels"]),
    "nested mappings": (GOOD + "x:" + "".join(f"\n{' ' * n}a:" for n in range(1, 500)), ["more than 32 levels"]),
    "a NUL": (GOOD + "run: {folder: a\0b}\n", ["r.yaml:15: not valid YAML", "U+0000"]),
    "an escaped NUL": (edit("some/model", '"a\\0b"'), ["r.yaml:2:10: text with the character U+0000"]),
    "half a surrogate pair": (edit("some/data", '"\\ud800"'), ["r.yaml:4:9: text with the character U+D800"]),
    "a NUL in the base": ('base: "a\\0b"\n' + GOOD, ["r.yaml:1:7: text with the character U+0000"]),
    "thousands of digits": (edit("steps: 3", "steps: " + "9" * 5000), ["r.yaml:14:8: '999", "... is not of type int"]),
    "a name without end": (edit("use: math", f"use: {'x' * 50_000}"), ["r.yaml:5:11: verify.0.use: ", "..."]),
    "text without end": (edit("steps: 3", f"steps: {'x' * 50_000}"), ["r.yaml:14:1: steps", "integer", "..."]),
    "a Python object": (GOOD + "x: !!python/name:os.system x\n", ["r.yaml:15:4: the tag", "has no meaning here"]),
    "an infinite rate": (edit("1e-5", ".inf"), ["r.yaml:13:13: optimizer.learning_rate", "finite number"]),
    "a rate beyond floats": (edit("1e-5", "1e999"), ["r.yaml:13:13: optimizer.learning_rate", "finite number"]),
    "no rate": (edit("1e-5", ".nan"), ["r.yaml:13:13: optimizer.learning_rate", "finite number"]),
    "no coefficient": (edit("coef: 1e-3", "coef: .nan"), ["r.yaml:10:5: loss.1.coef", "finite number"]),
    "a coefficient beyond float32": (
        edit("1e-3", "1e39"),
        ["r.yaml:10:5: loss.1.coef", "less than or equal to 1000000"],
    ),
    "no weight": (edit("{use: math}", "{use: math, weight: .nan}"), ["verify.0.weight", "finite number"]),
    "an infinite option": (edit("high: 0.28", "high: .inf"), ["r.yaml:8:27: loss.0.high", "finite number"]),
    "10^12 prompts": (
        GOOD + "prompts_per_step: 1000000000000\n",
        ["prompts_per_step", "less than or equal to 1048576"],
    ),
    "10^9 completions": (GOOD + "completions: 1000000000\n", ["completions", "less than or equal to 65536"]),
    "10^9 bins": (GOOD + "value: {head: {bins: 1000000000}}\n", ["value.head.bins", "less than or equal to 65536"]),
    "10^400 steps": (edit("steps: 3", f"steps: 1{'0' * 400}"), ["steps", "less than or equal to 2147483647"]),
    "a temperature near 0": (
        edit("max_tokens: 64", "temperature: 1e-40"),
        ["r.yaml:12:3", "should be 0, for the most probable"],
    ),
    "momentum above 1": (edit("1e-5", "1e-5, betas: [2, 0.9]"), ["optimizer.betas.0", "less than 1"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_short_message(name, recipe, capsys):
    text, pieces = HOSTILE[name]
    path, started = recipe(), time.monotonic()
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    err = capsys.readouterr().err.replace(f"{path.parent}/", "")
    assert len(err) < 3000 and "Traceback" not in err
    assert all(piece in err for piece in pieces), err
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("where", ["recipe", "base"])
@pytest.mark.parametrize("kind", ["pipe", "device", "large", "folder", "long name", "unreadable link"])
def test_what_is_no_file_is_not_read(kind, where, recipe, tmp_path, capsys):
    odd = tmp_path / ("x" * 300 + ".yaml" if kind == "long name" else "odd.yaml")
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "device":
        odd.symlink_to("/dev/zero")
    elif kind == "large":
        odd.write_text(GOOD + "#" * LARGEST)
    elif kind == "folder":
        odd.mkdir()
    elif kind == "unreadable link":
        odd.symlink_to(odd)
    path = odd if where == "recipe" else recipe(f"base: {odd.name}\n" + GOOD)
    assert main(["train", str(path)]) == 2
    says = {
        "pipe": "is a pipe, a socket or a device",
        "device": "or a device",
        "large": "a recipe has at most 1,000,000",
    }
    says |= {"folder": "is a folder", "long name": "File name too long", "unreadable link": "Too many levels"}
    assert says[kind] in capsys.readouterr().err


def test_the_deepest_recipe_is_still_read():
    depth = DEEPEST - 1
    data: Any = parse("x: " + "[" * depth + "1" + "]" * depth, "r.yaml").data["x"]
    for _ in range(depth):
        [data] = data
    assert data == 1


EXECUTORS = """
os.system os.popen os.execv posix.system builtins.eval builtins.exec builtins.compile builtins.open subprocess.run
subprocess.getoutput runpy.run_path pty.spawn pickle.loads marshal.loads importlib.import_module shutil.rmtree
pathlib.Path json.loads code.interact timeit.timeit sympy.sympify sympy.parsing.sympy_parser.parse_expr pandas.eval
torch.load yaml.unsafe_load asyncio.run webbrowser.open urllib.request.urlopen
""".split()  # noqa: SIM905 (a list of names is easier to read without quotes)


@pytest.mark.parametrize("name", EXECUTORS)
def test_what_executes_its_argument_is_no_part(name):
    with pytest.raises(RecipeError, match=f"{name} is a function of .*name a function of your own"):
        resolve(name)


@pytest.mark.parametrize("slot", ["verify", "advantage", "loss"])
def test_no_slot_takes_an_executing_function(slot, recipe, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from os import system as grade\n")
    texts = {
        "verify": edit("use: math", "use: 'mine.py:grade'"),
        "advantage": edit("{use: outcome, scale: group}", "{use: 'mine.py:grade'}"),
        "loss": edit("use: kl", "use: 'mine.py:grade'"),
    }
    assert main(["train", str(recipe(texts[slot]))]) == 2
    assert "grade is a function of Python's standard library" in capsys.readouterr().err


def test_no_dataset_is_an_executing_function(tmp_path):
    (tmp_path / "mine.py").write_text("from os import system as rows\n")
    with pytest.raises(UserError, match="rows is a function of Python's standard library"):
        read(DataSection(path="mine.py:rows"), tmp_path)


def test_decorated_and_partial_functions_are_judged_by_what_they_call():
    def own(text: str) -> float:
        return 0.0

    assert executor_problem(own, "own") is None
    assert executor_problem(functools.lru_cache(own), "own") is None
    assert executor_problem(functools.partial(own), "own") is None
    assert executor_problem(functools.partial(os.system), "own") is not None
    assert executor_problem(functools.partial(functools.lru_cache(os.system)), "own") is not None


ODD = (
    [None, [], {}, "", "text", "../..", "/proc/self/mem", -1, 0.5, 1e308, math.nan, -math.inf, 10**400, [None], [{}]]
    + [{"use": use} for use in (None, "x", "os.system", "parts.py:doubled", "parts.py:", ":", ".", "a..b", "é", "/x:f")]
    + ["x" * 20_000, [1, 2], {"a": 1}, functools.reduce(lambda inner, _: [inner], range(30), [])]
)
"""Values that hardly any setting takes."""


def settings(kind: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Places of all settings of a recipe, those in sections too."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        yield (*at, field.name)
        section = dataclass_in(hints[field.name])
        if section is not None and section.__module__ == "posttrain.recipe.sections":
            yield from settings(section, (*at, field.name))


def test_every_setting_takes_or_refuses_odd_values_without_a_traceback(recipe):
    path, refused = recipe(), 0
    places = [*settings(Recipe), ("loss", 0), ("loss", 0, "low"), ("verify", 0, "weight"), ("advantage", "scale")]
    for number, (place, value) in enumerate(itertools.product(places, ODD)):
        if number % 13 == 0:  # coprime to the number of values, so that each of them meets many settings
            try:
                load_recipe(path, [single(place, value, "command line: odd")])
            except RecipeError as error:
                refused += 1
                assert len(str(error)) < 3000, (place, value)
    assert refused > 150
