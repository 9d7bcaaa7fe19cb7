r"""Measures what 500 hostile completions cost through the ``math`` verifier: the process that trains, and its workers.

python benchmarks/hostile_completions.py --json benchmarks/results/hostile_completions.json

A part of the completions are long texts of marks, digits and brackets; the others are expressions just below the limits
of what is read at all: powers of sums, nested fractions, factorials, integrals, large matrices. None may run code.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain.recipe.part import Part
from posttrain.system.versions import versions
from posttrain.verify import VerifierPool
from posttrain.verify.functions import math
from posttrain.verify.symbolic import CPU_SECONDS

PIECES = (
    "\\boxed{",
    "}",
    "9",
    "9,",
    "####",
    "#### a\n",
    "<think>",
    "\n",
    "$",
    "\\frac{",
    "^9",
    "1/2 ",
    "answer is: 7 ",
)
GOLDS = ("72", "(x+1)^2", "\\frac{\\pi}{4}", "\\{1, 2\\}", "Paris")


def long_text(rng: random.Random) -> str:
    """A long text of one or two pieces, alone or within a mark."""
    body = "".join(rng.sample(PIECES, rng.randint(1, 2))) * rng.choice((100, 3000, 100_000))
    return rng.choice(("{}", "\\boxed{{1{}2}}", "The answer is 1{}2.", "<answer>{}</answer>")).format(body[:1_000_000])


def expression(rng: random.Random, touch: str) -> str:
    """A boxed expression that is slow to compare, or that would run code if it were evaluated as Python."""
    a, b = rng.randint(50, 99), rng.randint(10, 50)
    matrix = "\\\\".join("&".join(f"x^{{{i * j}}}" for i in range(6)) for j in range(6))
    forms = (
        f"(a+b+c+d+e)^{{{a}}}",
        f"(x+{a})^{{{b}}}(y-{b})^{{{b}}}(z+1)^{{{b}}}",
        f"\\frac{{(x+1)^{{{a}}}}}{{(x-1)^{{{b}}}}}-\\frac{{(y+1)^{{{b}}}}}{{(y-1)^{{{a}}}}}",
        "\\frac{1}{1+" * 8 + "x" + "}" * 8,
        f"\\int_0^{{{a}}} \\sin(x^{{{b}}}) \\cos(x^{{{a}}}) dx",
        f"{a}! + {b}! - {a - 1}! \\cdot x",
        "\\sqrt{" * 8 + f"x+{a}" + "}" * 8,
        f"\\begin{{pmatrix}}{matrix}\\end{{pmatrix}}",
        f"\\sum_{{i=1}}^{{{a}}} i^{{{b}}} x^i",
        f"__import__('os').system('touch {touch}')",
        f"\\text{{open('{touch}', 'w')}}",
    )
    return f"\\boxed{{{rng.choice(forms)}}}"


def measure(count: int, seed: int) -> dict[str, Any]:
    """Sends hostile completions through a pool and returns seconds of the process that trains and of the workers."""
    rng, taken = random.Random(seed), []
    folder = Path(tempfile.mkdtemp())
    touch = str(folder / "pwned")
    before, start = worker_seconds(), time.perf_counter()
    with VerifierPool([Part.of(math)]) as pool:
        pool.submit("first", "\\boxed{x^2+2x+1}", [], {"answer": "(x+1)^2"})  # imports, here and in the workers
        pool.collect()
        for number in range(count):
            text = long_text(rng) if number % 2 else expression(rng, touch)
            row = {"answer": rng.choice(GOLDS if number % 2 else GOLDS[1:4])}
            clock = time.thread_time()
            pool.submit(number, text, [], row)
            taken.append(1000 * (time.thread_time() - clock))
        verdicts = pool.collect().values()
        stuck = pool.failures["math"]
    return {
        "completions": count,
        "median_submit_ms": round(statistics.median(taken), 3),
        "slowest_submit_ms": round(max(taken), 1),
        "worker_cpu_seconds": round(worker_seconds() - before, 1),
        "bound_seconds": count * (CPU_SECONDS + 1),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "workers_ended": stuck,
        "paid": sum(verdict.score > 0 for verdict in verdicts),
        "code_ran": len(list(folder.iterdir())),
    }


def worker_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/hostile_completions.py {' '.join(sys.argv[1:])}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    result = measure(options.count, options.seed) | about
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
