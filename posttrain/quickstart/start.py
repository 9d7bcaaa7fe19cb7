"""The start of the quickstart: problems as JSONL files, and a model warmed up on mixed demonstrations."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.models.policy import Policy
from posttrain.output.progress import Column, Progress
from posttrain.quickstart.imitation import Example, fit
from posttrain.quickstart.model import END
from posttrain.quickstart.problems import Problem, demonstrations, draw
from posttrain.recipe.sections import OptimizerSection
from posttrain.system.files import write_rows

SHARE_WORKED_OUT = 0.5
HELD_OUT, TRAIN = 256, 2000
WARM_UP_STEPS, BATCH_SIZE = 800, 32
OPTIMIZER = OptimizerSection(learning_rate=3e-3, betas=(0.9, 0.98), schedule="cosine", warmup_steps=30)
COLUMNS = (Column("loss", "loss", "{:.3f}"), Column("grad_norm", "gradient norm", "{:.2f}"))


@dataclass(frozen=True)
class Start:
    """Paths of the files that training starts from. Making the object touches no file."""

    path: Path

    @property
    def demonstrations(self) -> Path:
        return self.path / "demonstrations.jsonl"

    @property
    def train(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def held_out(self) -> Path:
        return self.path / "held_out.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"


def write_problems(start: Start, seed: int, *, shown: int = WARM_UP_STEPS * BATCH_SIZE) -> None:
    """Writes demonstrations, problems to train on and held-out problems; no problem occurs twice.

    Args:
        start: paths of the files; the folder must exist.
        seed: seed of the problems.
        shown: number of demonstrations.
    """
    rng = random.Random(seed)
    problems = draw(HELD_OUT + TRAIN + shown, rng)
    held_out, train, to_show = problems[:HELD_OUT], problems[HELD_OUT : HELD_OUT + TRAIN], problems[HELD_OUT + TRAIN :]
    shown_rows = [
        {**row(problem), "completion": completion}
        for problem, completion in demonstrations(to_show, SHARE_WORKED_OUT, rng)
    ]
    write_rows(start.demonstrations, shown_rows)
    write_rows(start.train, map(row, train))
    write_rows(start.held_out, map(row, held_out))


def row(problem: Problem) -> dict[str, str]:
    """Columns of a problem that recipes and verifiers read."""
    return {"prompt": problem.prompt, "answer": problem.answer}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of the prompt as a user's message, up to the beginning of the assistant's turn."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(str(text), add_special_tokens=False)


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, str]],
    *,
    seed: int,
    steps: int = WARM_UP_STEPS,
) -> None:
    """Trains the model in place on the demonstrations, with a progress display."""
    examples = [
        Example(prompt_ids(tokenizer, row["prompt"]), tokenizer.encode(row["completion"] + END)) for row in rows
    ]
    with Progress(steps, columns=COLUMNS) as progress:
        fit(
            Policy(model),
            examples,
            steps=steps,
            batch_size=BATCH_SIZE,
            optimizer=OPTIMIZER,
            seed=seed,
            on_step=progress.update,
        )
