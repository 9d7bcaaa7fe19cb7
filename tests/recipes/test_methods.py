"""METHODS.md says what the recipes are: a row each, with their parts, their paper and their test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
    """The parts of a recipe in the order of a step, those that every recipe has by default left out."""
    parts = [recipe.examples] if recipe.examples is not None else []
    parts += [] if recipe.rollout.name == "single_turn" and not recipe.rollout.options else [recipe.rollout]
    parts += [
        *recipe.select,
        *recipe.reward,
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


def test_every_recipe_has_a_row_and_every_row_a_recipe():
    assert sorted(rows()) == RECIPES


@pytest.mark.parametrize("path", RECIPES)
def test_the_row_says_what_the_recipe_runs(path):
    row = rows()[path]
    assert row["parts"] == runs(ROOT / path)
    identifier = re.search(r"arxiv\.org/abs/([0-9.]+)|doi\.org/([^)]+)", row["paper"])
    assert identifier, "the paper's link"
    header = (ROOT / path).read_text(encoding="utf-8").split("\nbase:")[0]
    assert (identifier[1] or identifier[2]) in header
    assert path.endswith(row["link"])
