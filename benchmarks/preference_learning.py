"""Results of DPO, KTO, IPO and online DPO from the same start: held-out preferences, and the true reward.

    python benchmarks/preference_learning.py --json benchmarks/results/preference_learning.json

The start is the quickstart's warmed-up model, which works out half of its additions and estimates the rest. The
verifier marks its samples as right or wrong; they become pairs (for DPO and IPO) and rated completions (for KTO).
Online DPO samples its own pairs. Each method is its recipe with a suitable model, data and sizes. Measured before and
after training, on problems that no method has seen:

- accuracy: share of held-out pairs whose right completion has the higher log-prob; margin: the difference in nats
- reward: share of right answers among samples at temperature 1
- kl: KL of the policy from the start in nats a completion, by the policy's own samples
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from online_step import machine
from transformers import AutoTokenizer

from posttrain import load_recipe
from posttrain.batch import pad
from posttrain.engines.base import Completion, Sampling
from posttrain.engines.transformers import TransformersEngine
from posttrain.micro_batches import length_groups
from posttrain.models.policy import Policy, build_policy
from posttrain.models.text import text_of
from posttrain.quickstart import story
from posttrain.quickstart.start import Start, prompt_ids
from posttrain.recipe.sections import PolicySection
from posttrain.system.files import read_rows, write_rows
from posttrain.training.loop import train
from posttrain.verify.mathematics import math as verify

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "preference"
SAMPLING = Sampling(max_tokens=48)
MICRO_BATCH_TOKENS = 16384


class Method(NamedTuple):
    """A recipe, the data that it learns from, and overrides."""

    recipe: str
    data: str
    overrides: tuple[str, ...]


OFFLINE = ("--data.max_prompt_tokens=null", "--prompts_per_step=32", "--optimizer.schedule=linear")
ONLINE = (
    "--data.name=null",
    "--data.columns={}",
    "--data.system=null",
    "--prompts_per_step=32",
    "--engine.use=transformers",
)
METHODS = {
    "DPO": Method("dpo", "pairs", OFFLINE),
    "IPO": Method("ipo", "pairs", OFFLINE),
    "KTO": Method("kto", "rated", OFFLINE),
    "online DPO": Method("online_dpo", "train", (*ONLINE, "--sampling.max_tokens=48", "--completions=4")),
}


class Estimate(NamedTuple):
    """A mean with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean and standard error of independent values."""
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:7.3f} ± {self.error:.3f}"


class Sampled(NamedTuple):
    """Completions of a problem, each marked as right or wrong."""

    row: dict[str, str]
    prompt: list[int]
    completions: list[Completion]
    texts: list[str]
    right: list[bool]


def sample(model: Path, rows: Sequence[dict[str, str]], n: int, seed: int) -> list[Sampled]:
    """Samples ``n`` completions of each problem at temperature 1."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    engine = TransformersEngine(model, max_model_len=128, seed=seed)
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    groups = engine.generate(prompts, SAMPLING, n, seeds=[seed * 1_000_003 + i for i in range(len(rows))])
    engine.close()
    decode, sampled = text_of(tokenizer), []
    for row, prompt, group in zip(rows, prompts, groups, strict=True):
        texts = [decode(completion.tokens) for completion in group]
        sampled.append(Sampled(row, prompt, group, texts, [bool(verify(text, answer=row["answer"])) for text in texts]))
    return sampled


def pairs_of(sampled: Sequence[Sampled]) -> list[dict[str, Any]]:
    """Pairs of the first right and the first wrong completion of each problem that has both."""
    pairs = []
    for problem in sampled:
        if any(problem.right) and not all(problem.right):
            chosen, rejected = problem.texts[problem.right.index(True)], problem.texts[problem.right.index(False)]
            pairs.append({"prompt": problem.row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


@torch.no_grad()
def logp(model: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
    """Log-probs of whole completions."""
    lengths = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    logps = torch.zeros(len(lengths))
    for rows in length_groups(lengths, MICRO_BATCH_TOKENS):
        tokens = pad([[*prompts[row], *completions[row]] for row in rows], dtype=torch.long)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            mask[i, len(prompts[row]) : int(lengths[row])] = True
        logps[rows] = model(tokens, mask)[0].sum(-1)
    return logps.tolist()


def judge_pairs(model: Path, pairs: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """Share of pairs, and margin in nats, by which the policy prefers the right completion."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    policy = build_policy(PolicySection(model=str(model))).eval()
    prompts = [prompt_ids(tokenizer, pair["prompt"]) for pair in pairs]
    sides = []
    for side in ("chosen", "rejected"):
        ids = [[*tokenizer(pair[side])["input_ids"], tokenizer.eos_token_id] for pair in pairs]
        sides.append(logp(policy, prompts, ids))
    margins = [chosen - rejected for chosen, rejected in zip(*sides, strict=True)]
    return {"accuracy": Estimate.of([float(m > 0) for m in margins]), "margin": Estimate.of(margins)}


def measure(
    model: Path, start: Path, pairs: Sequence[dict[str, Any]], rows: Sequence[dict[str, str]], n: int, seed: int
) -> dict[str, Estimate]:
    """Measures a model on held-out pairs and problems; the samples of a problem are averaged to one value."""
    sampled = sample(model, rows, n, seed)
    reward = Estimate.of([statistics.fmean(problem.right) for problem in sampled])
    prompts = [problem.prompt for problem in sampled for _ in problem.completions]
    tokens = [completion.tokens for problem in sampled for completion in problem.completions]
    logps = [logp(build_policy(PolicySection(model=str(path))).eval(), prompts, tokens) for path in (model, start)]
    gaps = [now - before for now, before in zip(*logps, strict=True)]
    kl = Estimate.of([statistics.fmean(gaps[i : i + n]) for i in range(0, len(gaps), n)])
    return judge_pairs(model, pairs) | {"reward": reward, "kl": kl}


def prepare(start: Start, folder: Path, prompts: int, seed: int) -> dict[str, Path]:
    """Writes files of pairs, rated completions and problems to train on, and of held-out pairs; returns their paths."""
    sampled = sample(start.model, read_rows(start.train)[:prompts], 8, seed + 1)
    rated = [
        {"prompt": problem.row["prompt"], "completion": text, "label": right}
        for problem in sampled
        for text, right in list(zip(problem.texts, problem.right, strict=True))[:2]
    ]
    held_out = pairs_of(sample(start.model, read_rows(start.held_out), 8, seed + 2))
    files = {name: folder / f"{name}-{seed}.jsonl" for name in ("pairs", "rated", "held_out")}
    for name, rows in (("pairs", pairs_of(sampled)), ("rated", rated), ("held_out", held_out)):
        write_rows(files[name], rows)
    return files | {"train": start.train}


def run(method: Method, start: Start, data: Path, folder: Path, options: argparse.Namespace, seed: int) -> float:
    """Trains by a method; returns the seconds."""
    overrides = [
        f"--policy.model={start.model}",
        "--policy.dtype=float32",
        "--policy.gradient_checkpointing=false",
        f"--data.path={data}",
        "--evaluate=null",
        f"--optimizer.learning_rate={options.learning_rate}",
        "--optimizer.warmup_steps=3",
        f"--steps={options.steps}",
        f"--seed={seed}",
        f"--run.folder={folder}",
        "--run.trackers=[]",
        "--run.rollouts_every=0",
        *method.overrides,
    ]
    began = time.perf_counter()
    train(load_recipe(RECIPES / f"{method.recipe}.yaml", overrides))
    return time.perf_counter() - began


def one_seed(seed: int, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures every method from the start of one seed; measures the start too."""
    start = Start(work / f"start-{seed}")
    if not start.model.exists():
        story.prepare(start.path, seed)
    files = prepare(start, work, options.prompts, seed)
    pairs, rows = read_rows(files["held_out"]), read_rows(start.held_out)
    results: dict[str, Any] = {"start": measure(start.model, start.model, pairs, rows, options.samples, seed)}
    counts = {name: len(read_rows(path)) for name, path in files.items()}
    for name in options.methods:
        method, folder = METHODS[name], work / f"{name.replace(' ', '-')}-{seed}"
        seconds = run(method, start, files[method.data], folder, options, seed)
        after = measure(folder / "model", start.model, pairs, rows, options.samples, seed)
        results[name] = after | {"seconds": seconds}
    for name, figures in results.items():
        numbers = "  ".join(f"{key} {value}" for key, value in figures.items() if isinstance(value, Estimate))
        print(f"seed {seed}  {name:11} {numbers}  {figures.get('seconds', 0):.0f} s", flush=True)
    return results | {"rows": counts}


def learned(results: dict[str, Any], name: str) -> bool:
    """True if accuracy and reward both rose by more than twice the standard error of the difference."""
    before, after = results["start"], results[name]
    return all(
        after[key].mean - before[key].mean > 2 * math.hypot(after[key].error, before[key].error)
        for key in ("accuracy", "reward")
    )


def plain(value: Any) -> Any:
    """Turns named estimates into plain data for JSON."""
    if isinstance(value, Estimate):
        return value._asdict()
    return {key: plain(member) for key, member in value.items()} if isinstance(value, dict) else value


def main() -> int:
    """Runs the benchmark and writes the results; returns 1 if a method has not learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=800, help="problems on which the start is sampled")
    parser.add_argument("--samples", type=int, default=4, help="samples of each held-out problem")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--folder", type=Path, help="where starts and runs are kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.folder or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        seeds = {str(seed): one_seed(seed, work, options) for seed in options.seeds}
    missed = [
        f"{name}, seed {seed}"
        for seed, results in seeds.items()
        for name in options.methods
        if not learned(results, name)
    ]
    print("all have learned" if not missed else f"not beyond twice the standard error: {'; '.join(missed)}")
    if options.json:
        content = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "command": f"python benchmarks/preference_learning.py {' '.join(sys.argv[1:])}".strip(),
            "options": {key: value for key, value in vars(options).items() if key not in ("json", "folder")},
            "seeds": plain(seeds),
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
