"""Helpers for tests of whole runs: a recipe on a tiny model, launched as users launch it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

VERIFIER = '''
def share_of_digits(completion, *, answer):
    """Something that a random model can improve at: the more digits the better."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))
'''


def write_run(folder: Path, model: Path, **changes: Any) -> Path:
    """A folder with data, a verifier and ``recipe.yaml``; returns the recipe's path. None leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(1, 7) for b in range(1, 7)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "verifier.py").write_text(VERIFIER, encoding="utf-8")
    recipe = {
        "policy": {"model": str(model)},
        "data": {"path": "data.jsonl"},
        "sampling": {"max_tokens": 12},
        "engine": {"use": "transformers"},
        "verify": [{"use": "verifier.py:share_of_digits", "special_tokens": False}],  # names of tokens are no digits
        "advantage": {"use": "outcome", "center": "group", "scale": "group"},
        "loss": [{"use": "clip"}],
        "steps": 3,
        "prompts_per_step": 4,
        "completions": 4,
        "optimizer": {"learning_rate": 0.003},
        "run": {"folder": str(folder / "run"), "save_every": 2, "keep_finished": 2},
    }
    recipe = {key: value for key, value in (recipe | changes).items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def environment(**more: str) -> dict[str, str]:
    """This process's environment, without what a launcher of an outer run may have left."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMPI_", "VLLM_"))}
    return {k: v for k, v in ours.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")} | more


def command(*arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python ...`` of this environment; output is captured as text."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, env=environment(**variables)
    )


def launch(*arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs ``accelerate launch ...``."""
    return command("-m", "accelerate.commands.launch", *arguments, timeout=timeout, **variables)
