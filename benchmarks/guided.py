"""Accuracy and cost of guided decoding: every guided decoder beside plain sampling, through vLLM.

    python benchmarks/guided.py --json benchmarks/results/guided.json

First part: accuracy on held-out problems against generated tokens, discarded ones included. Each decoder of
``guided_suite.yaml`` decodes all prompts at once. Plain sampling spends more tokens on a vote among samples; best-of-n
spends them on whole completions, of which the value picks one. Second part: see ``guided_costs.py``.
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

from posttrain.reports.decoding import measure_decoders
from posttrain.reports.decoding_plots import PICTURES, draw_frontier
from posttrain.reports.decoding_suite import PLAIN, read_suite
from posttrain.reports.value_plots import STYLE

SUITE = Path(__file__).parent / "guided_suite.yaml"
MULTIPLES = (2, 4, 8)
"""Budgets, as multiples of the tokens of a plain completion."""
GUIDED = ("blockwise", "SMC")
BASELINE = "best-of-n"


def measure_accuracy(folder: Path, limit: int, engine: str) -> list[dict[str, Any]]:
    """Runs the suite; returns its points, one for each decoder and size."""
    suite = folder / SUITE.name
    shutil.copy(SUITE, suite)
    overrides = [f"--data.limit={limit}", f"--engine.use={engine}", f"--report.folder={folder / 'report'}"]
    report = measure_decoders(read_suite(suite, overrides))
    return json.loads((report / "metrics.json").read_text(encoding="utf-8"))["points"]


def at_budget(points: Sequence[dict[str, Any]], tokens: float) -> tuple[float, float] | None:
    """Accuracy and standard error of a decoder at a number of generated tokens.

    Between two sizes the accuracy is interpolated linearly in log tokens. Up to 10 % away from a size, its accuracy
    is used. None outside the measured sizes.
    """
    by_tokens = sorted(points, key=lambda point: point["generated"])
    near = min(by_tokens, key=lambda point: abs(math.log(point["generated"] / tokens)))
    if abs(math.log(near["generated"] / tokens)) < math.log(1.1):
        return near["reward"], near["reward_error"]
    for low, high in zip(by_tokens, by_tokens[1:], strict=False):
        if low["generated"] <= tokens <= high["generated"]:
            share = math.log(tokens / low["generated"]) / math.log(high["generated"] / low["generated"])
            error = max(low["reward_error"], high["reward_error"])
            return low["reward"] + share * (high["reward"] - low["reward"]), error
    return None


def compare(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each decoder at equal generated tokens, and the lead of the guided ones over best-of-n."""
    plain = points[0]
    budgets = [multiple * plain["generated"] for multiple in MULTIPLES]
    methods = dict.fromkeys(point["method"] for point in points if point["method"] != PLAIN)
    table = {
        method: [at_budget([p for p in points if p["method"] == method], budget) for budget in budgets]
        for method in methods
    }
    ahead = {}
    for name in GUIDED:
        gaps = [_gap(guided, baseline) for guided, baseline in zip(table[name], table[BASELINE], strict=True)]
        ahead[name] = {str(multiple): gap for multiple, gap in zip(MULTIPLES, gaps, strict=True)}
    return {
        "plain": {"accuracy": plain["reward"], "error": plain["reward_error"], "tokens": plain["generated"]},
        "multiples": MULTIPLES,
        "accuracy": table,
        f"ahead_of_{BASELINE}": ahead,
    }


def _gap(guided: tuple[float, float] | None, baseline: tuple[float, float] | None) -> dict[str, float] | None:
    """Difference of two accuracies with its standard error."""
    if guided is None or baseline is None:
        return None
    error = math.hypot(guided[1], baseline[1])
    return {"difference": guided[0] - baseline[0], "error": error}


def print_comparison(comparison: dict[str, Any]) -> None:
    """Prints the table of accuracies."""
    plain = comparison["plain"]
    print(f"\n{'accuracy at equal generated tokens':36}" + "".join(f"{f'x {m}':>16}" for m in MULTIPLES))
    name = f"{PLAIN} ({plain['tokens']:.0f} tokens)"
    print(f"{name:36}{_cell((plain['accuracy'], plain['error']))}")
    for method, row in comparison["accuracy"].items():
        print(f"{method:36}" + "".join(map(_cell, row)))
    for name, gaps in comparison[f"ahead_of_{BASELINE}"].items():
        texts = [f"x {m} {g['difference']:+.3f} ± {g['error']:.3f}" for m, g in gaps.items() if g is not None]
        print(f"{name} beside {BASELINE}: {', '.join(texts)}")


def _cell(measured: tuple[float, float] | None) -> str:
    return ("-" if measured is None else f"{measured[0]:.3f} ± {measured[1]:.3f}").rjust(16)


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws accuracy against generated tokens."""
    with plt.rc_context({**STYLE, "figure.figsize": (6.4, 5.6)}):
        figure, axes = plt.subplots()
        draw_frontier(axes, points, points, PICTURES["reward_tokens.png"])
        axes.set_title("Chains of additions: accuracy against generated tokens")
        axes.set_ylabel("accuracy, 95 % interval")
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all parts; returns their results and the seconds of each."""
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
    """Runs the benchmark, prints the table and writes the files."""
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
        content = {
            "date": datetime.date.today().isoformat(),
            "command": f"python benchmarks/guided.py {' '.join(sys.argv[1:])}",
            "machine": machine(),
            **result,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if "points" in result:
            draw(result["points"], arguments.json.with_name(f"{arguments.json.stem}_accuracy.png"))


if __name__ == "__main__":
    main()
