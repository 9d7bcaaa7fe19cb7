"""IVO round by round: the share of the reward's variance that the value explains, and the reward of guided decoding.

    python benchmarks/iterate_ivo.py --json benchmarks/results/iterate_ivo.json

The policy is the quickstart's warmed-up model, which works out half of its additions and guesses the rest. Each of
``recipes/iterate/ivo*.yaml`` runs three rounds with sizes for a tiny model. In a round the value model learns from
completions of the guided policy of the previous round (in the first round, of the policy itself); then held-out prompts
are decoded with it. The explained variance is measured before the values learn from a step's completions, and averaged
over the last ten steps of the round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from online_step import machine

from posttrain.commands.decode import run_decode
from posttrain.commands.iterate import run_iterate
from posttrain.commands.iterate_plan import IterateRecipe
from posttrain.commands.iterate_state import read_rounds
from posttrain.quickstart import story
from posttrain.quickstart.start import Start
from posttrain.recipe.loading import load_as
from posttrain.reports.rounds import column, stage_metrics

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ANCHORS = {"fixed": "ivo", "moving": "ivo_moving", "fixed, soft values": "ivo_soft"}


def shared_settings(folder: Path, engine: str) -> str:
    """Settings laid over all recipes: the tiny policy, its problems, and short completions."""
    data = f"{{path: {folder}/start/train.jsonl, name: null, columns: {{}}, system: null}}"
    policy = f"{{model: {folder}/start/model, dtype: float32}}"
    engine_options = f"{{use: {engine}, max_concurrent: 256, cache_mb: 256}}"
    return f"{{policy: {policy}, data: {data}, engine: {engine_options}, sampling: {{max_tokens: 48}}}}"


def settings(arguments: argparse.Namespace, name: str) -> list[str]:
    """Overrides of a recipe: sizes for a tiny model, the guide's strength, and one temperature in all rounds."""
    folder = arguments.folder
    values = {
        "steps": str(arguments.steps),
        "minibatches": "2",
        "sampling.temperature": "1.0",
        "value": "{optimizer: {learning_rate: 1.0e-3}}",
        "policy": "{gradient_checkpointing: false}",
        "run": "{rollouts_every: 0, trackers: [], save_every: 1000}",
    }
    held_out = {"data": f"{{path: {folder}/start/held_out.jsonl, split: train, limit: {arguments.prompts}}}"}
    stages = yaml.safe_load((RECIPES / "iterate" / f"{name}.yaml").read_text(encoding="utf-8"))["stages"]
    shaped = stages["values"]["later"]["decoder"] | {"k": 4, "every": 1, "strength": arguments.strength}
    if "target" in stages["values"].get("set", {}):
        values["target.beta"] = str(1 / arguments.strength)
    held_out["decoder"] = json.dumps(shaped)
    return [
        f"--folder={folder / name}",
        f"--stages.values.later.decoder={json.dumps(shaped)}",
        f"--rounds={arguments.rounds}",
        f"--set={shared_settings(folder, arguments.engine)}",
        *(f"--stages.values.set.{key}={value}" for key, value in values.items()),
        *(f"--stages.held_out.set.{key}={value}" for key, value in held_out.items()),
    ]


def plain_score(arguments: argparse.Namespace) -> float:
    """Reward of the policy alone on the held-out prompts, with the seeds of the guided decoding."""
    folder = arguments.folder / "plain"
    recipe = folder.parent / "plain.yaml"
    recipe.write_text(
        f"policy: {{model: {arguments.folder}/start/model}}\ndata: {{path: start/held_out.jsonl}}\n", encoding="utf-8"
    )
    run_decode(
        recipe,
        [
            f"--data.limit={arguments.prompts}",
            "--verify=[{use: math}]",
            "--sampling={max_tokens: 48}",
            f"--engine={{use: {arguments.engine}, max_concurrent: 256, cache_mb: 256}}",
            f"--output={folder / 'completions.jsonl'}",
        ],
    )
    return stage_metrics("decode", folder)["score"]


def table_by_round(name: str, folder: Path) -> dict[str, list[float]]:
    """The columns of the recipe's table, with one number for each round."""
    rows: dict[int, dict[str, dict[str, float]]] = {}
    for stage in read_rounds(folder):
        rows.setdefault(stage.round, {})[stage.stage] = stage.metrics
    table = load_as(IterateRecipe, RECIPES / "iterate" / f"{name}.yaml").table
    return {title: list(column(source, rows).values()) for title, source in table.items()}


def main() -> None:
    """Runs what is missing, and writes all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "posttrain-ivo", help="where runs are kept"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="steps of the value model in a round")
    parser.add_argument("--strength", type=float, default=1.0, help="strength of the guide, in 1 / reward")
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts")
    parser.add_argument("--anchors", nargs="+", choices=ANCHORS, default=list(ANCHORS))
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not Start(arguments.folder / "start").model.exists():
        story.prepare(arguments.folder / "start", seed=0)
    results: dict[str, Any] = {"policy": {"score": plain_score(arguments)}}
    for anchor in arguments.anchors:
        name = ANCHORS[anchor]
        resume = (arguments.folder / name / "recipe.yaml").exists()
        run_iterate(RECIPES / "iterate" / f"{name}.yaml", settings(arguments, name), resume=resume)
        results[anchor] = table_by_round(name, arguments.folder / name)
        print(anchor, json.dumps(results[anchor]), flush=True)
        if arguments.json is not None:
            write(arguments, results)


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes the results so far."""
    sizes = {name: getattr(arguments, name) for name in ("rounds", "steps", "strength", "prompts", "engine")}
    command = f"python benchmarks/iterate_ivo.py --steps {arguments.steps} --json FILE"
    content = {"date": date.today().isoformat(), "command": command, "sizes": sizes, **machine(), "rounds": results}
    arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
