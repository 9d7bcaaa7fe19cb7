"""Checks that two checkouts train to the same bits: ``python scripts/same_bits.py BEFORE AFTER --folder FOLDER``.

A change of layout or of names must not change any number. Each checkout, with its own ``.venv``, runs the quickstart.
From the model and problems of the first quickstart it runs one recipe each of PPO with a value model, LoRA, offline DPO
with cached reference log-probs, and blockwise decoding (as a training run, and as ``posttrain decode``). The rows of
``metrics.jsonl`` (without keys under ``time/``), the completions and the saved weights are then compared byte by byte.

It takes about ten minutes on two CPU cores. This file uses only the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RUNS = ("quickstart", "ppo", "lora", "dpo", "blockwise", "decode")


def main() -> int:
    """Runs both checkouts, prints a line for each comparison, and returns 1 if any run differs.

    Finished runs of the first checkout are used again.
    """
    parser = argparse.ArgumentParser("python scripts/same_bits.py", description=__doc__)
    parser.add_argument("before", type=Path, help="a checkout with its .venv")
    parser.add_argument("after", type=Path, help="another checkout with its .venv")
    folder_help = "folder for the runs; those of `before` are kept and used again"
    parser.add_argument("--folder", type=Path, required=True, help=folder_help)
    options = parser.parse_args()
    folder = options.folder.resolve()
    shutil.rmtree(folder / "after", ignore_errors=True)
    for side, checkout in (("before", options.before), ("after", options.after)):
        if not (folder / side / "finished").exists():
            run_all(checkout.resolve(), folder / side, start=folder / "before" / "quickstart-start")
            (folder / side / "finished").touch()
    same = [compare(name, folder / "before" / name, folder / "after" / name) for name in RUNS]
    return 0 if all(same) else 1


def run_all(checkout: Path, folder: Path, start: Path) -> None:
    """Runs the quickstart and all recipes in one checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = str(checkout / ".venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def command(*arguments: str) -> None:
        print(f"{folder.name}: {' '.join(arguments)}", flush=True)
        with (folder / "log.txt").open("a") as log:
            subprocess.run(
                [python, "-m", *arguments], check=True, cwd=checkout, env=environment, stdout=log, stderr=log
            )

    command("posttrain.quickstart", f"--folder={folder / 'quickstart'}")
    write_pairs(start / "held_out.jsonl", start / "pairs.jsonl")
    for name, recipe in recipes(folder, start).items():
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        command("posttrain", "decode" if name == "decode" else "train", str(path))


def write_pairs(problems: Path, pairs: Path) -> None:
    """Writes preference pairs: the right answer is chosen, and one that is off by one is rejected."""
    rows = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()]
    lines = (
        {"prompt": row["prompt"], "chosen": row["answer"], "rejected": str(int(row["answer"]) + 1)} for row in rows
    )
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def recipes(folder: Path, start: Path) -> Mapping[str, dict[str, Any]]:
    """The recipes by name, in the order in which they run."""
    sampling = {
        "policy": {"model": str(start / "model")},
        "data": {"path": str(start / "train.jsonl"), "limit": 64},
        "verify": [{"use": "math"}],
        "sampling": {"max_tokens": 48},
    }
    value = str(folder / "ppo" / "value")
    guide = {
        "use": "population",
        "branch": 3,
        "block": 8,
        "pick": {"use": "top"},
        "score": {"use": "value", "model": value},
    }
    grpo = {
        **sampling,
        "advantage": {"use": "outcome", "center": "group", "scale": "group"},
        "loss": [{"use": "clip"}],
        "optimizer": {"learning_rate": 3e-4},
        "steps": 4,
        "prompts_per_step": 8,
        "completions": 4,
    }
    ppo = {
        "value": {"optimizer": {"learning_rate": 1e-3}},
        "advantage": {"use": "gae", "lambda_": 0.95},
        "shape": [{"use": "whiten"}],
        "target": {"use": "lambda_return", "lambda_": 0.95},
        "value_loss": [{"use": "mse", "clip": 0.2}],
        "minibatches": 2,
        "epochs": 2,
    }
    dpo = {
        "policy": {"model": str(start / "model")},
        "reference": {"cache": str(folder / "cache")},
        "data": {"path": str(start / "pairs.jsonl")},
        "examples": {"use": "pairs"},
        "loss": [{"use": "pairwise", "beta": 0.1}],
        "normaliser": {"use": "group_mean_of_token_sum"},
        "optimizer": {"learning_rate": 1e-4},
        "steps": 6,
        "prompts_per_step": 16,
    }
    training = {
        "ppo": {**grpo, **ppo},
        "lora": {**grpo, "policy": {"model": str(start / "model"), "lora": {"rank": 8}}},
        "dpo": dpo,
        "blockwise": {**grpo, "decoder": guide},
    }
    training = {name: {**recipe, "run": {"folder": str(folder / name)}} for name, recipe in training.items()}
    decode = {**sampling, "decoder": guide, "output": str(folder / "decode" / "completions.jsonl")}
    return {**training, "decode": decode}


def compare(name: str, before: Path, after: Path) -> bool:
    """Compares two run folders and prints the result; True if they hold the same numbers."""
    readers: dict[str, Callable[[Path], Any]] = {
        "metrics.jsonl": metrics,
        "completions.jsonl": Path.read_bytes,
        "*/*.safetensors": lambda path: hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    files, different = 0, []
    for pattern, read in readers.items():
        names = {path.relative_to(folder) for folder in (before, after) for path in folder.glob(pattern)}
        for file in sorted(names):
            files += 1
            in_both = (before / file).exists() and (after / file).exists()
            if not in_both or read(before / file) != read(after / file):
                different.append(str(file))
    same = not different and files > 0
    print(f"{name}: {files} files {'are the same' if same else 'differ: ' + ', '.join(different)}", flush=True)
    return same


def metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` without their times."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
