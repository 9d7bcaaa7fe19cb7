"""The policy and the value model of ``guided.py``: sums of several steps, some of which are guessed.

``7-2+3=?`` is worked out line by line, ``7-2=5`` and ``5+3#8``, and then boxed. Demonstrations guess one line in five,
which can be seen (``5+3~7``): three guesses in four are wrong by one, and the lines after them go on from there. So a
completion goes wrong in single lines, and a judge can tell the lines that it should rather not build on. Log-probs
cannot: lines that are worked out are written in ten ways, so that each is about as probable as a wrong guess.

The value model is made by ``recipes/value/cd_fudge.yaml``: it starts as the policy and learns, at every token, whether
the policy's completion was right.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain_problems import Chain, boxed

from posttrain import load_recipe, train
from posttrain.models.policy import Policy
from posttrain.quickstart.imitation import Example, fit
from posttrain.quickstart.model import END, make_model, make_tokenizer
from posttrain.quickstart.start import prompt_ids
from posttrain.recipe.sections import OptimizerSection

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "value" / "cd_fudge.yaml"


LARGEST = 9
"""Numbers lie between 0 and 9."""
SHORTEST, LONGEST = 3, 5
SIGNS, GUESS = "=:>|;#@&%^", "~"
"""How lines are written that are worked out, and that are guessed."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How much of everything."""

    demonstrations: int = 19200
    policy_steps: int = 600
    guessed: float = 0.2  # of the lines of a demonstration
    wrong: float = 0.75  # of the guesses
    problems: int = 6000  # that the value model learns on, each about three times
    value_steps: int = 300
    prompts_per_step: int = 64
    held_out: int = 1024
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
    examples = [demonstration(tokenizer, chain, worked_out(chain, training, rng)) for chain in problems]
    optimizer = OptimizerSection(learning_rate=3e-3, betas=(0.9, 0.98), schedule="cosine", warmup_steps=30)
    fit(Policy(model), examples, steps=training.policy_steps, batch_size=32, optimizer=optimizer, seed=training.seed)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")


def draw(count: int, rng: random.Random) -> list[Chain]:
    """Different problems."""
    found: dict[Chain, None] = {}
    while len(found) < count:
        start = total = rng.randint(0, LARGEST)
        changes = []
        for _ in range(rng.randint(SHORTEST, LONGEST)):
            changes.append(rng.choice(possible(total)))
            total += changes[-1]
        found.setdefault(Chain(start, tuple(changes)))
    return list(found)


def possible(now: int) -> Sequence[int]:
    """Changes of a number that stay between 0 and 9."""
    return [change for change in range(-now, LARGEST - now + 1) if change]


def worked_out(chain: Chain, training: Training, rng: random.Random) -> str:
    """A line a change, worked out or guessed, and the boxed answer."""
    lines, now = [], chain.start
    for change in chain.changes:
        result = (now + change) % (LARGEST + 1)  # a wrong number may lead beyond the ends
        sign = rng.choice(SIGNS)
        if rng.random() < training.guessed:
            sign = GUESS
            if rng.random() < training.wrong:
                result = (result + rng.choice((-1, 1))) % (LARGEST + 1)
        lines.append(f"{now}{change:+d}{sign}{result}")
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
