"""Peak memory of LoRA adapters beside full weights, at equal settings, by whole runs of ``posttrain train``.

    python benchmarks/adapter_memory.py MODEL --json benchmarks/results/adapter_memory.json

MODEL is the folder of a language model, such as SmolLM2-135M-Instruct. Each setting (data type, gradient checkpointing,
method) is run with adapters and with all weights, in a process of its own, on the same rows of 350 tokens. The peak is
the largest resident memory of that process. Beside it stands what the run's own estimate said before its first step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from online_step import write_result
from transformers import AutoTokenizer

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"examples": {"use": "demonstrations", "max_tokens": 512}, "loss": [{"use": "nll"}]},
    "dpo": {"examples": {"use": "pairs", "max_tokens": 512}, "loss": [{"use": "dpo"}], "reference": {"cache": False}},
}
"""Recipes without sampling: one without a reference, and one whose reference scores every batch."""

WORDS = ["the", "model", "reads", "one", "more", "line", "of", "a", "book", "finds", "a", "number"]


class Setting(NamedTuple):
    """The settings that adapters and full weights have in common."""

    method: str
    dtype: str
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.method}, {self.dtype}, {'with' if self.checkpointing else 'without'} gradient checkpointing"


def settings(methods: list[str]) -> Iterator[Setting]:
    """All combinations of method, data type and checkpointing."""
    yield from (Setting(*each) for each in itertools.product(methods, ("float32", "bfloat16"), (False, True)))


def write_rows(path: Path, tokenizer: Any, rows: int, length: int) -> None:
    """Writes rows of prompt, chosen and rejected answer, in whole words, that fill ``length`` tokens."""
    drawn = random.Random(0)

    def text(tokens: int) -> str:
        words: list[str] = []
        while len(tokenizer(" ".join(words)).input_ids) < tokens:
            words.append(drawn.choice(WORDS))
        return " ".join(words[:-1])

    whole = [{"prompt": text(30), "chosen": text(length - 32), "rejected": text(length - 32)} for _ in range(rows)]
    path.write_text("".join(json.dumps(row | {"completion": row["chosen"]}) + "\n" for row in whole), encoding="utf-8")


def recipe_of(setting: Setting, lora: bool, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The recipe of one run."""
    policy = {"model": str(options.model), "dtype": setting.dtype, "gradient_checkpointing": setting.checkpointing}
    kind, needless = ("sft", ["chosen", "rejected"]) if setting.method == "sft" else ("dpo", ["completion"])
    return {
        "policy": policy | ({"lora": {"rank": options.rank, "alpha": 2 * options.rank}} if lora else {}),
        "data": {"path": str(folder / "rows.jsonl"), "ignore": needless, "chat": False},
        **METHODS[kind],
        "steps": options.steps,
        "prompts_per_step": options.rows,
        "micro_batch_tokens": options.tokens * options.micro_batch,
        "run": {"folder": str(folder / "run"), "save_every": 1000, "rollouts_every": 0, "trackers": []},
    }


def measure(setting: Setting, lora: bool, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs one recipe in a process of its own; its peak memory and its estimate, in MB."""
    path = folder / "recipe.json.yaml"
    path.write_text(json.dumps(recipe_of(setting, lora, options, folder)), encoding="utf-8")
    command = [sys.executable, "-m", "posttrain", "train", str(path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = run.stdout.read() if run.stdout else ""
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"{setting}: the run ended with status {status}:\n{output}")
    metrics = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    subprocess.run(["rm", "-r", str(folder / "run")], check=True)
    estimate = re.search(r"memory: about ([\d.]+) GB", output)
    if options.verbose:
        print(output)
    return {
        "peak_mb": round(usage.ru_maxrss / 1024),  # at least the peak of this small process, which started it
        "peak_in_steps_mb": round(json.loads(metrics[-1])["time/peak_memory_mb"]),
        "estimate_mb": round(float(estimate[1]) * 1000) if estimate else None,
        "losses": [json.loads(line)["loss"] for line in metrics],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--only", default="", help="only the settings whose names contain this")
    parser.add_argument("--rows", type=int, default=2, help="rows a step")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows in a micro-batch")
    parser.add_argument("--tokens", type=int, default=350, help="length of a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    options.model = options.model.resolve()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="adapter-memory-") as name:
        write_rows(Path(name) / "rows.jsonl", AutoTokenizer.from_pretrained(options.model), 64, options.tokens)
        for setting in settings(options.methods):
            if options.only not in str(setting):
                continue
            results[str(setting)] = measured = {
                kind: measure(setting, kind == "adapters", options, Path(name)) for kind in ("adapters", "full")
            }
            print(f"{setting}:", ", ".join(f"{kind} {figures}" for kind, figures in measured.items()), flush=True)
    write_result(options.json, {"runs": results})


if __name__ == "__main__":
    main()
