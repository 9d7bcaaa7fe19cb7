"""Measures how well process and outcome reward models find the first wrong step.

    python benchmarks/first_wrong_step.py --json benchmarks/results/first_wrong_step.json

A tiny model learns to solve chains of additions from demonstrations with slips. It samples solutions, and branches from
their steps give labels: of every step (Math-Shepherd), and by binary search (OmegaPRM). Value models that start as the
policy learn from the same solutions. They learn one of the two kinds of step labels, or whether the answer was right,
at the last token (an outcome reward model) or at all tokens (a value function). On held-out problems each model scores
every step of the solutions that the policy samples. The predicted first wrong step is the first one whose score is
below a threshold, which is tuned on other solutions. The true one is known from the arithmetic. The main result is the
F1 of ProcessBench. The chance baseline predicts "no step is wrong" for a share of the solutions and a random step for
the rest; the share is the one with the best F1.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chain_problems import Chain, draw, first_wrong, parse, worked_out

from posttrain import load_recipe, train
from posttrain.batch import Batch
from posttrain.commands.label import run_labels
from posttrain.data.examples import stepwise
from posttrain.models.policy import Policy
from posttrain.models.value_files import load_value
from posttrain.parts.credit import step_ends
from posttrain.quickstart.imitation import Example, fit
from posttrain.quickstart.model import END, make_model, make_tokenizer
from posttrain.quickstart.start import prompt_ids
from posttrain.recipe import sections
from posttrain.recipe.sections import OptimizerSection
from posttrain.system.files import read_rows, write_rows

MODELS = {
    "process model, labels of every step": ("each_step.jsonl", "{use: step_labels}"),
    "process model, labels by binary search": ("binary_search.jsonl", "{use: step_labels}"),
    "outcome model": ("each_step.jsonl", "{use: outcome_label, at: end}"),
    "outcome at every token": ("each_step.jsonl", "{use: outcome_label}"),
}
LABELS = """\
policy: {{model: {folder}/policy}}
data: {{path: {folder}/{data}}}
verify: [{{use: math}}]
sampling: {{max_tokens: 64}}
engine: {{use: {engine}, max_concurrent: 256}}
completions: {completions}
label: {{method: {method}, completions: {branches}}}
output: {folder}/{output}
seed: {seed}
"""
TRAIN = """\
policy: {{model: {folder}/policy}}
data: {{path: {folder}/{labels}}}
examples: {{use: stepwise}}
value: {{head: {{type: bernoulli}}, optimizer: {{learning_rate: 1.0e-3, schedule: cosine, warmup_steps: 10}}}}
target: {target}
value_loss: [{{use: bce}}]
steps: {steps}
prompts_per_step: 32
run: {{folder: {folder}/runs/{name}, save_every: 100000, rollouts_every: 0, trackers: []}}
seed: {seed}
"""


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark: problems, solutions, branches and training steps."""

    demonstrations: int = 32000
    warm_up_steps: int = 1000
    slip: float = 0.1  # probability that a line of a demonstration is wrong
    problems: int = 2000  # problems that value models train on; with few of them they memorise solutions
    held_out: int = 300
    completions: int = 2
    branches: int = 6
    steps: int = 1200
    engine: str = "transformers"


@dataclass(frozen=True)
class Solution:
    """A held-out solution: the true first wrong step (None if there is none) and the number of steps."""

    wrong: int | None
    steps: int


def make_policy(folder: Path, settings: Settings, seed: int) -> None:
    """Writes files of problems, and trains a policy on demonstrations of other problems."""
    rng = random.Random(seed)
    problems = draw(settings.demonstrations + settings.problems + 2 * settings.held_out, rng)
    for name, count in (("train", settings.problems), ("tune", settings.held_out), ("held_out", settings.held_out)):
        rows = [{"prompt": chain.prompt, "answer": chain.answer} for chain in problems[:count]]
        write_rows(folder / f"{name}.jsonl", rows)
        del problems[:count]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    examples = [_example(tokenizer, chain, worked_out(chain, settings.slip, rng)) for chain in problems]
    optimizer = OptimizerSection(learning_rate=3e-3, betas=(0.9, 0.98), schedule="cosine", warmup_steps=30)

    def report(step: int, metrics: dict[str, float]) -> None:
        if step % 100 == 0:
            print(f"  step {step}: {metrics['loss']:.3f} nats a token", flush=True)

    fit(
        Policy(model),
        examples,
        steps=settings.warm_up_steps,
        batch_size=32,
        optimizer=optimizer,
        seed=seed,
        on_step=report,
    )
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")


def _example(tokenizer: Any, chain: Chain, solution: str) -> Example:
    return Example(prompt_ids(tokenizer, chain.prompt), tokenizer.encode(solution + END))


def make_labels(folder: Path, settings: Settings, seed: int) -> dict[str, float]:
    """Writes label files for all splits; returns the seconds of each method on the training problems."""
    seconds = {}
    for data, method, output in (
        ("train", "each_step", "each_step.jsonl"),
        ("train", "binary_search", "binary_search.jsonl"),
        ("tune", "binary_search", "tune_solutions.jsonl"),
        ("held_out", "binary_search", "held_out_solutions.jsonl"),
    ):
        recipe = folder / f"label_{output}.yaml"
        text = LABELS.format(
            folder=folder,
            data=f"{data}.jsonl",
            method=method,
            output=output,
            seed=seed,
            engine=settings.engine,
            completions=settings.completions,
            branches=settings.branches if data == "train" else 1,  # other splits need only the solutions
        )
        recipe.write_text(text)
        start = time.perf_counter()
        run_labels(recipe)
        if data == "train":
            seconds[method] = round(time.perf_counter() - start, 1)
    return seconds


def train_model(folder: Path, name: str, settings: Settings, seed: int) -> Path:
    """Trains a value model on a file of labels; returns its folder."""
    labels, target = MODELS[name]
    run = name.replace(" ", "_").replace(",", "")
    recipe = folder / f"train_{run}.yaml"
    recipe.write_text(
        TRAIN.format(folder=folder, labels=labels, target=target, steps=settings.steps, name=run, seed=seed)
    )
    train(load_recipe(recipe))
    return folder / "runs" / run / "value"


def read_solutions(path: Path) -> list[Solution]:
    """Reads the solutions of a label file, with their true first wrong steps."""
    return [
        Solution(first_wrong(parse(row["prompt"][0]["content"]), row["completions"]), len(row["completions"]))
        for row in read_rows(path)
    ]


def score_steps(model: Path, solutions: Path, batch_size: int = 128) -> list[list[float]]:
    """The value at the end of every step of every solution."""
    examples = stepwise(sections.DataSection(path=str(solutions)), make_tokenizer(), None)
    value_model, scores = load_value(model), []
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            batch = examples.batch(range(start, min(start + batch_size, len(examples))))
            scores += _at_ends(value_model(batch.tokens, batch.states)[0], batch)
    return scores


def _at_ends(value: torch.Tensor, batch: Batch) -> list[list[float]]:
    ends = step_ends(batch)
    return [row[chosen].tolist() for row, chosen in zip(value, ends, strict=True)]


def below(threshold: float) -> Callable[[Sequence[float]], int | None]:
    """Finds the first step whose score is below the threshold."""
    return lambda scores: next((i for i, score in enumerate(scores) if score < threshold), None)


def measure(scores: Sequence[Sequence[float]], solutions: Sequence[Solution], threshold: float) -> dict[str, float]:
    """Share of wrong solutions whose first wrong step is found, and share of faultless ones without a wrong step found.

    ``f1`` is their harmonic mean, as in ProcessBench (Zheng et al. 2024, arXiv:2412.06559).
    """
    predicted = [below(threshold)(step_scores) for step_scores in scores]
    hits = [step == s.wrong for step, s in zip(predicted, solutions, strict=True)]
    wrong = [hit for hit, s in zip(hits, solutions, strict=True) if s.wrong is not None]
    right = [hit for hit, s in zip(hits, solutions, strict=True) if s.wrong is None]
    share_found, share_passed = sum(wrong) / len(wrong), sum(right) / len(right)
    f1 = harmonic_mean(share_found, share_passed)
    return {"first_wrong_step_found": share_found, "faultless_passed": share_passed, "f1": f1}


def chance(wrong: Sequence[Solution]) -> dict[str, float]:
    """Results by chance: predicts "no step is wrong" with the best probability, and a random step otherwise."""
    hit_rate = sum(1 / s.steps for s in wrong) / len(wrong)
    passed = max((i / 1000 for i in range(1, 1000)), key=lambda share: harmonic_mean((1 - share) * hit_rate, share))
    return {"first_wrong_step_found": hit_rate, "f1": harmonic_mean((1 - passed) * hit_rate, passed)}


def harmonic_mean(a: float, b: float) -> float:
    """The harmonic mean of two shares; 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def best_threshold(scores: Sequence[Sequence[float]], solutions: Sequence[Solution]) -> float:
    """The threshold with the best F1 on these solutions."""
    every_score = torch.tensor([score for step_scores in scores for score in step_scores])
    candidates = every_score.quantile(torch.linspace(0.005, 0.995, 100))
    return max(candidates.tolist(), key=lambda threshold: measure(scores, solutions, threshold)["f1"])


def evaluate(folder: Path, model: Path) -> dict[str, float]:
    """Measures a model on held-out solutions, at the tuned threshold and at one half."""
    tune, held_out = (folder / f"{name}_solutions.jsonl" for name in ("tune", "held_out"))
    threshold = best_threshold(score_steps(model, tune), read_solutions(tune))
    scores, solutions = score_steps(model, held_out), read_solutions(held_out)
    at_half = measure(scores, solutions, 0.5)["first_wrong_step_found"]
    wrong = [(s, truth.wrong) for s, truth in zip(scores, solutions, strict=True) if truth.wrong is not None]
    drops = [_largest_drop(step_scores) == first for step_scores, first in wrong]
    return {
        "threshold": threshold,
        **measure(scores, solutions, threshold),
        "first_wrong_step_found_at_half": at_half,
        "largest_drop_is_first_wrong_step": sum(drops) / len(drops),
    }


def _largest_drop(scores: Sequence[float]) -> int:
    """The step at which the score falls most; the score before the first step counts as 1."""
    return min(range(len(scores)), key=lambda i: scores[i] - (scores[i - 1] if i else 1.0))


def label_quality(path: Path) -> dict[str, float]:
    """Quality of the labels: how often the first step that they call wrong is the first wrong one."""
    rows = read_rows(path)
    truth = read_solutions(path)
    labelled = [next((i for i, label in enumerate(row["labels"]) if label == 0), None) for row in rows]
    wrong = [step == t.wrong for step, t in zip(labelled, truth, strict=True) if t.wrong is not None]
    return {
        "solutions": len(rows),
        "first_wrong_step_found": sum(wrong) / len(wrong),
        "branches": sum(sum(row["branches"][:-1]) for row in rows),
    }


def run(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Runs the benchmark with one seed, from demonstrations to results."""
    make_policy(folder, settings, seed)
    seconds = make_labels(folder, settings, seed)
    solutions = read_solutions(folder / "held_out_solutions.jsonl")
    wrong = [s for s in solutions if s.wrong is not None]
    result: dict[str, Any] = {
        "held_out": {"solutions": len(solutions), "wrong": len(wrong)},
        "labels": {m: {**label_quality(folder / f"{m}.jsonl"), "seconds": s} for m, s in seconds.items()},
        "chance": chance(wrong),
    }
    for name in MODELS:
        result[name] = evaluate(folder, train_model(folder, name, settings, seed))
        print(f"{name}: {result[name]}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seeds", type=int, default=2)
    for name, default in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    path, seeds = arguments.pop("json"), arguments.pop("seeds")
    settings, results = Settings(**arguments), {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            results[seed] = run(Path(folder), settings, seed)
        if path is not None:
            save(path, settings, results)
    for name, mean in mean_f1(results).items():
        print(f"{name:40} {mean:.3f}")


def mean_f1(results: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Mean F1 over the seeds so far."""
    return {name: sum(r[name]["f1"] for r in results.values()) / len(results) for name in ("chance", *MODELS)}


def save(path: Path, settings: Settings, results: dict[int, dict[str, Any]]) -> None:
    """Writes all results so far as JSON."""
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    content = {"settings": vars(settings), "machine": machine, "f1": mean_f1(results), "seeds": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
