"""Tests of METHODS.md: it has a row for each recipe, with the recipe's parts and paper."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slots
import yaml

from posttrain.commands.iterate_plan import IterateRecipe, Stage
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.recipe.loading import load_as
from posttrain.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
LINK = r"\[`(?P<link>[^`]+)`\]\((?P<path>[^)]+)\)"
ROW = re.compile(rf"\| (?P<name>[^|]+) \| {LINK} \| (?P<parts>[^|]+) \| (?P<paper>[^|]+) \|")
FAMILIES = ("rl", "value", "preference", "decode", "iterate")
RECIPES = sorted(
    path.relative_to(ROOT).as_posix() for family in FAMILIES for path in (ROOT / "recipes" / family).glob("*.yaml")
)


def rows() -> dict[str, re.Match[str]]:
    return {match["path"]: match for match in ROW.finditer((ROOT / "METHODS.md").read_text(encoding="utf-8"))}


def runs(path: Path) -> str:
    """The content of a recipe: its parts, its decoder, or the recipes of a round."""
    if path.parent.name == "decode":
        return f"`{load_as(DecodeRecipe, path).decoder}`"
    if path.parent.name == "iterate":
        return " → ".join(map(stage_of, load_as(IterateRecipe, path).stages.values()))
    return described(load_recipe(path))


def stage_of(stage: Stage) -> str:
    """The recipe of a stage, and the parts that the stage lays over it."""
    laid = {name: part for name, part in (stage.set | stage.later).items() if isinstance(part, dict) and "use" in part}
    parts = [
        f"{name}: {part['use']}" + (f"({part['score']['use']})" if "score" in part else "")
        for name, part in laid.items()
    ]
    file = Path(getattr(stage, stage.kind)).name
    return f"`{stage.kind} {file}`" + (f" with `{', '.join(parts)}`" if parts else "")


def described(recipe: Recipe) -> str:
    """The parts of a recipe in the order of a step, without those that every recipe has by default."""
    parts = [recipe.examples] if recipe.examples is not None else []
    parts += [] if recipe.rollout.name == "single_turn" and not recipe.rollout.options else [recipe.rollout]
    parts += [
        *recipe.select,
        *recipe.reward,
        None if recipe.combine.fact("keeps_scores") else recipe.combine,
        recipe.compare,
        recipe.regroup,
        recipe.baseline,
        recipe.advantage,
        *recipe.shape,
        *recipe.keep,
    ]
    for term in recipe.loss:
        parts += [term, *term.weights]
    parts += [recipe.target]
    for term in recipe.value_loss:
        parts += [term, *term.weights]
    if recipe.normaliser.name != "token_mean" or recipe.loss:
        parts.append(recipe.normaliser)
    return " → ".join(f"`{part}`" for part in parts if part is not None)


def named(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Pairs of a slot (or an option) and a name that YAML writes there."""
    if isinstance(node, dict):
        if "use" in node:
            yield key, node["use"]
        for name, value in node.items():
            yield from named(value, str(name).rpartition(".")[2])
    elif isinstance(node, list):
        for value in node:
            yield from named(value, key)
    elif isinstance(node, str):
        yield key, node


def parts_without_recipe() -> dict[str, tuple[str, Any]]:
    """Parts of training and decoding that no recipe names and that are no default, each with its first slot."""
    page = slots.Page()
    places = [slots.Place(name, slots.MODULES[name], slot.takes) for name, slot in slots.SLOTS.items()]
    for name in slots.SLOTS:
        list(page.slot(name))
    while page.waiting:
        places.append(page.waiting.pop(0))
        list(page.option(places[-1]))
    names = {pair for path in (ROOT / "recipes").rglob("*.yaml") for pair in named(yaml.safe_load(path.read_text()))}
    parts = {(place, name): part for place in places for name, part in slots.shipped(place).items()}
    used = {part for (place, name), part in parts.items() if (place.name, name) in names}
    for part in parts.values():
        defaults = [parameter.default for parameter in inspect.signature(part).parameters.values()]
        used |= {other for other in parts.values() if any(other is default for default in defaults)}
    unnamed: dict[str, tuple[str, Any]] = {}
    for (place, name), part in parts.items():
        if part not in used and place.module.startswith(("posttrain.parts", "posttrain.decoding")):
            unnamed.setdefault(f"{place.module.rpartition('.')[2]}.{name}", (place.name, part))
    return unnamed


def test_every_recipe_has_a_row_and_every_row_a_recipe():
    assert sorted(rows()) == RECIPES


@pytest.mark.parametrize("path", RECIPES)
def test_the_row_says_what_the_recipe_runs(path):
    row = rows()[path]
    assert row["parts"] == runs(ROOT / path)
    identifier = re.search(r"https://(?:arxiv\.org/abs/|doi\.org/)?([^)]+)", row["paper"])
    assert identifier, "the paper's link"
    header = (ROOT / path).read_text(encoding="utf-8").split("\nbase:")[0]
    assert identifier[1] in header
    assert path.endswith(row["link"])


CITED = re.compile(r"(?:arXiv:|arxiv\.org/abs/)(\d\d)\d\d\.\d{4,5}")
YEAR = re.compile(r"(?<![\d.])(?:19|20)\d\d(?!\d|\.\d)")
SOURCES = [ROOT / "METHODS.md", ROOT / "README.md"]
for pattern in ("posttrain/**/*.py", "reward_models/*.py", "recipes/**/*.yaml", "eval/*.yaml"):
    SOURCES += sorted(ROOT.glob(pattern))


def test_years_are_those_of_the_first_version_on_arxiv():
    """The year before an id is the id's own."""
    wrong = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for cited in CITED.finditer(text):
            years = YEAR.findall(text[max(0, cited.start() - 170) : cited.start()])
            if years and years[-1] != f"20{cited[1]}":
                wrong.append(f"{path.relative_to(ROOT)}: {years[-1]} beside {cited[0]}")
    assert not wrong, wrong


def test_every_part_without_a_recipe_has_a_row():
    """The rows have the part, its slot, the first sentence of its docstring, and a source that the docstring names."""
    section = (ROOT / "METHODS.md").read_text(encoding="utf-8").partition("## Parts without a recipe of their own")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    parts, sentence = parts_without_recipe(), slots.sentence
    expected = {name: (slot, sentence(part).replace("|", "\\|")) for name, (slot, part) in parts.items()}
    assert {name: (slot, text) for name, slot, text, _ in rows} == expected
    for name, _, _, source in rows:
        link = re.search(r"https://(?:arxiv\.org/abs/|doi\.org/)?([^)]+)", source)
        docstring = inspect.getdoc(parts[name][1]) or ""
        assert link[1] in docstring if link else "arXiv" not in docstring, name
