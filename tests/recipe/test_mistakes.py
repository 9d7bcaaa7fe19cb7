"""Tests of mistakes in recipes: each is one message with its place and a suggestion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from recipe_texts import GOOD, edit

from posttrain import load_recipe
from posttrain.commands.cli import main
from posttrain.errors import RecipeError

BROKEN = {
    # name: (text, overrides, what the message says); a tuple is one of several messages
    "misspelt section": (edit("optimizer:", "optimiser:"), [], ["r.yaml:13:1: optimiser", "did you mean 'optimizer'?"]),
    "misspelt setting": (edit("max_tokens", "max_tokns"), [], ["r.yaml:12:3: sampling.max_tokns", "'max_tokens'?"]),
    "name of another toolkit": (
        edit("steps: 3", "num_generations: 3"),
        [],
        ["r.yaml:14:1: num_gen", "is 'completions' here"],
    ),
    "setting in the wrong place": (edit("steps: 3", "top_p: 1"), [], ["r.yaml:14:1: top_p", "'sampling.top_p'"]),
    "key twice": (GOOD + "steps: 4\n", [], ["r.yaml:15:1: steps: key given twice (first at", "r.yaml:14:1)"]),
    "not YAML": (edit("[{use: math}]", "[{use: math]"), [], ["r.yaml:5:", "not valid YAML"]),
    "tab": (edit("  max_tokens: 64", "\tmax_tokens: 64"), [], ["r.yaml:12:1", "not valid YAML", "\\t"]),
    "text for a number": (edit("steps: 3", "steps: many"), [], ["r.yaml:14:1: steps", 'valid integer (got "many")']),
    "truth value for a number": (edit("steps: 3", "steps: on"), [], ["r.yaml:14:1: steps", 'integer (got "on")']),
    "not positive": (edit("steps: 3", "steps: 0"), [], ["r.yaml:14:1: steps", "greater than or equal to 1 (got 0)"]),
    "missing setting": (edit("  path: some/data", "  split: train"), [], ["r.yaml:3:1: data.path", "is missing"]),
    "missing section": (
        edit("advantage: {use: outcome, scale: group}\n", ""),
        [],
        ["r.yaml:1:1", "'advantage' is missing"],
    ),
    "misspelt part": (edit("use: clip", "use: clipp"), [], ["r.yaml:8:6: loss.0.use", "did you mean 'clip'?"]),
    "misspelt option": (edit("high:", "hihg:"), [], ["r.yaml:8:27: loss.0.hihg: unknown option", "'high'?"]),
    "option of a wrong type": (edit("low: 0.2", "low: wide"), [], ["r.yaml:8:17: loss.0.low", '(got "wide")']),
    "option outside its range": (
        edit("low: 0.2", "low: -1"),
        [],
        ["r.yaml:8:17: loss.0.low", "greater than or equal to 0 (got -1)"],
    ),
    "option outside its range, on the command line": (
        GOOD,
        ["--loss.0.low=-1"],
        ["command line: --loss.0.low=-1", "greater than or equal to 0 (got -1)"],
    ),
    "override given twice": (
        GOOD,
        ["--steps=4", "--seed=1", "--steps=5"],
        ["command line: --steps=5: given twice (first as --steps=4)"],
    ),
    "option outside its choices": (
        edit("scale: group", "scale: grup"),
        [],
        ["r.yaml:6:27: advantage.scale", "'none', 'group' or 'batch'", "did you mean 'group'?"],
    ),
    "missing option": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:needs_scale'}"),
        [],
        ["r.yaml:6:1: advantage", "option 'scale' is missing"],
    ),
    "no such file": (edit("use: outcome", "use: 'part.py:f'"), [], ["r.yaml:6:13", "no file 'part.py'", "'parts.py'?"]),
    "no such function": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:double'}"),
        [],
        ["r.yaml:6:13: advantage.use: parts.py has no 'double'", "did you mean 'doubled'?"],
    ),
    "not callable": (edit("use: outcome", "use: 'parts.py:number'"), [], ["r.yaml:6:13", "cannot be called"]),
    "no such module": (edit("use: math", "use: no_such.f"), [], ["r.yaml:5:11: verify.0.use", "no module 'no_such'"]),
    "part of another slot": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:of_a_loss'}"),
        [],
        ["r.yaml:6:13", "takes (outputs, batch), but `advantage` passes (batch)", "fits `loss`"],
    ),
    "unknown option of a verifier": (
        edit("{use: math}", "{use: 'parts.py:has_unit', strikt: true}"),
        [],
        ["r.yaml:5:37: verify.0.strikt", "did you mean 'strict'?"],
    ),
    "coef of a verifier": (edit("{use: math}", "{use: math, coef: 1}"), [], ["r.yaml:5:22: verify.0.coef: unknown"]),
    "no use": (edit("{use: clip, ", "{"), [], ["r.yaml:8:5: loss.0", "`use` is missing"]),
    "misspelt override": (
        GOOD,
        ["--sampling.temprature=1"],
        ["command line: --sampling.temprature=1", "'temperature'?"],
    ),
    "index outside the list": (GOOD, ["--loss.2.low=1"], ["command line: --loss.2.low=1", "loss is a list of 2"]),
    "override through a scalar": (GOOD, ["--steps.many=1"], ["command line: --steps.many=1", "has no key 'many'"]),
    "override without a value": (GOOD, ["--steps"], ["command line: --steps", "--section.key=value"]),
    "nucleus sampling": (edit("max_tokens: 64", "top_p: 0.9"), [], ["r.yaml:12:3: sampling.top_p", "full softmax"]),
    "samples a prompt by their old name": (
        GOOD,
        ["--evaluate={data: {path: x}, n: 2}", "--value.branches.n=2"],
        [("--evaluate", "did you mean 'completions'"), ("--value.branches.n=2", "did you mean 'completions'")],
    ),
    "greedy sampling": (GOOD, ["--sampling.temperature=0"], ["command line: --sampling.temperature=0", "greedily"]),
    "group of one": (
        GOOD,
        ["--completions=1"],
        ["r.yaml:6:1: advantage: outcome compares", "`completions: 1`"],
    ),
    "own part for groups, of one": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:against_the_rest'}"),
        ["--completions=1"],
        ["r.yaml:6:1: advantage: parts.py:against_the_rest compares", "`completions: 1`"],
    ),
    "more updates than rows": (GOOD, ["--minibatches=999"], ["--minibatches=999", "a step has 256 completions"]),
    "misspelt weight": (
        edit("{use: math}", "{use: math, wieght: 2}"),
        [],
        ["r.yaml:5:22: verify.0.wieght", "'weight'?"],
    ),
    "no such data function": (
        edit("some/data", "pats.py:f"),
        [],
        ["r.yaml:4:3: data.path", "no file 'pats.py'", "'parts.py'?"],
    ),
    "no such base": (
        "base: bse.yaml\n" + GOOD,
        [],
        [("r.yaml:1:1: base: cannot be read",), ("bse.yaml: no such file", "'base.yaml'?")],
    ),
    "base of a base": ("base: chain.yaml\n" + GOOD, [], ["chain.yaml:1:1: base", "may not have a base"]),
    "mistake in the base": (
        "base: base.yaml\nsteps: 1\n",
        [],
        [("base.yaml:3:1: data.path", "missing"), ("base.yaml:4:3: data.pth", "did you mean 'path'?")],
    ),
    "a list": ("- policy\n", [], ["r.yaml:1:1", "a recipe is a mapping"]),
    "number as a key": (GOOD + "3: x\n", [], ["r.yaml:15:1: 3: a key is text"]),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN.keys())
def test_a_mistake_is_one_message_with_its_place(case, recipe, capsys):
    text, overrides, said = case
    base = GOOD.replace("  path: some/data", "  pth: some/data")
    path = recipe(text, base=base, chain="base: base.yaml\n" + GOOD)
    assert main(["train", str(path), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    messages = said if isinstance(said[0], tuple) else [tuple(said)]
    lines = captured.err.splitlines()
    assert len(lines) == len(messages), captured.err
    for line, pieces in zip(lines, messages, strict=True):
        assert all(piece in line for piece in pieces), line


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(recipe, capsys):
    text = edit("max_tokens: 64", "max_tokens: x").replace("low: 0.2", "lo: 0.2").replace("steps: 3", "stepz: 3")
    assert main([str(recipe(text)), "--seed=-1"]) == 2
    err = capsys.readouterr().err.replace(f"{recipe().parent}/", "")
    assert [line.partition(": ")[0] for line in err.splitlines()] == [
        "command line",
        "r.yaml:8:17",
        "r.yaml:12:3",
        "r.yaml:14:1",
    ]


def test_a_file_that_does_not_import_is_reported_with_its_line(recipe, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def f(batch):\n    return batch\n\nimport no_such_package\n")
    assert main(["show", str(recipe(edit("use: outcome", "use: 'broken.py:f'")))]) == 2
    err = capsys.readouterr().err
    assert "r.yaml:6:13: advantage.use: cannot import" in err
    assert f"{tmp_path}/broken.py:4: ModuleNotFoundError: No module named 'no_such_package'" in err


def test_a_recipe_that_is_not_there_is_reported_with_a_near_one(recipe, capsys):
    path = recipe()
    assert main(["train", str(path.with_name("rr.yaml"))]) == 2
    assert capsys.readouterr().err == f"{path.with_name('rr.yaml')}: no such file; did you mean 'r.yaml'?\n"


@pytest.mark.parametrize("command", [["-m", "posttrain"], ["-m", "posttrain", "train"], []], ids=" ".join)
def test_a_real_process_ends_with_code_2_and_no_traceback(command, recipe):
    path = recipe(edit("use: clip", "ues: clip").replace("outcome", "parts.py:double").replace("- use: kl", "- us: kl"))
    result = subprocess.run([sys.executable, *command, str(path), "--stepz=1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "command line: --stepz=1: unknown key; did you mean 'steps'?",
        f"{path}:6:13: advantage.use: parts.py has no 'double'; did you mean 'doubled'?",
        f"{path}:8:5: loss.0: a part is written as {{use: name, option: value}} (`use` is missing)",
        f"{path}:9:5: loss.1: a part is written as {{use: name, option: value}} (`use` is missing)",
    ]


def test_null_takes_an_optional_part_away(tmp_path):
    """``--decoder=null`` leaves out the decoder of the file; a slot with a default gets the default."""
    base, path = Path(__file__).parents[2] / "recipes" / "base" / "math.yaml", tmp_path / "guided.yaml"
    slots = "decoder: {use: best_of_n}\nprompts: {use: sequential}\nadvantage: {use: outcome}\nloss: [{use: clip}]\n"
    path.write_text(f"base: {base}\n{slots}", encoding="utf-8")
    assert load_recipe(path, ["--decoder=null"]).decoder is None
    assert load_recipe(path, ["--decoder=null", "--prompts=null"]).prompts.name == "uniform"
    with pytest.raises(RecipeError, match="advantage"):
        load_recipe(path, ["--decoder=null", "--advantage=null"])
