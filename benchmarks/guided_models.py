"""The policy and the value model of ``guided.py``: chains of additions, and the probability of being right.

The policy learns from demonstrations that forget a carry now and then, and go on from the wrong number: it errs in
single lines, at places that repeat, and its wrong lines are hardly less probable than its right ones. (With slips to
any number whatsoever log-probs alone would give errors away, and greedy decoding would hardly make any.) The value
model is made by ``recipes/value/cd_fudge.yaml``: it starts as the policy and learns, at every token, whether the
policy's completion was right.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain_problems import Chain, boxed, draw

from posttrain import load_recipe, train
from posttrain.models import Policy
from posttrain.offline import Example, fit
from posttrain.options import Optimizer
from posttrain.quickstart.model import END, make_model, make_tokenizer
from posttrain.quickstart.start import prompt_ids

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "value" / "cd_fudge.yaml"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How much of everything."""

    demonstrations: int = 32000
    policy_steps: int = 1000
    forgotten: float = 0.4  # carries and borrows of demonstrations
    problems: int = 16000  # that the value model learns on: each is seen once or twice, none can be learned by heart
    value_steps: int = 300
    prompts_per_step: int = 64
    held_out: int = 512
    seed: int = 0


def prepare(folder: Path, training: Training, engine: str = "vllm") -> None:
    """Problems, policy and value model in a folder; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "policy").exists():
        make_policy(folder, training)
    if not (folder / "value_run" / "value").exists():
        make_value(folder, training, engine)


def make_policy(folder: Path, training: Training) -> None:
    """Problems as files, and a policy that learned from demonstrations of others."""
    rng = random.Random(training.seed)
    problems = draw(training.demonstrations + training.problems + training.held_out, rng)
    for name, count in (("train", training.problems), ("held_out", training.held_out)):
        rows = [{"prompt": chain.prompt, "answer": chain.answer} for chain in problems[:count]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        del problems[:count]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, training.seed)
    examples = [demonstration(tokenizer, chain, worked_out(chain, training.forgotten, rng)) for chain in problems]
    optimizer = Optimizer(learning_rate=3e-3, betas=(0.9, 0.98), schedule="cosine", warmup_steps=30)
    fit(Policy(model), examples, steps=training.policy_steps, batch_size=32, optimizer=optimizer, seed=training.seed)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")


def worked_out(chain: Chain, forgotten: float, rng: random.Random) -> str:
    """A line a change and the boxed answer; of each carry or borrow the tens are left as they were now and then."""
    lines, now = [], chain.start
    for change in chain.changes:
        result = now + change
        if result // 10 != now // 10 and rng.random() < forgotten:
            result = now // 10 * 10 + result % 10
        lines.append(f"{now:02d}{change:+d}={result:02d}")
        now = result
    return "\n".join([*lines, boxed(now)])


def demonstration(tokenizer: Any, chain: Chain, solution: str) -> Example:
    """A problem with a solution to imitate."""
    return Example(prompt_ids(tokenizer, chain.prompt), tokenizer.encode(solution + END))


def make_value(folder: Path, training: Training, engine: str) -> None:
    """The value model, by the recipe with sizes for a tiny model."""
    settings = {
        "policy": f"{{model: {folder}/policy}}",
        "data": f"{{path: {folder}/train.jsonl}}",
        "engine.use": engine,
        "value.head": "{type: bernoulli}",
        "value.optimizer": "{learning_rate: 1.0e-3, schedule: cosine, warmup_steps: 10}",
        "value_loss": "[{use: bce}]",
        "sampling": "{max_tokens: 64}",
        "steps": training.value_steps,
        "prompts_per_step": training.prompts_per_step,
        "completions": 4,
        "seed": training.seed,
        "run": f"{{folder: {folder}/value_run, save_every: 100000, rollouts_every: 0, trackers: []}}",
    }
    train(load_recipe(RECIPE, [f"--{name}={value}" for name, value in settings.items()]))
