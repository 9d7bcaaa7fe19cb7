"""The recipe files themselves: they are short, only those launched by hand carry a hint, and their bases agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from posttrain.recipe.part import SLOTS
from posttrain.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
METHODS = sorted(
    path
    for folder in ("rl", "value", "preference", "decode", "label", "iterate")
    for path in (RECIPES / folder).glob("*.yaml")
)
LAUNCHED_BY_HAND = sorted(RECIPES.glob("*.yaml"))
OTHERS = sorted(
    {path for folder in ("recipes", "examples", "eval", "benchmarks") for path in (ROOT / folder).rglob("*.yaml")}
    - set(LAUNCHED_BY_HAND)
)
HINT = "This Python lacks posttrain: pip install posttrain"
LONGEST = 12


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of_yaml(text: str) -> list[str]:
    """The lines of a file without blank lines and lines that hold only a comment."""
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def base_data(name: str) -> dict:
    return yaml.safe_load((RECIPES / "base" / f"{name}.yaml").read_text(encoding="utf-8"))


def test_lines_of_comments_and_blank_lines_do_not_count():
    assert lines_of_yaml("# a paper\n\na: 1   # a comment\n  # indented\n  \nb:\n  c: 2\n") == [
        "a: 1   # a comment",
        "b:",
        "  c: 2",
    ]


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_has_at_most_twelve_lines_of_yaml(path):
    text = path.read_text(encoding="utf-8")
    assert len(lines_of_yaml(text)) <= LONGEST
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_has_a_base_and_begins_with_its_name_in_a_comment(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert lines_of_yaml(text)[0].startswith("base:")


def test_only_recipes_that_are_launched_by_hand_hint_at_a_missing_package():
    assert {"dpo.yaml", "grpo.yaml", "ppo.yaml"} <= {path.name for path in LAUNCHED_BY_HAND}
    assert [path.name for path in LAUNCHED_BY_HAND if HINT not in path.read_text(encoding="utf-8")] == []
    assert [name_of(path) for path in OTHERS if "lacks posttrain" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("name", ["value", "preference_online", "preference_iterations", "label"])
def test_bases_on_grade_school_mathematics_agree(name):
    """A base may not have a base, so these files repeat sections of `math.yaml`. The copies must be equal."""
    ours, mathematics = base_data(name), base_data("math")
    shared = ["policy", "data", "verify", "sampling"] + [key for key in ("engine", "evaluate") if key in ours]
    of_training = {"gradient_checkpointing"} if name == "label" else set()
    mathematics["policy"] = {key: value for key, value in mathematics["policy"].items() if key not in of_training}
    assert {key: ours[key] for key in shared} == {key: mathematics[key] for key in shared}


def test_the_base_of_tq_star_is_that_of_other_decoders_with_a_decoder():
    ours, others = base_data("tq_star"), base_data("decode")
    assert {key for key in ours.keys() | others.keys() if ours.get(key) != others.get(key)} == {"decoder", "sampling"}


@pytest.mark.parametrize(("name", "method"), [("grpo", "rl/grpo"), ("ppo", "rl/ppo"), ("dpo", "preference/dpo")])
def test_a_complete_recipe_runs_the_same_method_as_the_short_one(name, method):
    complete = load_recipe(RECIPES / f"{name}.yaml").resolved
    short = load_recipe(RECIPES / f"{method}.yaml").resolved
    of_method = [*SLOTS, "policy", "value", "data", "sampling", "optimizer", "steps", "prompts_per_step", "completions"]
    of_method += ["epochs", "minibatches", "seed"]
    assert {key: complete.get(key) for key in of_method} == {key: short.get(key) for key in of_method}
