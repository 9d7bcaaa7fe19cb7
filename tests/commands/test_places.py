"""Tests of places that cannot be read or written: every command ends with exit code 2 and one message, at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.commands.cli import main
from posttrain.system import hub

LONG = "x" * 300
READ = {  # name: path that cannot be read as a dataset, a model, rollouts or a recipe
    "missing": "/nowhere/at/all",
    "missing beside": "./nowhere",
    "empty text": "",
    "a file": "file.txt",
    "an empty folder": "empty",
    "below a file": "file.txt/x",
    "memory of a process": "/proc/self/mem",
    "a NUL": "a\0b",
    "a long name": "./" + LONG,
    "a long path": "/".join(["y" * 200] * 30),
    "a link to nowhere": "broken",
    "a link to itself": "loop",
    "a pipe": "pipe",
    "a socket": "socket",
    "a device": "/dev/zero",
    "no UTF-8": "a\udcffb",
    "an unknown home": "~nobodyhere/x",
}
WRITTEN = {  # name: path that cannot be written as a file or folder
    "below a file": "file.txt/x.jsonl",
    "deep below a file": "file.txt/x/y.jsonl",
    "in /proc": "/proc/x.jsonl",
    "in /sys": "/sys/x.jsonl",
    "below a device": "/dev/full/x.jsonl",
    "a long name": LONG + ".jsonl",
    "a long folder": LONG + "/x.jsonl",
    "a NUL": "a\0b.jsonl",
    "a link to itself": "loop.jsonl",
    "below a link to itself": "loop/x.jsonl",
    "below a link to nowhere": "broken/x.jsonl",
    "a pipe": "pipe.jsonl",
    "a socket": "socket.jsonl",
    "empty text": "",
    "no UTF-8": "a\udcffb.jsonl",
    "an unknown home": "~nobodyhere/x.jsonl",
}
DATA = {  # name of a file: its bytes
    "empty.jsonl": b"",
    "bom.jsonl": b"\xef\xbb\xbf",
    "latin.jsonl": b'{"prompt":"\xff"}\n',
    "cut.jsonl": b'{"prompt": "a", "ans',
    "zeros.jsonl": b"\0" * 100,
    "digits.jsonl": b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n",
    "deep.jsonl": b"[" * 100_000,
    "deep.json": b"[" * 100_000,
    "cut.json": b'[{"prompt":',
    "cut.csv": b'prompt,answer\n"a',
    "empty.csv": b"",
    "empty.parquet": b"",
    "zip.parquet": b"PK\x03\x04" + b"0" * 100,
    "other.bin": b"1",
}
MODEL = {  # name: file of the model, and its damaged content (None: missing)
    "no config": ("config.json", None),
    "an empty config": ("config.json", b""),
    "a list as config": ("config.json", b"[]"),
    "a config without type": ("config.json", b"{}"),
    "a config in UTF-16": ("config.json", b"\xff\xfe{}"),
    "text as size": ("config.json", b'{"model_type": "qwen2", "hidden_size": "x"}'),
    "no tokenizer": ("tokenizer.json", None),
    "a cut tokenizer": ("tokenizer.json", b'{"version": '),
    "a list as tokenizer": ("tokenizer.json", b"[]"),
    "a cut template": ("chat_template.jinja", b"{% for"),
    "a damaged generation config": ("generation_config.json", b"{"),
    "no weights": ("model.safetensors", None),
    "empty weights": ("model.safetensors", b""),
    "cut weights": ("model.safetensors", b"\x00\x01" * 500),
}
READERS = {  # setting that names a place to read: command and file
    "data.path": ("train", "train.yaml"),
    "policy.model": ("decode", "decode.yaml"),
    "reference.model": ("train", "train.yaml"),
    "value.model": ("eval", "value.yaml"),
    "rollouts": ("eval", "reward.yaml"),
    "stages.a.train": ("iterate", "iterate.yaml"),
}
WRITERS = {
    "run.folder": ("train", "train.yaml"),
    "output": ("decode", "decode.yaml"),
    "report.folder": ("eval", "value.yaml"),
    "folder": ("eval", "reward.yaml"),
}
COUNT = len(READ) * len(READERS) + len(WRITTEN) * len(WRITERS) + len(DATA) + len(MODEL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder with recipes of every command and with places of all kinds."""
    folder = tmp_path_factory.mktemp("places")
    rows = [{"prompt": f"{a}+1", "answer": str(a + 1)} for a in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled: dict[str, Any] = {
        "policy": {"model": str(tiny_model_folder)},
        "data": {"path": "data.jsonl"},
        "sampling": {"max_tokens": 4},
        "engine": {"use": "transformers"},
        "verify": [{"use": "exact"}],
    }
    trained = {"advantage": {"use": "outcome"}, "loss": [{"use": "clip"}], "steps": 1, "prompts_per_step": 2}
    recipes = {
        "train": sampled | trained,
        "decode": sampled,
        "value": sampled | {"suite": "value", "value": {"model": str(tiny_model_folder)}, "branches": {"prompts": 0}},
        "reward": {"suite": "reward", "reward": [{"use": "length"}], "rollouts": "nothing"},
        "iterate": {"rounds": 1, "stages": {"a": {"train": "train.yaml"}}},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "file.txt").write_text("hello")
    (folder / "empty").mkdir()
    for ending in ("", ".jsonl"):
        (folder / f"broken{ending}").symlink_to("nothing at all")
        (folder / f"loop{ending}").symlink_to(f"loop{ending}")
        os.mkfifo(folder / f"pipe{ending}")
        before = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 bytes
        socket.socket(socket.AF_UNIX).bind(f"socket{ending}")
        os.chdir(before)
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must end at once with exit code 2; returns its message."""
    start = time.monotonic()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.strip() and len(said) < 4000 and "Traceback" not in said
    assert time.monotonic() - start < 10
    return said


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("setting", READERS)
def test_what_cannot_be_read_is_one_message(setting, kind, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command, file = READERS[setting]
    said = refused([command, file, f"--{setting}={json.dumps(READ[kind])}"], capsys)
    assert setting in said or READ[kind] in said or Path(READ[kind]).name in said


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("setting", WRITERS)
def test_what_cannot_be_written_is_named_before_anything_runs(setting, kind, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command, file = WRITERS[setting]
    assert setting in refused([command, file, f"--{setting}={json.dumps(WRITTEN[kind])}"], capsys)


@pytest.mark.parametrize("name", DATA)
def test_a_damaged_dataset_is_named(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / name).write_bytes(DATA[name])
    assert name in refused(["train", "train.yaml", f"--data.path={name}"], capsys)


@pytest.mark.parametrize("kind", MODEL)
def test_a_damaged_model_is_named(kind, place, tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    name, content = MODEL[kind]
    for file in tiny_model_folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).symlink_to(file)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    run = f"--run.folder={tmp_path / 'run'}"
    said = refused(["train", "train.yaml", f"--policy.model={tmp_path}", run], capsys)
    assert f"--policy.model={tmp_path}: " in said


def test_there_are_two_hundred_cases_with_the_hostile_recipes():
    print(f"{COUNT} broken places")
    assert COUNT > 180


def test_a_hub_that_does_not_answer_is_tried_once(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    program = "import sys; from posttrain.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["decode", "decode.yaml", "--policy.model=nobody/nothing", "--output=new.jsonl"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    ended = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "127.0.0.1 cannot be reached (Connection refused)" in ended.stderr
    assert "there is no folder 'nobody/nothing'" in ended.stderr


def test_looking_for_a_host_takes_three_seconds_at_most(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: time.sleep(1) or socket.socket())
    start = time.monotonic()
    assert hub.connect("somewhere", 443) == "no answer within 0.2 s" and time.monotonic() - start < 1


def test_a_cache_beyond_the_memory_is_refused_before_vllm_starts(place, monkeypatch, capsys):
    pytest.importorskip("vllm")
    monkeypatch.chdir(place)
    said = refused(["train", "train.yaml", "--engine={use: vllm, cache_mb: 100000000}"], capsys)
    assert "engine.cache_mb: 100,000,000 MiB" in said and "MiB of memory are free" in said
