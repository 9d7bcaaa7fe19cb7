"""``posttrain show`` of files other than training recipes; tests/recipe/test_recipe.py shows those."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.commands.cli import main

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "recipes" / "decode").glob("*.yaml")), *sorted((ROOT / "recipes" / "label").glob("*.yaml"))]
SUITES = {
    "value": ["--value.model=v", "--policy.model=p", "--data.path=d"],
    "reward": ["--data.path=d"],
    "frontier": [],
    "accuracy": [],
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipes_of_decoders_and_labels(path, capsys):
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(path.stem) and "verify     math" in shown and "* policy.model" in shown
    assert ("decoder    " in shown) == (path.parent.name == "decode")


def test_outer_loops(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["show", str(ROOT / "recipes" / "iterate" / "ivo.yaml")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("ivo ") and "* stages" in shown and "rounds" in shown


@pytest.mark.parametrize("name", SUITES)
def test_evaluation_suites(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["show", str(ROOT / "eval" / f"{name}.yaml"), *SUITES[name]]) == 0
    shown = capsys.readouterr().out
    assert "* suite" in shown
    if name == "frontier":
        assert "best_of_n, branch 16" in shown and "majority, particles 4" in shown
        assert "branch=16*" in shown and "arXiv:2203.11171" in shown


def test_the_keys_of_a_file_decide_its_kind(tmp_path, capsys):
    (path := tmp_path / "x.yaml").write_text("suite: decod\n", encoding="utf-8")
    assert main(["show", str(path)]) == 2
    assert "did you mean 'decode'?" in capsys.readouterr().err
    path.write_text("policy: {model: a}\ndata: {path: b}\ndecoder: {use: shaped}\nlos: []\n", encoding="utf-8")
    assert main(["show", str(path)]) == 2
    message = capsys.readouterr().err
    assert "option 'score' is missing" in message and "los: unknown key" in message
