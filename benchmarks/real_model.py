"""A real pretrained model, end to end: SmolLM2-135M-Instruct, before and after each kind of recipe.

    python benchmarks/real_model.py --gsm8k GSM8K --json benchmarks/results/real_model.json
    python benchmarks/real_model.py --parts sft grpo --size small --json FILE      # parts alone; others are kept

The recipes are those of ``examples/real``, at full size as they are, at small size with fewer steps and rows. Each part
runs in a process of its own in ``--folder`` (runs and data go to ``runs/real`` there). Its figures are added to the
JSON file as soon as it ends; a part that is there already, of the same size, is not run again unless ``--again`` is
given. ``GSM8K`` is a folder with ``example_model_solutions.jsonl`` of github.com/openai/grade-school-math. A page
with all figures stands beside the JSON file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import real_page
import real_start
from online_step import machine

from posttrain.errors import UserError
from posttrain.system.files import read_rows
from posttrain.system.memory import peak_bytes

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "examples" / "real"
RUNS = Path("runs") / "real"
Size = Literal["small", "full"]


class Task(NamedTuple):
    """A part of the benchmark: a recipe, and which of its metrics tell what was learned."""

    kind: Literal["train", "decode", "evaluate", "serve"]
    metric: str
    meaning: str
    needs: tuple[str, ...] = ()
    small: tuple[str, ...] = ()  # overrides at small size


ADDITIONS = ("--steps=4", "--evaluate.every=4", "--evaluate.data.limit=32", "--prompts_per_step=4")
GIVEN = ("--steps=4", "--evaluate.every=4", "--evaluate.examples.limit=32", "--prompts_per_step=4")
FEW = ("--data.limit=64",)
SUMS = "share of right sums, held-out additions, greedy"
PAIRS = "share of pairs whose right solution is preferred, held-out problems"
ROC = "area under the ROC curve of right against wrong, held-out solutions"
RETURNS = "explained variance of returns, each batch before it is learned from"
TASKS = {
    "grpo": Task("train", "eval/accuracy", SUMS, small=ADDITIONS),
    "sft": Task("train", "eval/accuracy", SUMS, small=ADDITIONS),
    "critic": Task("train", "value/explained_variance", RETURNS, small=("--steps=4", "--prompts_per_step=4")),
    "values": Task(
        "evaluate", "value/explained_variance", "the same, at each token of held-out samples", ("critic",), FEW
    ),
    "ppo": Task("train", "eval/accuracy", SUMS, needs=("critic",), small=ADDITIONS),
    "sample": Task("decode", "score", "share of right sums, held-out additions, sampled", small=FEW),
    "best_of_n": Task("decode", "score", "the same, the best of 8", ("critic",), FEW),
    "blockwise": Task("decode", "score", "the same, the best of 8 blocks", ("critic",), FEW),
    "serve": Task("serve", "score", "share of right sums through OpenAI's client", needs=("grpo",)),
    "lora": Task("train", "eval/accuracy", SUMS, small=ADDITIONS),
    "dpo": Task("train", "eval/preference/accuracy", PAIRS, small=GIVEN),
    "kto": Task("train", "eval/preference/auc", ROC, small=GIVEN),
    "reward": Task("train", "eval/value/pair_accuracy", PAIRS, small=GIVEN),
    "outcome": Task("train", "eval/value/auc", ROC, small=GIVEN),
}


def proportion_error(share: float, count: int) -> float:
    """Standard error of a share of ``count`` independent rows."""
    return (share * (1 - share) / count) ** 0.5


def area_error(area: float, right: int, wrong: int) -> float:
    """Standard error of the area under an ROC curve (Hanley and McNeil 1982, Radiology 143, 29-36)."""
    two_right, two_wrong = area / (2 - area), 2 * area**2 / (1 + area)
    spread = (right - 1) * (two_right - area**2) + (wrong - 1) * (two_wrong - area**2)
    return ((area * (1 - area) + spread) / (right * wrong)) ** 0.5


def before_and_after(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """First and last value of a metric in the rows of ``metrics.jsonl``.

    Raises:
        UserError: if no row has the metric.
    """
    values = [row[metric] for row in rows if row.get(metric) is not None]
    if not values:
        raise UserError(f"the run reports no {metric}")
    return {"before": values[0], "after": values[-1]}


def run(command: Sequence[str], folder: Path, log: Path) -> dict[str, float]:
    """Runs a command in ``folder``; returns its wall time, and the peak memory of its process.

    Raises:
        UserError: if it fails; the message ends with the last lines of its output.
    """
    start, peak = time.perf_counter(), 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.05)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise UserError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_memory_mb": peak >> 20}


def held_out_rows(name: str, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Held-out rows that the metric of a training part is measured on; none if it has no evaluation."""
    from posttrain.training.recipe import load_recipe

    evaluate = load_recipe(RECIPES / f"{name}.yaml", overrides).evaluate
    section = None if evaluate is None else evaluate.data or evaluate.examples
    return [] if section is None else read_rows(folder / section.path)[: section.limit]


def standard_error(metric: str, value: float, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard error of a figure on held-out rows; None if the figure is no share and no area.

    Rows that a recipe leaves out as too long are counted, so that the error is a little too small where there are any.
    """
    if not rows:
        return None
    if not metric.endswith("auc"):
        return proportion_error(value, len(rows))
    right = sum(bool(row["label"]) for row in rows)
    return area_error(value, right, len(rows) - right)


def train_part(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Trains by a recipe, and reads what it has learned in its metrics."""
    task = TASKS[name]
    overrides = [*(task.small if size == "small" else ()), f"--run.folder={RUNS / name}"]
    command = [sys.executable, "-m", "posttrain", "train", str(RECIPES / f"{name}.yaml"), *overrides]
    cost = run(command, folder, folder / RUNS / f"{name}.log")
    result: dict[str, Any] = before_and_after(read_rows(folder / RUNS / name / "metrics.jsonl"), task.metric)
    rows = held_out_rows(name, folder, overrides)
    errors = {f"{when}_error": standard_error(task.metric, result[when], rows) for when in ("before", "after")}
    return {**result, **errors, "rows": len(rows), **cost}


def evaluate_part(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Measures a model by a recipe of ``posttrain eval``, and reads its report."""
    task = TASKS[name]
    overrides = task.small if size == "small" else ()
    command = [sys.executable, "-m", "posttrain", "eval", str(RECIPES / f"{name}.yaml"), *overrides]
    cost = run(command, folder, folder / RUNS / f"{name}.log")
    metrics = json.loads((folder / RUNS / name / "metrics.json").read_text())["metrics"]
    return {"after": metrics[task.metric], "rows": int(metrics["value/states"]), **cost}


def decode_part(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Decodes held-out additions by a recipe; the score is the share of right sums."""
    overrides = TASKS[name].small if size == "small" else ()
    command = [sys.executable, "-m", "posttrain", "decode", str(RECIPES / f"{name}.yaml"), *overrides]
    cost = run(command, folder, folder / RUNS / f"{name}.log")
    scores = [row["score"] for row in read_rows(folder / RUNS / name / "completions.jsonl")]
    share = sum(scores) / len(scores)
    return {"after": share, "after_error": proportion_error(share, len(scores)), "rows": len(scores), **cost}


def serve_part(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Serves the model that GRPO has trained, and asks it for held-out sums with OpenAI's client."""
    command = [sys.executable, str(Path(__file__).with_name("real_serving.py")), str(RECIPES / "serve.yaml")]
    result = folder / RUNS / "serve.json"
    count = "8" if size == "small" else "64"
    cost = run(
        [*command, str(RUNS / "start" / "held_out.jsonl"), count, str(result)], folder, folder / RUNS / "serve.log"
    )
    answers = json.loads(result.read_text())
    return {**answers, "after_error": proportion_error(answers["after"], answers["rows"]), **cost}


PARTS = {"train": train_part, "decode": decode_part, "evaluate": evaluate_part, "serve": serve_part}


def missing(names: Sequence[str], folder: Path) -> list[str]:
    """Sentences that name what parts need and other parts have not made yet."""
    made = {need for need in TASKS if any((folder / RUNS / need / kind).exists() for kind in ("model", "value"))}
    return [
        f"{name} needs the part {need}: add it to --parts"
        for i, name in enumerate(names)
        for need in TASKS[name].needs
        if need not in made and need not in names[:i]
    ]


def read_results(path: Path | None) -> dict[str, Any]:
    """Results of earlier calls, by part."""
    return json.loads(path.read_text())["parts"] if path is not None and path.exists() else {}


def write_results(path: Path, parts: Mapping[str, Any]) -> None:
    """Writes the results so far, and the page of them."""
    command = "python benchmarks/real_model.py --gsm8k GSM8K --json FILE"
    content = {"date": datetime.date.today().isoformat(), "command": command, **machine(), "parts": parts}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    real_page.write(path.with_suffix(".html"), content)


def main() -> None:
    """Runs the parts that are asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results; those of other parts in it are kept")
    parser.add_argument("--folder", type=Path, default=ROOT, help="model, data and runs go to runs/real in it")
    parser.add_argument("--gsm8k", type=Path, help=f"folder of {real_start.SOURCE}")
    parser.add_argument("--parts", nargs="+", choices=("prepare", *TASKS), default=list(TASKS))
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--again", action="store_true", help="run parts whose results are there, too")
    options = parser.parse_args()
    names = [name for name in TASKS if name in options.parts]
    folder = options.folder.resolve()
    if sentences := missing(names, folder):
        parser.error("; ".join(sentences))
    real_start.prepare(folder / RUNS / "start", options.gsm8k, 4000)
    needs_solutions = [name for name in names if name in ("dpo", "kto", "reward", "outcome")]
    if needs_solutions and not (folder / RUNS / "start" / "pairs.jsonl").exists():
        parser.error(f"{', '.join(needs_solutions)}: --gsm8k names the folder of {real_start.SOURCE}")
    results = read_results(options.json)
    for name in names:
        if not options.again and results.get(name, {}).get("size") == options.size:
            print(f"{name}: kept", flush=True)
            continue
        shutil.rmtree(folder / RUNS / name, ignore_errors=True)  # an earlier run of the part, finished or not
        try:
            figures = PARTS[TASKS[name].kind](name, folder, options.size)
        except UserError as error:
            sys.exit(f"{name}: {error}")
        results[name] = {"size": options.size, "metric": TASKS[name].metric, "meaning": TASKS[name].meaning, **figures}
        print(real_page.line(name, results[name]), flush=True)
        if options.json is not None:
            write_results(options.json, results)


if __name__ == "__main__":
    main()
