"""PPO with a critic beside GRPO at the same number of generated tokens, and an ablation of VAPO.

    python benchmarks/ppo_against_grpo.py --json benchmarks/results/ppo_against_grpo.json

Every run starts from the quickstart's warmed-up model (one for each seed) and trains on the quickstart's problems by a
recipe of ``benchmarks/ppo``, changed by the overrides of a variant. Held-out accuracy is measured every few steps.
Completions differ in length between methods, so accuracy is compared at equal numbers of generated tokens, by linear
interpolation between two evaluations. The tokens of value pre-training are reported separately.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.system.files import read_rows

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path(__file__).parent / "ppo"
PRETRAINING = "value_pretraining"


class Variant(NamedTuple):
    """A recipe with a few overrides."""

    recipe: str
    overrides: tuple[str, ...] = ()
    pretrained: bool = False


NEW_CRITIC = "--value.model=null"
VARIANTS = {
    "grpo": Variant("grpo"),
    "ppo": Variant("ppo"),
    "vapo": Variant("vapo", pretrained=True),
    "vapo without value pre-training": Variant("vapo", (NEW_CRITIC,)),
    "vapo without decoupled lambda": Variant("vapo", ("--target={use: lambda_return, alpha: 0.05}",), True),
    "vapo without length-adaptive lambda": Variant("vapo", ("--advantage={use: gae, lambda_: 0.95}",), True),
    "vapo without clip-higher": Variant("vapo", ("--loss.0.high=0.2",), True),
    "vapo without token-level loss": Variant("vapo", ("--normaliser={use: seq_mean_of_token_mean}",), True),
    "vapo without positive-example loss": Variant("vapo", ("--loss.1.coef=0.0",), True),
    "vapo without group sampling": Variant("vapo", ("--prompts_per_step=256", "--completions=1"), True),
}


class Curve(NamedTuple):
    """Held-out accuracy as a function of the number of generated tokens."""

    tokens: list[float]
    accuracy: list[float]

    def at(self, tokens: float) -> float:
        """Accuracy after a number of tokens, interpolated linearly between two evaluations."""
        after = next((i for i, seen in enumerate(self.tokens) if seen >= tokens), len(self.tokens) - 1)
        if after == 0:
            return self.accuracy[0]
        (x0, x1), (y0, y1) = self.tokens[after - 1 : after + 1], self.accuracy[after - 1 : after + 1]
        return y0 + (y1 - y0) * min(1.0, (tokens - x0) / (x1 - x0))


def run(recipe: Path, overrides: Sequence[str], folder: Path) -> None:
    """Trains in a separate process, whose output goes to a file. Does nothing if ``folder`` holds a finished run."""
    if (folder / "model").exists() or (folder / "value").exists():
        return
    overrides, log = [*overrides, f"--run.folder={folder}"], folder.with_suffix(".log")
    command = [sys.executable, "-m", "posttrain", str(recipe), *overrides]
    with log.open("w") as output:
        result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{log.read_text()[-3000:]}")


def read_curve(folder: Path) -> Curve:
    """Reads the curve of a run."""
    curve, tokens = Curve([], []), 0.0
    for row in read_rows(folder / "metrics.jsonl"):
        tokens += row.get("length/mean", 0.0) * 256
        if "eval/accuracy" in row:
            curve.tokens.append(tokens)
            curve.accuracy.append(row["eval/accuracy"])
    return curve


def generated(folder: Path) -> float:
    """Number of tokens that a run sampled to train on."""
    return sum(row.get("length/mean", 0.0) * 256 for row in read_rows(folder / "metrics.jsonl"))


def train_all(names: Sequence[str], seed: int, steps: int, engine: str, work: Path) -> dict[str, Any]:
    """Trains every variant from the start model of one seed."""
    from posttrain.quickstart import story
    from posttrain.quickstart.start import Start

    start = Start(work / f"start-{seed}")
    if not start.model.exists():
        story.prepare(start.path, seed)
    common = [
        f"--policy.model={start.model}",
        f"--data.path={start.train}",
        f"--seed={seed}",
        f"--engine.use={engine}",
        "--run.rollouts_every=0",
        "--run.trackers=[]",
    ]
    critic = work / f"{PRETRAINING}-{seed}"
    results: dict[str, Any] = {}
    if any(VARIANTS[name].pretrained for name in names):
        run(RECIPES / f"{PRETRAINING}.yaml", common, critic)
        results[PRETRAINING] = {"tokens": generated(critic), "metrics": last_row(critic)}
    for name in names:
        variant, folder = VARIANTS[name], work / f"{name.replace(' ', '-')}-{seed}"
        overrides = [*common, f"--evaluate.data.path={start.held_out}", f"--steps={steps}"]
        overrides += [f"--value.model={critic / 'value'}"] if variant.pretrained else []
        run(RECIPES / f"{variant.recipe}.yaml", [*overrides, *variant.overrides], folder)
        results[name] = read_curve(folder)
        print(f"seed {seed}  {name:40} {results[name].accuracy[0]:.3f} -> {results[name].accuracy[-1]:.3f}", flush=True)
    return results


def last_row(folder: Path) -> dict[str, float]:
    """Value metrics of a run's last step."""
    last = read_rows(folder / "metrics.jsonl")[-1]
    return {name: value for name, value in last.items() if name.startswith("value/")}


def summary(seeds: dict[int, dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each variant at the number of tokens that every run of the seed reached, and at half of it."""
    table: dict[str, Any] = {}
    for name in names:
        at_half, at_end = [], []
        for results in seeds.values():
            budget = min(results[other].tokens[-1] for other in names)
            at_half.append(results[name].at(budget / 2))
            at_end.append(results[name].at(budget))
        table[name] = {
            "accuracy_at_half": at_half,
            "accuracy": at_end,
            "mean_at_half": statistics.fmean(at_half),
            "mean": statistics.fmean(at_end),
        }
    return table


def main() -> None:
    """Runs the benchmark, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--folder", type=Path, help="where runs are kept and found again; default: a temporary one")
    options = parser.parse_args()
    names: list[str] = list(options.variants)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        seeds = {seed: train_all(names, seed, options.steps, options.engine, work.resolve()) for seed in options.seeds}
    table = summary(seeds, names)
    print(f"\n{'held-out accuracy at equal generated tokens':48} half      all   (by seed)")
    for name, row in table.items():
        by_seed = " ".join(f"{value:.3f}" for value in row["accuracy"])
        print(f"{name:48} {row['mean_at_half']:.3f}   {row['mean']:.3f}   ({by_seed})")
    if options.json:
        curves = {
            str(seed): {name: value._asdict() if isinstance(value, Curve) else value for name, value in results.items()}
            for seed, results in seeds.items()
        }
        content = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": f"python benchmarks/ppo_against_grpo.py {' '.join(sys.argv[1:])}",
            "steps": options.steps,
            "engine": options.engine,
            "table": table,
            "seeds": curves,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
