"""The outer loop: recipes that feed each other, round after round: ``posttrain iterate recipes/iterate/ivo.yaml``.

A stage is a recipe file and what is laid over it. Stages run in the order in which they are written, ``rounds`` times::

    rounds: 3
    stages:
      values:
        train: ../value/ivo.yaml
        later: {decoder: {use: shaped, strength: 2.0, score: {use: value}}}     # from the second round on
        from: {decoder.score.model: values.value}                               # setting: stage.output
      held_out:
        decode: ../decode/ivo.yaml
        from: {decoder.score.model: values.value}
    table: {guided reward: held_out.score}

``from`` takes the newest output there is: of this round if the stage stands before, else of the round before; in the
first round there may be none, and then the setting stays as the recipe has it. ``from_all`` takes the list of all.

Training and labelling in round k take the recipe's seed + k - 1, so that no two rounds draw the same samples; other
stages keep their seed, so that rounds are compared on the same random numbers.

Everything lies in one folder, ``runs/<name>``: ``round-1/<stage>/``, and ``rounds.jsonl`` with a line for each stage
that is done, its outputs and its metrics.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from posttrain.commands.decode import run_decode
from posttrain.commands.evaluate import SUITES, run_suite
from posttrain.commands.label import LabelRecipe, run_labels
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.errors import RecipeError, UserError
from posttrain.option_types import PositiveCount
from posttrain.output.run_folder import RunFolder, changed_settings, write_recipe
from posttrain.recipe.documents import read_document
from posttrain.recipe.loading import load_as, placed
from posttrain.recipe.part import Checked
from posttrain.recipe.yaml_reader import Document, Location, Overrides, dotted, single, suggestion
from posttrain.reports.rounds import draw_rounds, rounds_table, stage_metrics
from posttrain.training.loop import train
from posttrain.training.recipe import Recipe, load_recipe

Kind = Literal["train", "decode", "label", "eval"]
KINDS: tuple[Kind, ...] = ("train", "decode", "label", "eval")
OUTPUTS: Mapping[Kind, Mapping[str, str]] = {
    "train": {"model": "model", "value": "value", "rollouts": "rollouts", "folder": ""},
    "decode": {"completions": "completions.jsonl"},
    "label": {"labels": "labels.jsonl"},
    "eval": {"report": ""},
}
"""What a stage leaves, and where in its folder."""
PLACES: Mapping[Kind, tuple[Location, str]] = {
    "train": (("run", "folder"), ""),
    "decode": (("output",), "completions.jsonl"),
    "label": (("output",), "labels.jsonl"),
}
"""The setting that says where a stage's output goes, and where that is in its folder."""
SUITE_FOLDERS: Mapping[str, Location] = {"value": ("report", "folder")}
"""The same of evaluation suites; of those that are not named it is ``folder``."""
DRAWS: frozenset[Kind] = frozenset({"train", "label"})
"""Kinds of stages that draw new samples to learn from in each round."""
FREE = ("rounds", "table", "folder", "launch")
"""What may change between a run and its resumption."""


@checked_dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), kw_only=True, frozen=True)
class Stage:
    """One recipe of a round, and what is laid over it as a recipe is laid over its base."""

    train: str | None = None
    decode: str | None = None
    label: str | None = None
    eval: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    """In every round."""
    later: dict[str, Any] = Field(default_factory=dict)
    """From the second round on."""
    newest: dict[str, str] = Field(default_factory=dict, alias="from")
    """Setting -> ``stage.output``: the newest there is; without one, as in a first round, the setting is left alone."""
    from_all: dict[str, str] = Field(default_factory=dict)
    """Setting -> ``stage.output``: a list of those of all rounds so far, oldest first."""

    @property
    def kind(self) -> Kind:
        """What is done with the recipe."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


@checked_dataclass(config=ConfigDict(extra="forbid"), kw_only=True, frozen=True)
class IterateRecipe(Checked):
    """Recipes that feed each other."""

    stages: dict[str, Stage]
    rounds: PositiveCount
    set: dict[str, Any] = field(default_factory=dict)  # laid over the recipes of all stages
    table: dict[str, str] = field(default_factory=dict)  # column -> stage.metric, shown by round
    folder: str | None = None  # default: runs/<name of this file>
    launch: str | None = None  # such as "accelerate launch --num_processes 8": stages as programs of their own

    name: str = "iterate"
    path: Path | None = None  # of the YAML file

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        if not self.stages:
            yield ("stages",), "is empty: there is nothing to run"
        for name, stage in self.stages.items():
            at = ("stages", name)
            if not name.replace("_", "").replace("-", "").isalnum():
                yield at, "is the name of a folder too: letters, digits, _ and - alone"
            kinds = [kind for kind in KINDS if getattr(stage, kind) is not None]
            if len(kinds) != 1:
                said = f"has {' and '.join(kinds)}" if kinds else "has no recipe"
                yield at, f"{said}: give one of train, decode, label, eval"
        if any(sum(getattr(stage, kind) is not None for kind in KINDS) != 1 for stage in self.stages.values()):
            return
        for name, stage in self.stages.items():
            for key, taken in (("from", stage.newest), ("from_all", stage.from_all)):
                for setting, source in taken.items():
                    if problem := _no_output(self, source):
                        yield ("stages", name, key, setting), problem
        for column, source in self.table.items():
            stage, _, metric = source.partition(".")
            if stage not in self.stages or not metric:
                yield ("table", column), f"should be stage.metric, not {source!r}; {suggestion(stage, self.stages)}"

    @property
    def root(self) -> Path:
        """Where everything goes."""
        return Path(self.folder or Path("runs") / self.name).resolve()


def _no_output(recipe: IterateRecipe, source: str) -> str:
    """What is wrong with the name of an output; empty where nothing is."""
    name, _, output = source.partition(".")
    if name not in recipe.stages:
        return f"{source!r} should be stage.output, and there is no stage {name!r}; {suggestion(name, recipe.stages)}"
    known = OUTPUTS[recipe.stages[name].kind]
    if output not in known:
        return f"{source!r}: a stage that {recipe.stages[name].kind}s has no {output!r}; {suggestion(output, known)}"
    return ""


class Done(NamedTuple):
    """A stage of a round that is over."""

    round: int
    stage: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """A recipe of stages with its document, which knows where each setting was written."""

    recipe: IterateRecipe
    document: Document

    def folder(self, number: int, name: str) -> Path:
        """Of a stage in a round."""
        return self.recipe.root / f"round-{number}" / name

    def file(self, name: str) -> Path:
        """The recipe of a stage, which is named relative to the file that names it.

        Raises:
            RecipeError: where there is none.
        """
        stage = self.recipe.stages[name]
        location: Location = ("stages", name, stage.kind)
        said = Path(getattr(stage, stage.kind)).expanduser()
        beside = self.recipe.path.parent if self.recipe.path else Path.cwd()
        found = next((folder / said for folder in (beside, Path.cwd()) if (folder / said).is_file()), None)
        if found is None:
            near = [path.name for path in (beside / said).parent.glob("*.y*ml")]
            guess = suggestion(said.name, near)
            problem = f"there is no file {str(said)!r}" + (f"; {guess}" if guess.startswith("did") else "")
            raise RecipeError(self.document.problem(location, problem))
        return found

    def settings(self, number: int, name: str) -> list[Document]:
        """What is laid over a stage's recipe in a round, the strongest last."""
        stage, at = self.recipe.stages[name], ("stages", name)
        laid = [self.document.inside(("set",)), self.document.inside((*at, "set"))]
        laid += [self.document.inside((*at, "later"))] if number > 1 else []
        for key, taken in (("from", stage.newest), ("from_all", stage.from_all)):
            for setting, source in taken.items():
                found = [str(path) for path in self.outputs(number, name, source)]
                if found:
                    place = self.document.place((*at, key, setting))
                    laid.append(single(tuple(setting.split(".")), found[-1] if key == "from" else found, place))
        return laid + self._own_settings(number, name, laid)

    def _own_settings(self, number: int, name: str, laid: Overrides) -> list[Document]:
        """Where the stage's output goes, and the seed of the round."""
        stage = self.recipe.stages[name]
        place = self.document.place(("stages", name))
        data = read_document(self.file(name), laid).data
        if stage.kind == "eval":
            where, output = SUITE_FOLDERS.get(str(data.get("suite")), ("folder",)), ""
        else:
            where, output = PLACES[stage.kind]
        own = [single(where, str(self.folder(number, name) / output), place)]
        seed = data.get("seed", 0)
        if stage.kind in DRAWS and number > 1 and isinstance(seed, int):
            own.append(single(("seed",), seed + number - 1, place))
        return own

    def outputs(self, number: int, name: str, source: str) -> list[Path]:
        """An output in all rounds that have it when a stage of a round begins, oldest first."""
        maker, _, output = source.partition(".")
        order = list(self.recipe.stages)
        last = number if order.index(maker) < order.index(name) else number - 1
        where = OUTPUTS[self.recipe.stages[maker].kind][output]
        return [self.folder(each, maker) / where for each in range(1, last + 1)]


def run_iterate(path: str | Path, overrides: Overrides = (), *, resume: bool = False) -> Path:
    """Runs all stages of all rounds; those that are done already are not run again.

    Args:
        resume: go on with what is in the folder: the stage that was under way resumes by its own checkpoints.

    Returns:
        The folder.

    Raises:
        UserError: for what a person can mend; what is wrong with the recipe of any stage shows before anything runs.
    """
    path = Path(path)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "posttrain iterate is one process, which starts the processes of each stage: leave the launcher out, and "
            "name it in `--launch='accelerate launch --num_processes 8'`"
        )
    plan = Plan(load_as(IterateRecipe, path, overrides), read_document(path, overrides))
    check_stages(plan)
    done = open_rounds(plan, resume=resume)
    for number in range(1, plan.recipe.rounds + 1):
        for name in plan.recipe.stages:
            if any((number, name) == each[:2] for each in done):
                continue
            print(f"\n== round {number} of {plan.recipe.rounds}, {name}: {plan.file(name).name}", flush=True)
            run_stage(plan, number, name)
            done.append(note_done(plan, number, name))
    show_rounds(plan.recipe, done)
    return plan.recipe.root


def check_stages(plan: Plan) -> None:
    """Reads every stage's recipe as it is in the first round and in a later one.

    Raises:
        RecipeError: for all that is wrong with any of them.
    """
    problems: list[str] = []
    made: dict[str, Any] = {}
    for number in range(1, min(plan.recipe.rounds, 2) + 1):
        for name, stage in plan.recipe.stages.items():
            try:
                file, settings = plan.file(name), plan.settings(number, name)
                if stage.kind == "eval":
                    _check_suite(file, settings)
                else:
                    kinds = {"train": Recipe, "decode": DecodeRecipe, "label": LabelRecipe}
                    made[name] = load_as(kinds[stage.kind], file, settings)
            except RecipeError as error:
                problems += error.problems
    problems += _missing_outputs(plan, made)
    if problems:
        raise RecipeError(dict.fromkeys(problems))


def _check_suite(file: Path, settings: Overrides) -> None:
    document = read_document(file, settings)
    if (suite := document.data.get("suite")) not in SUITES:
        raise RecipeError(document.problem(("suite",), f"{suite!r} is no suite; {suggestion(suite, SUITES)}"))


def _missing_outputs(plan: Plan, made: Mapping[str, Any]) -> Iterator[str]:
    """Outputs that a stage is asked for and that its recipe does not make."""
    for name, stage in plan.recipe.stages.items():
        for key, taken in (("from", stage.newest), ("from_all", stage.from_all)):
            for setting, source in taken.items():
                maker, _, output = source.partition(".")
                recipe = made.get(maker)
                if not isinstance(recipe, Recipe):
                    continue
                if (output == "model" and not recipe.loss) or (output == "value" and not recipe.value_loss):
                    what = "policy" if output == "model" else "value model"
                    problem = f"{plan.file(maker).name} trains no {what}"
                    yield plan.document.problem(("stages", name, key, setting), problem)


def open_rounds(plan: Plan, *, resume: bool) -> list[Done]:
    """Makes the folder, or reads what is done in it.

    Raises:
        UserError: for a folder that is in use, where there is nothing to resume, or for one that other settings made.
    """
    folder, data = RunFolder(plan.recipe.root), plan.document.data
    fixed = {name: value for name, value in data.items() if name not in FREE}
    started = folder.recipe.is_file()
    if resume and not started:
        raise UserError(f"nothing to resume: {folder.path} holds no rounds; leave out `--resume` to start")
    if not resume and folder.path.is_dir() and any(folder.path.iterdir()):
        go_on = "`--resume` goes on with it, " if started else ""
        raise UserError(f"{folder.path} is not empty: {go_on}`--folder=...` puts this run elsewhere")
    if started and (changed := changed_settings(folder, fixed)):
        what = "these settings are not those that it was started with, and rounds would not be comparable"
        raise UserError(f"{folder.path}: {what}:", *(f"  {line}" for line in changed))
    folder.path.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, fixed)
    return read_rounds(folder.path)


def run_stage(plan: Plan, number: int, name: str) -> None:
    """One stage of a round, from where it stopped if it had begun.

    Raises:
        UserError: with the place of what is wrong.
    """
    kind, file = plan.recipe.stages[name].kind, plan.file(name)
    settings, folder = plan.settings(number, name), plan.folder(number, name)
    begun = kind == "train" and RunFolder(folder).recipe.is_file()
    if not begun:  # a kill may have left a run folder without a recipe, which cannot be resumed
        shutil.rmtree(folder, ignore_errors=True)
    if plan.recipe.launch is not None:
        launched(plan.recipe.launch, kind, file, [*as_arguments(settings), *["--resume"] * begun])
    elif kind == "train":
        recipe = load_recipe(file, settings)
        try:
            train(recipe, resume=begun)
        except UserError as error:
            raise placed(error, file, settings) from error
    else:
        {"decode": run_decode, "label": run_labels, "eval": run_suite}[kind](file, settings)


def launched(launch: str, kind: Kind, file: Path, arguments: Sequence[str]) -> None:
    """A stage as a program of its own, on the processes that a launcher starts.

    Raises:
        UserError: if it fails; what it says of that is on the screen already.
    """
    command = [*shlex.split(launch), "-m", "posttrain", kind, str(file), *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"{shlex.join(command)}: ended with exit code {code}; `--resume` goes on with this stage")


def as_arguments(settings: Sequence[Document]) -> list[str]:
    """What is laid over a recipe as ``--key.path=value``; a part as a whole, and relative paths as they are."""
    found: dict[str, Any] = {}
    for document in settings:
        found |= _leaves(document.data)
    return [f"--{key}={json.dumps(value)}" for key, value in found.items()]


def _leaves(value: Any, at: Location = ()) -> dict[str, Any]:
    whole = not isinstance(value, dict) or (at and not value) or (len(at) == 1 and "use" in value)
    if whole:
        return {dotted(at): value}
    return {key: leaf for name, child in value.items() for key, leaf in _leaves(child, (*at, name)).items()}


def note_done(plan: Plan, number: int, name: str) -> Done:
    """Adds a finished stage to ``rounds.jsonl``."""
    stage, folder = plan.recipe.stages[name], plan.folder(number, name)
    done = Done(number, name, stage_metrics(stage.kind, folder))
    outputs = {output: folder / where for output, where in OUTPUTS[stage.kind].items()}
    there = {output: str(path) for output, path in outputs.items() if path.exists()}
    kept = [line for line in _lines(plan.recipe.root) if (line["round"], line["stage"]) != done[:2]]
    write_lines(plan.recipe.root / "rounds.jsonl", [*kept, {**done._asdict(), "outputs": there}])
    return done


def read_rounds(folder: Path) -> list[Done]:
    """The stages that are done in a folder, oldest first."""
    return [Done(line["round"], line["stage"], line["metrics"]) for line in _lines(folder)]


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines in one atomic replacement: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def show_rounds(recipe: IterateRecipe, done: Iterable[Done]) -> None:
    """The table of the recipe on the screen, and as ``rounds.png``."""
    rows: dict[int, dict[str, dict[str, float]]] = {}
    for each in done:
        rows.setdefault(each.round, {})[each.stage] = each.metrics
    rounds_table(recipe.table, rows)
    if recipe.table:
        draw_rounds(recipe.table, rows, recipe.root / "rounds.png")
    print(f"  {recipe.root}")
