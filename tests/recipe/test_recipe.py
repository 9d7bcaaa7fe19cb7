"""Recipes: strict YAML, parts by name, overrides, bases; and what the command line says of mistakes."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import posttrain
from posttrain.commands.cli import main
from posttrain.errors import RecipeError
from posttrain.parts import advantages, losses
from posttrain.recipe import sections
from posttrain.recipe.part import Part, RecipeConflict
from posttrain.recipe.resolve import resolve
from posttrain.recipe.yaml_reader import parse
from posttrain.training.recipe import Recipe, load_recipe

SHIPPED = Path(__file__).parents[2] / "recipes"
TRAINING = sorted(path for folder in (".", "rl", "value", "preference") for path in (SHIPPED / folder).glob("*.yaml"))

GOOD = """\
policy:
  model: some/model
data:
  path: some/data
verify: [{use: math}]
advantage: {use: outcome, scale: group}
loss:
  - {use: clip, low: 0.2, high: 0.28}
  - use: kl
    coef: 1e-3
sampling:
  max_tokens: 64
optimizer: {learning_rate: 1e-5}
steps: 3
"""

OWN_PARTS = '''\
"""Parts of a user."""

from dataclasses import dataclass, field
from typing import Literal

from posttrain.option_types import facts


def doubled(batch, *, factor: float = 2.0, mode: Literal["plain", "odd"] = "plain"):
    """Twice the reward.

    A = 2 R.  Someone 2026, eq. 1, arXiv:2601.00001.
    """
    return batch


def has_unit(completion: str, *, unit: str, strict: bool = False) -> float:
    return float(unit in completion)


def trl_style(completions, prompts=None, **columns) -> list[float]:
    return [0.0 for _ in completions]


def needs_scale(batch, *, scale: float):
    return batch


@facts(compares_group=True)
def against_the_rest(batch):
    return batch


def of_a_loss(outputs, batch):
    return batch


@dataclass
class Running:
    """Counts its calls."""

    decay: float = 0.9
    state: dict = field(default_factory=dict)

    def __call__(self, batch):
        self.state["calls"] = self.state.get("calls", 0) + 1
        return self.state["calls"]


number = 3
'''


@pytest.fixture
def recipe(tmp_path: Path):
    """``recipe(text, **other files) -> Path`` of ``r.yaml``, beside ``parts.py``."""
    (tmp_path / "parts.py").write_text(OWN_PARTS)

    def write(text: str = GOOD, **files: str) -> Path:
        for name, content in {"r": text, **files}.items():
            (tmp_path / f"{name}.yaml").write_text(dedent(content))
        return tmp_path / "r.yaml"

    return write


# ------------------------------------------------------------------------------------------------------- strict YAML


def test_scalars_follow_yaml_1_2():
    data = parse(
        "a: 1e-5\nb: 010\nc: on\nd: 1:30\ne: 0o17\nf: .inf\ng: 2026-11-21\nh: 1_000\ni: 'true'\nj: ~\nk:\nl: 0x1F\n"
        "m: -3.\nn: True\no: +.5E+3\n",
        "x.yaml",
    ).data
    values = [1e-5, 10, "on", "1:30", 15, math.inf, "2026-11-21", "1_000", "true", None, None, 31, -3.0, True, 500.0]
    assert list(data.values()) == values
    assert [type(value) for value in data.values()] == [type(value) for value in values]
    assert math.isnan(parse("a: .nan", "x.yaml").data["a"])


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab:#'\"\\ -1e.é", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), plain, max_size=4))
def test_json_is_read_as_what_it_is(data):
    assert parse(json.dumps(data), "x.yaml").data == data  # YAML 1.2 contains JSON


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), plain, max_size=4))
def test_what_pyyaml_writes_is_read_back(data):
    """The run folder keeps the resolved recipe as PyYAML writes it."""
    assert parse(yaml.safe_dump(data), "x.yaml").data == data


def test_an_alias_is_its_anchor_and_may_not_contain_itself():
    assert parse("a: &x {k: [1]}\nb: *x", "x.yaml").data == {"a": {"k": [1]}, "b": {"k": [1]}}
    with pytest.raises(RecipeError, match="x.yaml:1:4: an alias contains itself"):
        parse("a: &x [*x]", "x.yaml")


# ------------------------------------------------------------------------------------------------------- good recipes


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


def test_parts_of_ones_own_file(recipe):
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


def test_the_round_trip_keeps_parts_of_ones_own(recipe, tmp_path, monkeypatch):
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


# ------------------------------------------------------------------------------------------------------------ mistakes


def edit(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


BROKEN = {
    # name: (text, overrides, what the message says); a tuple is one of several messages
    "misspelt section": (edit("optimizer:", "optimiser:"), [], ["r.yaml:13:1: optimiser", "did you mean 'optimizer'?"]),
    "misspelt setting": (edit("max_tokens", "max_tokns"), [], ["r.yaml:12:3: sampling.max_tokns", "'max_tokens'?"]),
    "name of another toolkit": (
        edit("steps: 3", "num_generations: 3"),
        [],
        ["r.yaml:14:1: num_gen", "is 'completions' here"],
    ),
    "setting in the wrong place": (edit("steps: 3", "top_p: 1"), [], ["r.yaml:14:1: top_p", "'sampling.top_p'"]),
    "key twice": (GOOD + "steps: 4\n", [], ["r.yaml:15:1: steps: key given twice (first at", "r.yaml:14:1)"]),
    "not YAML": (edit("[{use: math}]", "[{use: math]"), [], ["r.yaml:5:", "not valid YAML"]),
    "tab": (edit("  max_tokens: 64", "\tmax_tokens: 64"), [], ["r.yaml:12:1", "not valid YAML", "\\t"]),
    "text for a number": (edit("steps: 3", "steps: many"), [], ["r.yaml:14:1: steps", 'valid integer (got "many")']),
    "truth value for a number": (edit("steps: 3", "steps: on"), [], ["r.yaml:14:1: steps", 'integer (got "on")']),
    "not positive": (edit("steps: 3", "steps: 0"), [], ["r.yaml:14:1: steps", "greater than or equal to 1 (got 0)"]),
    "missing setting": (edit("  path: some/data", "  split: train"), [], ["r.yaml:3:1: data.path", "is missing"]),
    "missing section": (
        edit("advantage: {use: outcome, scale: group}\n", ""),
        [],
        ["r.yaml:1:1", "'advantage' is missing"],
    ),
    "misspelt part": (edit("use: clip", "use: clipp"), [], ["r.yaml:8:6: loss.0.use", "did you mean 'clip'?"]),
    "misspelt option": (edit("high:", "hihg:"), [], ["r.yaml:8:27: loss.0.hihg: unknown option", "'high'?"]),
    "option of a wrong type": (edit("low: 0.2", "low: wide"), [], ["r.yaml:8:17: loss.0.low", '(got "wide")']),
    "option outside its range": (
        edit("low: 0.2", "low: -1"),
        [],
        ["r.yaml:8:17: loss.0.low", "greater than or equal to 0 (got -1)"],
    ),
    "option outside its range, on the command line": (
        GOOD,
        ["--loss.0.low=-1"],
        ["command line: --loss.0.low=-1", "greater than or equal to 0 (got -1)"],
    ),
    "override given twice": (
        GOOD,
        ["--steps=4", "--seed=1", "--steps=5"],
        ["command line: --steps=5: given twice (first as --steps=4)"],
    ),
    "option outside its choices": (
        edit("scale: group", "scale: grup"),
        [],
        ["r.yaml:6:27: advantage.scale", "'none', 'group' or 'batch'", "did you mean 'group'?"],
    ),
    "missing option": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:needs_scale'}"),
        [],
        ["r.yaml:6:1: advantage", "option 'scale' is missing"],
    ),
    "no such file": (edit("use: outcome", "use: 'part.py:f'"), [], ["r.yaml:6:13", "no file 'part.py'", "'parts.py'?"]),
    "no such function": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:double'}"),
        [],
        ["r.yaml:6:13: advantage.use: parts.py has no 'double'", "did you mean 'doubled'?"],
    ),
    "not callable": (edit("use: outcome", "use: 'parts.py:number'"), [], ["r.yaml:6:13", "cannot be called"]),
    "no such module": (edit("use: math", "use: no_such.f"), [], ["r.yaml:5:11: verify.0.use", "no module 'no_such'"]),
    "part of another slot": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:of_a_loss'}"),
        [],
        ["r.yaml:6:13", "takes (outputs, batch), but `advantage` passes (batch)", "fits `loss`"],
    ),
    "unknown option of a verifier": (
        edit("{use: math}", "{use: 'parts.py:has_unit', strikt: true}"),
        [],
        ["r.yaml:5:37: verify.0.strikt", "did you mean 'strict'?"],
    ),
    "coef of a verifier": (edit("{use: math}", "{use: math, coef: 1}"), [], ["r.yaml:5:22: verify.0.coef: unknown"]),
    "no use": (edit("{use: clip, ", "{"), [], ["r.yaml:8:5: loss.0", "`use` is missing"]),
    "misspelt override": (
        GOOD,
        ["--sampling.temprature=1"],
        ["command line: --sampling.temprature=1", "'temperature'?"],
    ),
    "index outside the list": (GOOD, ["--loss.2.low=1"], ["command line: --loss.2.low=1", "loss is a list of 2"]),
    "override through a scalar": (GOOD, ["--steps.many=1"], ["command line: --steps.many=1", "has no key 'many'"]),
    "override without a value": (GOOD, ["--steps"], ["command line: --steps", "--section.key=value"]),
    "nucleus sampling": (edit("max_tokens: 64", "top_p: 0.9"), [], ["r.yaml:12:3: sampling.top_p", "full softmax"]),
    "samples a prompt by their old name": (
        GOOD,
        ["--evaluate={data: {path: x}, n: 2}", "--value.branches.n=2"],
        [("--evaluate", "did you mean 'completions'"), ("--value.branches.n=2", "did you mean 'completions'")],
    ),
    "greedy sampling": (GOOD, ["--sampling.temperature=0"], ["command line: --sampling.temperature=0", "greedily"]),
    "group of one": (
        GOOD,
        ["--completions=1"],
        ["r.yaml:6:1: advantage: outcome compares", "`completions: 1`"],
    ),
    "own part for groups, of one": (
        edit("{use: outcome, scale: group}", "{use: 'parts.py:against_the_rest'}"),
        ["--completions=1"],
        ["r.yaml:6:1: advantage: parts.py:against_the_rest compares", "`completions: 1`"],
    ),
    "more updates than rows": (GOOD, ["--minibatches=999"], ["--minibatches=999", "a step has 256 completions"]),
    "misspelt weight": (
        edit("{use: math}", "{use: math, wieght: 2}"),
        [],
        ["r.yaml:5:22: verify.0.wieght", "'weight'?"],
    ),
    "no such data function": (
        edit("some/data", "pats.py:f"),
        [],
        ["r.yaml:4:3: data.path", "no file 'pats.py'", "'parts.py'?"],
    ),
    "no such base": (
        "base: bse.yaml\n" + GOOD,
        [],
        [("r.yaml:1:1: base: cannot be read",), ("bse.yaml: no such file", "'base.yaml'?")],
    ),
    "base of a base": ("base: chain.yaml\n" + GOOD, [], ["chain.yaml:1:1: base", "may not have a base"]),
    "mistake in the base": (
        "base: base.yaml\nsteps: 1\n",
        [],
        [("base.yaml:3:1: data.path", "missing"), ("base.yaml:4:3: data.pth", "did you mean 'path'?")],
    ),
    "a list": ("- policy\n", [], ["r.yaml:1:1", "a recipe is a mapping"]),
    "number as a key": (GOOD + "3: x\n", [], ["r.yaml:15:1: 3: a key is text"]),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN.keys())
def test_a_mistake_is_one_message_with_its_place(case, recipe, capsys):
    text, overrides, said = case
    base = GOOD.replace("  path: some/data", "  pth: some/data")
    path = recipe(text, base=base, chain="base: base.yaml\n" + GOOD)
    assert main(["train", str(path), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    messages = said if isinstance(said[0], tuple) else [tuple(said)]
    lines = captured.err.splitlines()
    assert len(lines) == len(messages), captured.err
    for line, pieces in zip(lines, messages, strict=True):
        assert all(piece in line for piece in pieces), line


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(recipe, capsys):
    text = edit("max_tokens: 64", "max_tokens: x").replace("low: 0.2", "lo: 0.2").replace("steps: 3", "stepz: 3")
    assert main([str(recipe(text)), "--seed=-1"]) == 2
    err = capsys.readouterr().err.replace(f"{recipe().parent}/", "")
    assert [line.partition(": ")[0] for line in err.splitlines()] == [
        "command line",
        "r.yaml:8:17",
        "r.yaml:12:3",
        "r.yaml:14:1",
    ]


def test_a_file_that_does_not_import_is_told_with_its_line(recipe, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def f(batch):\n    return batch\n\nimport no_such_package\n")
    assert main(["show", str(recipe(edit("use: outcome", "use: 'broken.py:f'")))]) == 2
    err = capsys.readouterr().err
    assert "r.yaml:6:13: advantage.use: cannot import" in err
    assert f"{tmp_path}/broken.py:4: ModuleNotFoundError: No module named 'no_such_package'" in err


def test_a_recipe_that_is_not_there_is_told_with_a_near_one(recipe, capsys):
    path = recipe()
    assert main(["train", str(path.with_name("rr.yaml"))]) == 2
    assert capsys.readouterr().err == f"{path.with_name('rr.yaml')}: no such file; did you mean 'r.yaml'?\n"


@pytest.mark.parametrize("command", [["-m", "posttrain"], ["-m", "posttrain", "train"], []], ids=" ".join)
def test_a_real_process_ends_with_code_2_and_no_traceback(command, recipe):
    path = recipe(edit("use: clip", "ues: clip").replace("outcome", "parts.py:double").replace("- use: kl", "- us: kl"))
    result = subprocess.run([sys.executable, *command, str(path), "--stepz=1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "command line: --stepz=1: unknown key; did you mean 'steps'?",
        f"{path}:6:13: advantage.use: parts.py has no 'double'; did you mean 'doubled'?",
        f"{path}:8:5: loss.0: a part is written as {{use: name, option: value}} (`use` is missing)",
        f"{path}:9:5: loss.1: a part is written as {{use: name, option: value}} (`use` is missing)",
    ]
