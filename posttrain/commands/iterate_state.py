"""The folder of an outer loop: which stages of which rounds are done, and with which metrics."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.commands.iterate_plan import OUTPUTS, IterateRecipe, Plan
from posttrain.errors import UserError
from posttrain.output.run_folder import RunFolder, changed_settings, is_unused, write_recipe
from posttrain.reports.rounds import draw_rounds, rounds_table, stage_metrics
from posttrain.system.files import read_rows, write_rows, writing

CHANGEABLE = ("rounds", "table", "folder", "launch")
"""Settings that may change between a run and its resumption."""


class Done(NamedTuple):
    """A stage of a round that is done."""

    round: int
    stage: str
    metrics: dict[str, float]


def open_rounds(plan: Plan, *, resume: bool) -> list[Done]:
    """Makes the folder of a new outer loop, or reads which stages are done in an old one.

    Raises:
        UserError: if the folder is in use and ``resume`` is not set, if there is nothing to resume, or if settings
            have changed.
    """
    with writing(plan.recipe.root, "folder"):
        return _opened(plan, RunFolder(plan.recipe.root), resume)


def _opened(plan: Plan, folder: RunFolder, resume: bool) -> list[Done]:
    data = plan.document.data
    fixed = {name: value for name, value in data.items() if name not in CHANGEABLE}
    started = folder.recipe.is_file()
    if resume and not started:
        raise UserError(f"nothing to resume: {folder.path} holds no rounds; leave out `--resume` to start")
    if not resume and folder.path.is_dir() and not is_unused(folder.path):
        go_on = "`--resume` goes on with it, " if started else ""
        raise UserError(f"{folder.path} is not empty: {go_on}`--folder=...` puts this run elsewhere")
    if started and (changed := changed_settings(folder.recipe, fixed)):
        problem = "these settings have changed since it was started, and the rounds could not be compared"
        raise UserError(f"{folder.path}: {problem}:", *(f"  {line}" for line in changed))
    folder.path.mkdir(parents=True, exist_ok=True)
    for half_written in folder.path.glob(".*.writing"):
        half_written.unlink()
    write_recipe(folder, fixed)
    return read_rounds(folder.path)


def note_done(plan: Plan, number: int, name: str) -> Done:
    """Adds a finished stage to ``rounds.jsonl``."""
    stage, folder = plan.recipe.stages[name], plan.folder(number, name)
    done = Done(number, name, stage_metrics(stage.kind, folder))
    paths = {output: folder / path for output, path in OUTPUTS[stage.kind].items()}
    outputs = {output: str(path) for output, path in paths.items() if path.exists()}
    earlier = [line for line in _lines(plan.recipe.root) if (line["round"], line["stage"]) != done[:2]]
    write_rows(plan.recipe.root / "rounds.jsonl", [*earlier, {**done._asdict(), "outputs": outputs}])
    return done


def read_rounds(folder: Path) -> list[Done]:
    """Reads which stages are done in a folder, oldest first."""
    return [Done(line["round"], line["stage"], line["metrics"]) for line in _lines(folder)]


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return read_rows(path) if path.is_file() else []


def show_rounds(recipe: IterateRecipe, done: Iterable[Done]) -> None:
    """Prints the recipe's table, and draws it to ``rounds.png``."""
    rounds: dict[int, dict[str, dict[str, float]]] = {}
    for stage in done:
        rounds.setdefault(stage.round, {})[stage.stage] = stage.metrics
    rounds_table(recipe.table, rounds)
    if recipe.table:
        draw_rounds(recipe.table, rounds, recipe.root / "rounds.png")
    print(f"  {recipe.root}")
