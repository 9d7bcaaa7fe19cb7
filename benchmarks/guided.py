"""What a value buys at decoding time, and what it costs: every guided decoder beside plain sampling, through vLLM.

    python benchmarks/guided.py --json benchmarks/results/guided.json

First part: accuracy on held-out problems against generated tokens, discarded ones included. All prompts are decoded at
once by each decoder of ``guided_suite.yaml``. What plain sampling does with more tokens is a vote among the samples;
the same tokens spent on whole completions, of which the value picks one, are best-of-n. Second part: see
``guided_costs.py``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from guided_costs import Sizes, measure_costs
from guided_models import Training, prepare
from online_step import machine

from posttrain.reports.decoding import measure_all
from posttrain.reports.decoding_plots import PICTURES, draw_frontier
from posttrain.reports.decoding_suite import PLAIN, read_suite
from posttrain.reports.value_plots import STYLE

SUITE = Path(__file__).parent / "guided_suite.yaml"
MULTIPLES = (2, 4, 8)
"""Budgets: so many times the tokens of a plain completion."""
GUIDED = ("blockwise", "SMC")
BASELINE = "best-of-n"


def measure_accuracy(folder: Path, limit: int, engine: str) -> list[dict[str, Any]]:
    """The points of the suite: a decoder at one size each."""
    suite = folder / SUITE.name
    shutil.copy(SUITE, suite)
    overrides = [f"--data.limit={limit}", f"--engine.use={engine}", f"--report.folder={folder / 'report'}"]
    report = measure_all(*read_suite(suite, overrides))
    return json.loads((report / "metrics.json").read_text(encoding="utf-8"))["points"]


def at_budget(points: Sequence[dict[str, Any]], tokens: float) -> tuple[float, float] | None:
    """Accuracy and standard error at so many generated tokens, between two sizes on a line in log tokens.

    None beyond the largest size; 10 % more or less than a size counts as that size.
    """
    own = sorted(points, key=lambda point: point["generated"])
    near = min(own, key=lambda point: abs(math.log(point["generated"] / tokens)))
    if abs(math.log(near["generated"] / tokens)) < math.log(1.1):
        return near["reward"], near["reward_error"]
    for low, high in zip(own, own[1:], strict=False):
        if low["generated"] <= tokens <= high["generated"]:
            share = math.log(tokens / low["generated"]) / math.log(high["generated"] / low["generated"])
            error = max(low["reward_error"], high["reward_error"])
            return low["reward"] + share * (high["reward"] - low["reward"]), error
    return None


def compare(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each decoder at equal generated tokens, and where the guided ones are ahead of best-of-n."""
    plain = points[0]
    budgets = [multiple * plain["generated"] for multiple in MULTIPLES]
    methods = dict.fromkeys(point["method"] for point in points if point["method"] != PLAIN)
    table = {
        method: [at_budget([p for p in points if p["method"] == method], budget) for budget in budgets]
        for method in methods
    }
    ahead = {}
    for name in GUIDED:
        gaps = [_gap(mine, its) for mine, its in zip(table[name], table[BASELINE], strict=True)]
        ahead[name] = {str(multiple): gap for multiple, gap in zip(MULTIPLES, gaps, strict=True)}
    return {
        "plain": {"accuracy": plain["reward"], "error": plain["reward_error"], "tokens": plain["generated"]},
        "multiples": MULTIPLES,
        "accuracy": table,
        f"ahead_of_{BASELINE}": ahead,
    }


def _gap(mine: tuple[float, float] | None, its: tuple[float, float] | None) -> dict[str, float] | None:
    if mine is None or its is None:
        return None
    error = math.hypot(mine[1], its[1])
    return {"difference": mine[0] - its[0], "error": error}


def print_comparison(compared: dict[str, Any]) -> None:
    """The table for people."""
    plain = compared["plain"]
    print(f"\n{'accuracy at equal generated tokens':36}" + "".join(f"{f'x {m}':>16}" for m in MULTIPLES))
    name = f"{PLAIN} ({plain['tokens']:.0f} tokens)"
    print(f"{name:36}{_cell((plain['accuracy'], plain['error']))}")
    for method, row in compared["accuracy"].items():
        print(f"{method:36}" + "".join(map(_cell, row)))
    for name, gaps in compared[f"ahead_of_{BASELINE}"].items():
        told = [f"x {m} {g['difference']:+.3f} ± {g['error']:.3f}" for m, g in gaps.items() if g is not None]
        print(f"{name} beside {BASELINE}: {', '.join(told)}")


def _cell(measured: tuple[float, float] | None) -> str:
    return ("-" if measured is None else f"{measured[0]:.3f} ± {measured[1]:.3f}").rjust(16)


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against generated tokens."""
    with plt.rc_context({**STYLE, "figure.figsize": (6.4, 5.6)}):
        figure, axes = plt.subplots()
        draw_frontier(axes, points, points, PICTURES["reward_tokens.png"])
        axes.set_title("Chains of additions: accuracy against generated tokens")
        axes.set_ylabel("accuracy, 95 % interval")
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, with the seconds of each part."""
    seconds = {}
    start = time.perf_counter()
    prepare(folder, Training(value_steps=arguments.value_steps, policy_steps=arguments.policy_steps), arguments.engine)
    seconds["models"] = time.perf_counter() - start
    result: dict[str, Any] = {"seconds": seconds}
    if "accuracy" in arguments.parts:
        points = measure_accuracy(folder, arguments.prompts, arguments.engine)
        result |= {"compared": compare(points), "points": points}
        print_comparison(result["compared"])
        seconds["accuracy"] = time.perf_counter() - start - seconds["models"]
    if "costs" in arguments.parts:
        result["costs"] = measure_costs(folder / "policy", folder / "value_run" / "value", Sizes())
        seconds["costs"] = time.perf_counter() - start - sum(seconds.values())
    return result


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results; a picture goes beside it")
    parser.add_argument("--prompts", type=int, default=1024, help="held-out problems, decoded at once")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--policy-steps", type=int, default=Training.policy_steps)
    parser.add_argument("--value-steps", type=int, default=Training.value_steps)
    parser.add_argument("--parts", nargs="+", choices=("accuracy", "costs"), default=["accuracy", "costs"])
    parser.add_argument("--folder", type=Path, help="where models are kept and found again; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = run((arguments.folder or Path(temporary)).resolve(), arguments)
    if arguments.json:
        written = {
            "date": datetime.date.today().isoformat(),
            "command": f"python benchmarks/guided.py {' '.join(sys.argv[1:])}",
            "machine": machine(),
            **result,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        if "points" in result:
            draw(result["points"], arguments.json.with_name(f"{arguments.json.stem}_accuracy.png"))


if __name__ == "__main__":
    main()
