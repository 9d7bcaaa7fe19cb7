"""The plan of an outer loop: its stages, and the settings that each stage's recipe gets in each round."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from posttrain.commands.evaluate import suite_name
from posttrain.commands.label import LabelRecipe
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.errors import RecipeError
from posttrain.option_types import OutputPath, PositiveCount
from posttrain.recipe.documents import read_document
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Checked
from posttrain.recipe.yaml_reader import Document, Location, Overrides, single, suggestion
from posttrain.system.places import expanded, is_there
from posttrain.training.recipe import Recipe

Kind = Literal["train", "decode", "label", "eval"]
KINDS: tuple[Kind, ...] = ("train", "decode", "label", "eval")
OUTPUTS: Mapping[Kind, Mapping[str, str]] = {
    "train": {"model": "model", "value": "value", "rollouts": "rollouts", "folder": ""},
    "decode": {"completions": "completions.jsonl"},
    "label": {"labels": "labels.jsonl"},
    "eval": {"report": ""},
}
"""Outputs of each kind of stage, with their paths in the stage's folder."""
PLACES: Mapping[Kind, tuple[Location, str]] = {
    "train": (("run", "folder"), ""),
    "decode": (("output",), "completions.jsonl"),
    "label": (("output",), "labels.jsonl"),
}
"""Setting of a stage's recipe that says where its output goes, with the output's path in the stage's folder."""
SUITE_FOLDERS: Mapping[str, Location] = {"value": ("report", "folder"), "decode": ("report", "folder")}
"""Setting of an evaluation suite that says where its report goes; ``folder`` for suites that are not listed."""
DRAWS: frozenset[Kind] = frozenset({"train", "label"})
"""Kinds of stages that draw new samples to learn from in each round."""


@checked_dataclass(
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False), kw_only=True, frozen=True
)
class Stage:
    """One recipe of a round, and settings that override it as a recipe overrides its base."""

    train: str | None = None
    """Training recipe that the stage runs."""
    decode: str | None = None
    """Decoding recipe that the stage runs."""
    label: str | None = None
    """Recipe of step labels that the stage runs."""
    eval: str | None = None
    """Evaluation suite that the stage runs."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that override the stage's recipe in every round."""
    later: dict[str, Any] = Field(default_factory=dict)
    """Settings that override the stage's recipe from the second round on."""
    newest: dict[str, str] = Field(default_factory=dict, alias="from")
    """Setting -> ``stage.output``: the setting gets the newest such output. It stays as it is if there is none yet, as
    in the first round."""
    from_all: dict[str, str] = Field(default_factory=dict)
    """Setting -> ``stage.output``: the setting gets the list of these outputs of all rounds so far, oldest first."""

    @property
    def kind(self) -> Kind:
        """The command that runs the stage's recipe."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def sources(self) -> Iterator[tuple[str, str, str]]:
        """Yields the settings that get outputs: the key (``from`` or ``from_all``), the setting, ``stage.output``."""
        for key, settings in (("from", self.newest), ("from_all", self.from_all)):
            yield from ((key, setting, source) for setting, source in settings.items())


@checked_dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), kw_only=True, frozen=True)
class IterateRecipe(Checked):
    """Recipes that feed each other."""

    stages: dict[str, Stage]
    rounds: PositiveCount
    """Number of rounds."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that override the recipes of all stages."""
    table: dict[str, str] = field(default_factory=dict)
    """Columns of the table that is shown after each round: name -> ``stage.metric``."""
    folder: OutputPath | None = None
    """Folder of the rounds. Default: ``runs/<name of this file>``."""
    launch: str | None = None
    """Launcher that starts each stage, such as ``accelerate launch --num_processes 8``."""

    name: str = "iterate"
    path: Path | None = None  # path of the YAML file

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Yields settings that contradict each other, with their places."""
        if not self.stages:
            yield ("stages",), "is empty: there is nothing to run"
        for name, stage in self.stages.items():
            at = ("stages", name)
            if not name.replace("_", "").replace("-", "").isalnum():
                yield at, "names a folder too: use letters, digits, _ and - only"
            kinds = [kind for kind in KINDS if getattr(stage, kind) is not None]
            if len(kinds) != 1:
                problem = f"has {' and '.join(kinds)}" if kinds else "has no recipe"
                yield at, f"{problem}: give one of train, decode, label, eval"
        if any(sum(getattr(stage, kind) is not None for kind in KINDS) != 1 for stage in self.stages.values()):
            return
        for name, stage in self.stages.items():
            for key, setting, source in stage.sources():
                if problem := self._source_problem(source):
                    yield ("stages", name, key, setting), problem
        for column, source in self.table.items():
            stage, _, metric = source.partition(".")
            if stage not in self.stages or not metric:
                yield ("table", column), f"should be stage.metric, not {source!r}; {suggestion(stage, self.stages)}"

    def _source_problem(self, source: str) -> str:
        """Says what is wrong with a name ``stage.output``; empty if nothing is."""
        name, _, output = source.partition(".")
        if name not in self.stages:
            return f"{source!r} should be stage.output, and there is no stage {name!r}; {suggestion(name, self.stages)}"
        kind = self.stages[name].kind
        if output not in OUTPUTS[kind]:
            return f"{source!r}: a stage that {kind}s has no {output!r}; {suggestion(output, OUTPUTS[kind])}"
        return ""

    @property
    def root(self) -> Path:
        """The folder of all rounds."""
        return Path(os.path.abspath(self.folder or Path("runs") / self.name))


@dataclass(frozen=True)
class Plan:
    """A recipe of stages with its document, which knows where each setting was written."""

    recipe: IterateRecipe
    document: Document

    @classmethod
    def read(cls, path: Path, overrides: Overrides = ()) -> Plan:
        """Reads the plan from a YAML file.

        Raises:
            RecipeError: one line for each problem, with its place and a suggestion.
        """
        return cls(load_as(IterateRecipe, path, overrides), read_document(path, overrides))

    def folder(self, number: int, name: str) -> Path:
        """The output folder of a stage in the round of that number, counted from 1."""
        return self.recipe.root / f"round-{number}" / name

    def file(self, name: str) -> Path:
        """The recipe file of a stage. It is named relative to this recipe's file, or else to the current folder.

        Raises:
            RecipeError: if there is no such file.
        """
        stage = self.recipe.stages[name]
        location: Location = ("stages", name, stage.kind)
        named = expanded(getattr(stage, stage.kind))
        beside = self.recipe.path.parent if self.recipe.path else Path.cwd()
        candidates = [folder / named for folder in (beside, Path.cwd())]
        file = next((path for path in candidates if is_there(path) and path.is_file()), None)
        if file is None:
            folder = (beside / named).parent
            similar = [path.name for path in folder.glob("*.y*ml")] if is_there(folder) else []
            guess = suggestion(named.name, similar)
            problem = f"there is no file {str(named)!r}" + (f"; {guess}" if guess.startswith("did") else "")
            raise RecipeError(self.document.problem(location, problem))
        return file

    def settings(self, number: int, name: str) -> list[Document]:
        """Settings that override a stage's recipe in a round; later ones override earlier ones."""
        stage, at = self.recipe.stages[name], ("stages", name)
        layers = [self.document.inside(("set",)), self.document.inside((*at, "set"))]
        layers += [self.document.inside((*at, "later"))] if number > 1 else []
        for key, setting, source in stage.sources():
            outputs = [str(path) for path in self.outputs(number, name, source)]
            if outputs:
                place = self.document.place((*at, key, setting))
                layers.append(single(tuple(setting.split(".")), outputs[-1] if key == "from" else outputs, place))
        return layers + self._output_and_seed(number, name, layers)

    def _output_and_seed(self, number: int, name: str, layers: Overrides) -> list[Document]:
        """Settings that say where the stage's output goes, and the seed of the round."""
        stage = self.recipe.stages[name]
        place = self.document.place(("stages", name))
        data = read_document(self.file(name), layers).data
        if stage.kind == "eval":
            setting, output = SUITE_FOLDERS.get(str(data.get("suite")), ("folder",)), ""
        else:
            setting, output = PLACES[stage.kind]
        settings = [single(setting, str(self.folder(number, name) / output), place)]
        seed = data.get("seed", 0)
        if stage.kind in DRAWS and number > 1 and isinstance(seed, int):
            settings.append(single(("seed",), seed + number - 1, place))
        return settings

    def outputs(self, number: int, name: str, source: str) -> list[Path]:
        """Paths of ``stage.output`` in all rounds that have it when stage ``name`` of a round begins, oldest first."""
        maker, _, output = source.partition(".")
        order = list(self.recipe.stages)
        last = number if order.index(maker) < order.index(name) else number - 1
        path = OUTPUTS[self.recipe.stages[maker].kind][output]
        return [self.folder(round_number, maker) / path for round_number in range(1, last + 1)]


def check_stages(plan: Plan) -> None:
    """Reads every stage's recipe as it is in the first round and in a later one.

    Raises:
        RecipeError: one line for each problem in any of them.
    """
    problems: list[str] = []
    recipes: dict[str, Any] = {}
    for number in range(1, min(plan.recipe.rounds, 2) + 1):
        for name, stage in plan.recipe.stages.items():
            try:
                file, settings = plan.file(name), plan.settings(number, name)
                if stage.kind == "eval":
                    suite_name(read_document(file, settings))
                else:
                    kinds = {"train": Recipe, "decode": DecodeRecipe, "label": LabelRecipe}
                    recipes[name] = load_as(kinds[stage.kind], file, settings)
            except RecipeError as error:
                problems += error.problems
    problems += _missing_outputs(plan, recipes)
    if problems:
        raise RecipeError(dict.fromkeys(problems))


def _missing_outputs(plan: Plan, recipes: Mapping[str, Any]) -> Iterator[str]:
    """Yields a problem for each output that a setting asks for and the stage's recipe does not make."""
    for name, stage in plan.recipe.stages.items():
        for key, setting, source in stage.sources():
            maker, _, output = source.partition(".")
            recipe = recipes.get(maker)
            if not isinstance(recipe, Recipe):
                continue
            if (output == "model" and not recipe.loss) or (output == "value" and not recipe.value_loss):
                trained = "policy" if output == "model" else "value model"
                problem = f"{plan.file(maker).name} trains no {trained}"
                yield plan.document.problem(("stages", name, key, setting), problem)
