"""Tests of loading recipes: parts by name, overrides, bases, round trips, and what ``posttrain show`` prints."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import yaml
from recipe_texts import GOOD

import posttrain
from posttrain.commands.cli import main
from posttrain.parts import advantages, losses
from posttrain.recipe import sections
from posttrain.recipe.part import Part, RecipeConflict
from posttrain.recipe.resolve import resolve
from posttrain.training.recipe import Recipe, load_recipe

SHIPPED = Path(__file__).parents[2] / "recipes"
TRAINING = sorted(path for folder in (".", "rl", "value", "preference") for path in (SHIPPED / folder).glob("*.yaml"))


def test_a_recipe_is_callables_with_their_options_bound(recipe):
    r = load_recipe(recipe())
    assert [part.name for part in r.loss] == ["clip", "kl"]
    assert [part.coef for part in r.loss] == [1.0, 1e-3]
    call = r.loss[0].call
    assert isinstance(call, partial) and call.func is losses.clip and call.keywords == {"low": 0.2, "high": 0.28}
    assert r.loss[0].spec == "posttrain.parts.losses.clip" and resolve(r.loss[0].spec) is losses.clip
    assert (r.normaliser.name, r.rollout.name, r.prompts.name) == ("token_mean", "single_turn", "uniform")
    assert r.optimizer.learning_rate == 1e-5 and r.name == "r" and r.steps == 3 and r.seed == 0


def test_overrides_win_and_enter_lists(recipe):
    arguments = ["--loss.0.high=0.3", "--optimizer.betas=[0.9, 0.95]", "--policy.lora.rank=8", "--data.system=a b"]
    r = load_recipe(recipe(), [*arguments, "--advantage={use: returns, gamma: 0.9}"])
    assert r.loss[0].options == {"low": 0.2, "high": 0.3}
    assert r.optimizer.betas == (0.9, 0.95)
    assert r.policy.lora == sections.LoraSection(rank=8)
    assert r.data.system == "a b"
    assert r.advantage.name == "returns" and r.advantage.options == {"gamma": 0.9}


def test_one_part_alone_needs_no_brackets(recipe):
    text = GOOD.replace("[{use: math}]", "{use: math}")
    r = load_recipe(recipe(text), ["--loss={use: cispo, weights: {use: truncated_importance}}", "--verify.0.weight=2"])
    assert [part.name for part in r.loss] == ["cispo"]
    assert [weight.name for weight in r.loss[0].weights] == ["truncated_importance"]
    assert r.verify[0].weight == 2.0


def test_a_base_is_merged_below_and_a_named_part_replaces_the_whole_part(recipe):
    top = "base: base.yaml\nadvantage: {use: returns}\nloss: {use: reinforce}\noptimizer: {weight_decay: 0.1}\n"
    r = load_recipe(recipe(top, base=GOOD))
    assert r.advantage.options == {}  # not the base's `scale: group`
    assert [part.name for part in r.loss] == ["reinforce"]
    assert (r.optimizer.learning_rate, r.optimizer.weight_decay) == (1e-5, 0.1)
    option = "base: base.yaml\nadvantage: {center: batch}\n"
    assert load_recipe(recipe(option, base=GOOD)).advantage.options == {"center": "batch", "scale": "group"}


def test_an_empty_mapping_empties_that_of_the_base(recipe):
    base = GOOD + "reference: {model: other}\n"
    assert load_recipe(recipe("base: base.yaml\nsteps: 3\n", base=base)).reference.model == "other"
    assert load_recipe(recipe("base: base.yaml\nreference: {}\n", base=base)).reference.model is None


def test_parts_of_the_user_s_own_file(recipe):
    text = GOOD.replace("{use: outcome, scale: group}", "{use: 'parts.py:doubled', factor: 3}")
    text = text.replace(
        "[{use: math}]", "[{use: 'parts.py:has_unit', unit: km}, {use: 'parts.py:trl_style', weight: 2}]"
    )
    path = recipe(text)
    r = load_recipe(path, ["--keep={use: parts.py:Running, decay: 0.5}"])
    assert r.advantage.options == {"factor": 3.0}
    assert r.verify[0]("7 km") == 1.0
    assert r.verify[1].weight == 2.0
    assert resolve(r.verify[0].spec) is r.verify[0].target  # imported once a process
    assert Path(r.verify[0].spec.partition(":")[0]) == path.parent / "parts.py"
    running = r.keep[0].call
    assert running.decay == 0.5 and (running(None), running(None)) == (1, 2) and running.state == {"calls": 2}


def test_a_reward_function_of_trl_is_found_by_its_dotted_name(recipe):
    from trl.rewards import think_format_reward

    r = load_recipe(recipe(), ["--verify=[{use: trl.rewards.think_format_reward, on_error: skip}]"])
    assert r.verify[0].target is think_format_reward and r.verify[0].on_error == "skip"


def test_local_paths_are_found_beside_the_recipe_or_in_the_working_directory(recipe, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere):
        (folder / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(elsewhere)
    path = recipe(GOOD.replace("some/data", "rows.jsonl"))
    assert load_recipe(path).data.path == str(tmp_path / "rows.jsonl")
    assert load_recipe(path, ["--data.path=rows.jsonl"]).data.path == str(elsewhere / "rows.jsonl")
    assert load_recipe(path, ["--data.path=parts.py:doubled"]).data.path == f"{tmp_path / 'parts.py'}:doubled"
    assert load_recipe(path, ["--data.path=open/hub-name"]).data.path == "open/hub-name"


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_recipes_load_show_and_survive_the_round_trip(path, tmp_path, capsys):
    first = load_recipe(path)
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    parts = (*first.loss, *first.verify, first.advantage, first.normaliser)
    assert all(part.name in shown for part in parts if part is not None)
    (tmp_path / path.name).write_text(yaml.safe_dump(first.resolved, sort_keys=False))
    second = load_recipe(tmp_path / path.name)
    assert second.resolved == first.resolved
    assert dataclasses.replace(second, path=first.path).resolved == first.resolved


def test_the_round_trip_keeps_parts_of_the_user_s_own(recipe, tmp_path, monkeypatch):
    text = GOOD.replace("{use: outcome, scale: group}", "{use: 'parts.py:doubled'}")
    first = load_recipe(recipe(text))
    assert first.resolved["advantage"] == {"use": f"{tmp_path}/parts.py:doubled", "factor": 2.0, "mode": "plain"}
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(first.resolved))
    monkeypatch.chdir("/")
    assert load_recipe(run / "recipe.yaml").resolved == first.resolved


def test_a_recipe_in_python_is_the_one_in_yaml(recipe):
    from posttrain.verify.functions import math as math_verifier

    r = Recipe(
        policy=sections.PolicySection(model="some/model"),
        data=sections.DataSection(path="some/data"),
        verify=(Part.of(math_verifier),),
        advantage=Part.of(advantages.outcome, scale="group"),
        loss=(Part.of(losses.clip, low=0.2, high=0.28), Part.of(losses.kl, settings={"coef": 1e-3})),
        sampling=sections.SamplingSection(max_tokens=64),
        optimizer=sections.OptimizerSection(learning_rate=1e-5),
        steps=3,
    )
    assert r.resolved == load_recipe(recipe()).resolved
    with pytest.raises(RecipeConflict, match=r"sampling\.top_p: 0\.9 cuts the distribution"):
        dataclasses.replace(r, sampling=sections.SamplingSection(top_p=0.9))
    with pytest.raises(ValueError, match="steps"):
        dataclasses.replace(r, steps=0)


def test_the_public_names_are_there():
    assert posttrain.Recipe is Recipe and posttrain.Part is Part and posttrain.load_recipe is load_recipe
    assert posttrain.Batch.__name__ == "Batch" and callable(posttrain.train)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = posttrain.trian


def test_show_marks_what_differs(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = GOOD.replace("{use: outcome, scale: group}", "{use: 'parts.py:doubled', factor: 3}")
    assert main(["show", str(recipe(text))]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "doubled(batch, *, factor=3.0*, mode='plain')" in text
    assert "Twice the reward." in text and "A = 2 R.  Someone 2026, eq. 1, arXiv:2601.00001." in text
    assert "parts.py:9" in next(line for line in lines if line.startswith("advantage"))
    star = {line.split()[1]: line.split()[2:] for line in lines if line.startswith("* ")}
    assert star["sampling.max_tokens"] == ["64", "256"] and star["steps"] == ["3", "100"]
    assert "optimizer.eps" not in star and "  optimizer.eps " in text


WRAPPED = '''
def wrapped(batch):
    """A summary that goes on
    for two lines.

    A_t = first_t + (second_t)
    B_t = third_t

    Someone 2026, a title that is so long that it is
    wrapped, eq. 1, arXiv:2601.00001. Prose of the same line.
    Prose that no one asked for.
    """
    return batch.reward
'''


def test_show_prints_summary_equation_and_source_whole(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "wrapped.py").write_text(WRAPPED, encoding="utf-8")
    text = GOOD.replace("{use: outcome, scale: group}", "{use: 'wrapped.py:wrapped'}")

    def shown(columns: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["show", str(recipe(text))]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        start = lines.index("wrapped(batch)")
        return lines[start + 1 : lines.index("", start)]

    source = (
        "Someone 2026, a title that is so long that it is wrapped, eq. 1, arXiv:2601.00001. Prose of the same line."
    )
    expected = ["A summary that goes on for two lines.", "A_t = first_t + (second_t)", "B_t = third_t", source]
    assert shown("160") == expected
    assert len(shown("60")) > 4 and " ".join(shown("60")) == " ".join(expected)
