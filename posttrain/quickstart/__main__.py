"""The command ``python -m posttrain.quickstart``: makes a model and teaches it by GRPO to write out its arithmetic."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

# Set before torch is imported. Waiting threads should sleep instead of spinning: other processes may need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM binds memory to a NUMA node, of which torch would warn

from posttrain.errors import UserError  # noqa: E402

START_AT_MOST, END_AT_LEAST = 0.6, 0.9
RECIPES = (
    Path(__file__).resolve().parents[2] / "recipes",  # in a clone of the repository
    Path(sysconfig.get_path("data"), "share", "posttrain", "recipes"),  # of an installed package
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the quickstart; returns the exit code: 1 if an accuracy is missed, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    try:
        return 0 if quickstart(options.folder, options.engine, options.seed) else 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m posttrain.quickstart", description=__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="run folder; an earlier quickstart in it is removed",
    )
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="default: vllm where it is installed")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, model and training")
    return parser


def quickstart(folder: Path, engine: str | None, seed: int) -> bool:
    """Runs all chapters, which print what they do. True if the accuracies before and after are as expected."""
    began = time.monotonic()
    clear(folder)
    engine = engine or choose_engine()
    from posttrain.quickstart import story

    start = story.prepare(start_folder(folder), seed)
    recipe = find_recipe()
    story.train(recipe, start, folder, engine, seed)
    before, after = story.compare(start, folder, seed)
    story.where_things_are(recipe, start, folder)
    reached = before <= START_AT_MOST and after >= END_AT_LEAST
    if not reached:
        print(f"Expected: at most {START_AT_MOST} before training and at least {END_AT_LEAST} after it.")
    seconds = round(time.monotonic() - began)
    print(f"quickstart: accuracy {before:.2f} -> {after:.2f}, {seconds} s, engine {engine}, model {folder / 'model'}")
    return reached


def start_folder(folder: Path) -> Path:
    """Folder of the model and the problems that training starts from, beside the run folder, which must be empty."""
    return folder.with_name(f"{folder.name}-start")


def clear(folder: Path) -> None:
    """Removes the folders of an earlier quickstart.

    Raises:
        UserError: if a folder holds something else.
    """
    from posttrain.quickstart.start import Start

    start = Start(start_folder(folder))
    for path in (folder, start.path):
        if path.exists() and any(path.iterdir()) and not start.demonstrations.exists():
            raise UserError(f"{path} exists and is not from a quickstart; choose another folder with --folder=...")
    for path in (folder, start.path):
        shutil.rmtree(path, ignore_errors=True)


def choose_engine() -> str:
    """Chooses vLLM if it is installed, else the transformers engine."""
    if importlib.util.find_spec("vllm") is not None:
        return "vllm"
    print("vLLM is not installed; the transformers engine samples instead. README.md says how to install vLLM.")
    return "transformers"


def find_recipe() -> Path:
    """Finds the recipe's file.

    Raises:
        UserError: if it is missing.
    """
    for folder in RECIPES:
        if (folder / "quickstart.yaml").exists():
            return folder / "quickstart.yaml"
    raise UserError(f"quickstart.yaml is missing; looked in {' and '.join(map(str, RECIPES))}")


if __name__ == "__main__":
    sys.exit(main())
