"""The command line: the table of commands, what each of them imports, and places in the errors of all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.commands.cli import COMMANDS, main
from posttrain.recipe.resolve import resolve

LABEL = "policy: {{model: {model}}}\nverify: [{{use: exact}}]\n{completions}\n"
REWARD = "suite: reward\nreward: [{use: length}]\nfolder: report\n"


def python(program: str) -> str:
    """Runs a program in a fresh interpreter and returns what it prints."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["serve", "--help"]])
def test_help_needs_no_torch(arguments: list[str]):
    """Help is printed at once: it imports neither torch nor any command."""
    loaded = python(
        "import sys\nfrom posttrain.commands.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'transformers', 'datasets')])\n"
        "print([name for name in sys.modules if name.startswith('posttrain.commands.')])"
    ).splitlines()[-2:]
    assert loaded == ["[]", "['posttrain.commands.cli']"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    assert callable(resolve(COMMANDS[name].run))
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert f"usage: posttrain {name}" in printed and ("--resume" in printed) == (name not in ("serve", "show"))


def test_commands_that_do_not_train_import_nothing_of_training():
    """Reports use the metrics of values that training uses too, and nothing that changes weights."""
    names = ["commands.decode", "commands.label", "commands.evaluate", "serving.server"]
    reports = [f"reports.{name}" for name in ("value", "reward", "decoding")]
    program = "import importlib, sys\n"
    for group in (names, reports):  # one process: each import of torch and transformers costs seconds
        program += "".join(f"importlib.import_module('posttrain.{name}')\n" for name in group)
        program += "print(*(name for name in sys.modules if name.startswith('posttrain.training')))\n"
    by_commands, by_reports = python(program).splitlines()[-2:]
    assert by_commands == ""
    assert set(by_reports.split()) <= {"posttrain.training", "posttrain.training.value_metrics"}


# ------------------------------------------------------------------------------------------------ places in errors


def message_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must end with exit code 2, and returns its message."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_label_places_a_model_that_does_not_exist(tmp_path: Path, capsys):
    recipe = tmp_path / "labels.yaml"
    recipe.write_text(LABEL.format(model="./nowhere", completions="data: {path: d.jsonl}"), encoding="utf-8")
    message = message_of(["label", str(recipe)], capsys)
    assert re.search(r"labels\.yaml:1:10: policy\.model: there is no folder", message), message
    override = message_of(["label", str(recipe), "--policy.model=./elsewhere"], capsys)
    assert override.startswith("command line: --policy.model=./elsewhere: there is no folder"), override


def test_label_places_rollouts_that_do_not_exist(tmp_path: Path, tiny_model_folder: Path, capsys):
    recipe = tmp_path / "labels.yaml"
    recipe.write_text(LABEL.format(model=tiny_model_folder, completions="rollouts: nowhere"), encoding="utf-8")
    message = message_of(["label", str(recipe)], capsys)
    assert "labels.yaml:3:1: rollouts: there is no file or folder 'nowhere'" in message, message


def test_the_reward_suite_places_rollouts_that_do_not_exist(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(REWARD + "rollouts: nowhere\n", encoding="utf-8")
    message = message_of(["eval", "own.yaml"], capsys)
    assert message == "own.yaml:4:1: rollouts: there is no file or folder 'nowhere'\n"


def test_the_reward_suite_places_a_part_that_cannot_score_texts(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    (tmp_path / "own.yaml").write_text(REWARD + "data: {path: pairs.jsonl}\n", encoding="utf-8")
    message = message_of(["eval", "own.yaml"], capsys)
    assert re.fullmatch(r"own\.yaml:2:\d+: reward: \w+ cannot score texts.*\n", message), message
