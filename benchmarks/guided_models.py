"""The policy and the value model of ``guided.py``: sums of several steps, some of which are guessed.

``7-2+3=?`` is worked out line by line, ``7-2=5`` and ``5+3#8``, and then boxed. Demonstrations guess one line in five,
and the sign ``~`` shows it (``5+3~7``). Three guesses in four are wrong by one, and the following lines go on from the
wrong number. So a completion goes wrong in single lines, and a value model can recognise the lines that should not be
continued. Log-probs cannot: a line that is worked out is written with one of ten signs, so that each version is about
as probable as a wrong guess.

``recipes/value/cd_fudge.yaml`` trains the value model: it starts as the policy and learns, at every token, whether the
policy's completion was right.
"""

from __future__ import annotations

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
from posttrain.system.files import write_rows

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "value" / "cd_fudge.yaml"
LARGEST = 9
"""Largest number in a problem; the smallest is 0."""
SHORTEST, LONGEST = 3, 5
SIGNS, GUESS = "=:>|;#@&%^", "~"
"""Signs of a line that is worked out, one of which is drawn, and the sign of a guessed line."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Sizes of the benchmark: problems, demonstrations and training steps."""

    demonstrations: int = 19200
    policy_steps: int = 600
    guessed: float = 0.2  # share of the lines of a demonstration that are guessed
    wrong: float = 0.75  # share of the guesses that are wrong
    problems: int = 6000  # problems that the value model learns on, each about three times
    value_steps: int = 300
    prompts_per_step: int = 64
    held_out: int = 1024
    seed: int = 0


def prepare(folder: Path, training: Training, engine: str = "vllm") -> None:
    """Makes problems, policy and value model in a folder. Existing ones are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "policy").exists():
        make_policy(folder, training)
    if not (folder / "value_run" / "value").exists():
        make_value(folder, training, engine)


def make_policy(folder: Path, training: Training) -> None:
    """Writes files of problems, and trains a policy on demonstrations of other problems."""
    rng = random.Random(training.seed)
    problems = draw(training.demonstrations + training.problems + training.held_out, rng)
    for name, count in (("train", training.problems), ("held_out", training.held_out)):
        rows = [{"prompt": chain.prompt, "answer": chain.answer} for chain in problems[:count]]
        write_rows(folder / f"{name}.jsonl", rows)
        del problems[:count]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, training.seed)
    examples = [demonstration(tokenizer, chain, worked_out(chain, training, rng)) for chain in problems]
    optimizer = OptimizerSection(learning_rate=3e-3, betas=(0.9, 0.98), schedule="cosine", warmup_steps=30)
    fit(Policy(model), examples, steps=training.policy_steps, batch_size=32, optimizer=optimizer, seed=training.seed)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")


def draw(count: int, rng: random.Random) -> list[Chain]:
    """Draws problems, all of them different."""
    chains: dict[Chain, None] = {}
    while len(chains) < count:
        start = total = rng.randint(0, LARGEST)
        changes = []
        for _ in range(rng.randint(SHORTEST, LONGEST)):
            changes.append(rng.choice(possible(total)))
            total += changes[-1]
        chains.setdefault(Chain(start, tuple(changes)))
    return list(chains)


def possible(now: int) -> Sequence[int]:
    """Changes that keep a number between 0 and 9."""
    return [change for change in range(-now, LARGEST - now + 1) if change]


def worked_out(chain: Chain, training: Training, rng: random.Random) -> str:
    """A solution with one line for each change, worked out or guessed, and the boxed answer."""
    lines, now = [], chain.start
    for change in chain.changes:
        result = (now + change) % (LARGEST + 1)  # after a wrong number the sum may leave the range
        sign = rng.choice(SIGNS)
        if rng.random() < training.guessed:
            sign = GUESS
            if rng.random() < training.wrong:
                result = (result + rng.choice((-1, 1))) % (LARGEST + 1)
        lines.append(f"{now}{change:+d}{sign}{result}")
        now = result
    return "\n".join([*lines, boxed(now)])


def demonstration(tokenizer: Any, chain: Chain, solution: str) -> Example:
    """A problem and its solution as an example to imitate."""
    return Example(prompt_ids(tokenizer, chain.prompt), tokenizer.encode(solution + END))


def make_value(folder: Path, training: Training, engine: str) -> None:
    """Trains the value model by the recipe, with sizes for a tiny model."""
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
