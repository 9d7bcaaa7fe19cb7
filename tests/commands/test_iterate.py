"""``posttrain iterate``: the settings of stages, mistakes, resuming, and IVO's three anchors on the exact world."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from exact_world import (
    PROMPT,
    String,
    World,
    distance,
    distribution_of,
    kl,
    make_world,
    table_score,
    tokens_of,
    total_variation,
)
from runs import write_run

from posttrain import load_recipe
from posttrain.batch import Batch
from posttrain.commands.cli import main
from posttrain.commands.iterate import as_arguments, run_iterate
from posttrain.commands.iterate_plan import Plan, check_stages
from posttrain.decoding.context import DecoderContext
from posttrain.decoding.prefix_scores import sum_scores
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.decoding.shaping import Shaped
from posttrain.engines.base import Completion
from posttrain.output.tracking import read_metrics
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Part
from posttrain.rollout.rollouts import Prompts, to_batch
from posttrain.training.recipe import Recipe

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "iterate").glob("*.yaml"))
ITERATE = """\
rounds: 2
stages:
  values:
    train: values.yaml
    later:
      decoder: {use: shaped, k: 4, strength: 2.0, score: {use: value}}
    from: {decoder.score.model: values.value, value.model: values.value}
  held_out:
    decode: decode.yaml
    from: {decoder.score.model: values.value}
table: {reward: held_out.score, KL: held_out.kl}
"""
VALUES = {
    "value": {"optimizer": {"learning_rate": 0.01}},
    "target": {"use": "outcome_label"},
    "value_loss": [{"use": "mse"}],
    "loss": [],
    "steps": 2,
    "seed": 5,
}
DECODER = "{use: shaped, k: 4, strength: 2.0, score: {use: value, model: none}}"


def write(folder: Path, text: str = ITERATE, model: Path = Path("tiny")) -> Path:
    """Writes the recipes of two stages and the file that joins them, and returns its path."""
    values = write_run(folder, model, **VALUES)
    settings = yaml.safe_load(values.read_text(encoding="utf-8"))
    del settings["advantage"], settings["run"]
    (folder / "values.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    decode = {name: settings[name] for name in ("policy", "sampling", "engine")}
    decode |= {"data": {"path": "data.jsonl", "limit": 4}, "verify": settings["verify"]}
    decode["decoder"] = yaml.safe_load(DECODER)
    (folder / "decode.yaml").write_text(yaml.safe_dump(decode), encoding="utf-8")
    (folder / "it.yaml").write_text(text, encoding="utf-8")
    return folder / "it.yaml"


def plan_of(path: Path, *overrides: str) -> Plan:
    return Plan.read(path, overrides)


def recipe_of(plan: Plan, number: int, name: str) -> Recipe:
    return load_recipe(plan.file(name), plan.settings(number, name))


# ------------------------------------------------------------------------------------------------ settings of stages


def test_a_stage_takes_the_newest_output_there_is(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path), f"--folder={tmp_path / 'all'}", "--rounds=3")
    first, second = recipe_of(plan, 1, "values"), recipe_of(plan, 2, "values")
    assert first.decoder is None and first.value is not None and first.value.model is None
    assert second.decoder is not None and second.value is not None
    before = str(tmp_path / "all" / "round-1" / "values" / "value")
    assert second.decoder.options["score"].options["model"] == second.value.model == before
    held_out = load_as(DecodeRecipe, plan.file("held_out"), plan.settings(1, "held_out"))
    assert held_out.decoder is not None
    assert held_out.decoder.options["score"].options["model"] == before  # of this round: its stage comes earlier
    assert held_out.file == tmp_path / "all" / "round-1" / "held_out" / "completions.jsonl"


def test_rounds_draw_new_samples_to_learn_from_and_are_compared_on_the_same(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path), "--rounds=3")
    assert [recipe_of(plan, number, "values").seed for number in (1, 2, 3)] == [5, 6, 7]
    seeds = {load_as(DecodeRecipe, plan.file("held_out"), plan.settings(n, "held_out")).seed for n in (1, 2, 3)}
    assert seeds == {0}


def test_all_outputs_so_far_make_a_list(tmp_path: Path) -> None:
    text = ITERATE.replace("score: {use: value}", "score: {use: values}").replace(
        "decoder.score.model: values.value, ", ""
    )
    text = text.replace(
        "value.model: values.value}\n  held",
        "value.model: values.value}\n    from_all: {decoder.score.models: values.value}\n  held",
    )
    plan = plan_of(write(tmp_path, text), f"--folder={tmp_path}")
    decoder = recipe_of(plan, 3, "values").decoder
    assert decoder is not None
    assert decoder.options["score"].options["models"] == tuple(f"{tmp_path}/round-{n}/values/value" for n in (1, 2))


def test_settings_go_over_all_stages_and_over_one(tmp_path: Path) -> None:
    overrides = ["--set={sampling: {max_tokens: 7}, seed: 3}", "--stages.values.set.seed=11"]
    plan = plan_of(write(tmp_path), *overrides)
    values = recipe_of(plan, 2, "values")
    assert (values.sampling.max_tokens, values.seed) == (7, 12)
    held_out = load_as(DecodeRecipe, plan.file("held_out"), plan.settings(2, "held_out"))
    assert (held_out.sampling.max_tokens, held_out.seed) == (7, 3)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_read_in_every_round(path: Path) -> None:
    check_stages(plan_of(path))


HELD_OUT = "{decoder.score.model: values.value}\n"
MISTAKES = [  # text to replace, text that replaces it, place of the message, words of the message
    ("train: values.yaml", "trian: values.yaml", "it.yaml:4:5: stages.values.trian", "'train'?"),
    ("    train: values.yaml\n", "", "it.yaml:3:3: stages.values", "one of train, decode, label, eval"),
    ("train: values.yaml", "train: v.yaml\n    eval: e.yaml", "it.yaml:3:3: stages.values", "has train and eval"),
    ("train: values.yaml", "train: vlaues.yaml", "it.yaml:4:5:", "did you mean 'values.yaml'?"),
    (
        HELD_OUT,
        HELD_OUT.replace("values.", "valeus."),
        "it.yaml:10:12",
        "there is no stage 'valeus'; did you mean 'values'?",
    ),
    (HELD_OUT, HELD_OUT.replace("value}", "valu}"), "it.yaml:10:12", "has no 'valu'; did you mean 'value'?"),
    ("value.model: values.value", "value.model: values.model", "it.yaml:7:47", "values.yaml trains no policy"),
    ("strength: 2.0", "strenght: 2.0", "it.yaml:6:36: decoder.strenght", "'strength'?"),  # wrong from round 2 on
    ("score.model: values.value,", "score.modle: values.value,", "it.yaml:7:12: decoder.score.modle", "'model'?"),
    ("held_out.score", "held_out", "it.yaml:11:9: table.reward", "stage.metric"),
]


@pytest.mark.parametrize(("old", "new", "place", "message"), MISTAKES)
def test_mistakes_are_reported_before_anything_runs(old, new, place, message, tmp_path: Path, capsys) -> None:
    assert old in ITERATE
    path = write(tmp_path, ITERATE.replace(old, new))
    assert main(["iterate", str(path), f"--folder={tmp_path / 'all'}"]) == 2
    printed = capsys.readouterr().err
    assert place in printed and message in printed, printed
    assert not (tmp_path / "all").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys) -> None:
    path, folder = write(tmp_path), tmp_path / "all"
    assert main(["iterate", str(path), f"--folder={folder}", "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    folder.mkdir()
    (folder / "mine.txt").touch()
    assert main(["iterate", str(path), f"--folder={folder}"]) == 2
    assert "is not empty" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.engine
def test_rounds_run_and_a_resumed_run_ends_like_one_that_was_never_stopped(
    tmp_path: Path, tiny_model_folder: Path, capsys
) -> None:
    path, folder = write(tmp_path, model=tiny_model_folder), tmp_path / "all"
    settings = [f"--folder={folder}", "--stages.values.set.run.keep_finished=2"]
    assert run_iterate(path, settings) == folder
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    done = [json.loads(line) for line in lines]
    assert [(line["round"], line["stage"]) for line in done] == [
        (number, stage) for number in (1, 2) for stage in ("values", "held_out")
    ]
    assert all(Path(path).exists() for line in done for path in line["outputs"].values())
    assert {"value", "rollouts", "folder"} == done[0]["outputs"].keys() and done[1]["metrics"]["kl"] > 0
    assert "value/explained_variance" in done[2]["metrics"]
    assert (folder / "rounds.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "reward" in printed and "KL" in printed
    values = folder / "round-2" / "values"
    expected = read_metrics(values, timing=False)
    # as if it had been killed in the last step of the second round's training
    (values / "finished.json").unlink()
    shutil.rmtree(values / "checkpoints" / "step-000002")
    shutil.rmtree(folder / "round-2" / "held_out")
    (folder / "rounds.jsonl").write_text("".join(line + "\n" for line in lines[:2]), encoding="utf-8")
    before = (folder / "round-1" / "values" / "metrics.jsonl").stat().st_mtime_ns
    run_iterate(path, settings, resume=True)
    assert read_metrics(values, timing=False) == expected
    assert (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert (folder / "round-1" / "values" / "metrics.jsonl").stat().st_mtime_ns == before
    assert main(["iterate", str(path), *settings, "--resume", "--set.sampling.max_tokens=5"]) == 2
    assert "set.sampling.max_tokens: (absent) -> 5" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ IVO's three anchors


WORLD = make_world(3, vocabulary=2, length=3)


class Rounds:
    """Rounds of a shipped recipe of IVO on the exact world, with every string once and exact expectations.

    Target and decoder are the recipe's. Three things differ from a real run: every token is guided, the strength is
    chosen by the test (such as 1 / β of the world), and a value is a table, fitted by the means of its targets.
    """

    def __init__(self, name: str, world: World, strength: float) -> None:
        plan = plan_of(next(path for path in SHIPPED if path.stem == name))
        first, later = recipe_of(plan, 1, "values"), recipe_of(plan, 2, "values")
        assert first.decoder is None and later.decoder is not None and later.target is not None
        changes = {"strength": strength, "every": 1, "tilted": False, "score": self.score}
        self.decoder = Part.of(later.decoder.target, **{**later.decoder.options, **changes})
        options = {"beta": world.beta} if "beta" in later.target.options else {}
        self.target = Part.of(later.target.target, **{**later.target.options, **options})
        self.adds_up = later.decoder.options["score"].name == "values"
        self.world, self.values = world, list[Mapping[String, float]]()
        self.strings: Sequence[String] = list(world.strings)
        self.distribution: dict[String, float] = dict(world.strings)

    def score(self, context: DecoderContext):
        used = self.values if self.adds_up else self.values[-1:]
        return sum_scores(*((1.0, table_score(values)) for values in used))

    def guided(self, engine) -> Shaped:
        context = DecoderContext(tokenizer=None, device=torch.device("cpu"))  # type: ignore[arg-type]  # reads tables
        return self.decoder(engine, context)

    def completions(self) -> list[Completion]:
        """Every string as a completion, with its log-probs under the distribution that it is drawn from."""
        world = self.world
        if self.values:
            prompts = [PROMPT] * len(self.strings)
            return self.guided(world.engine()).forced(prompts, self.strings, world.sampling)
        logps = [[math.log(world.next_distribution(y[:t])[y[t]]) for t in range(len(y))] for y in self.strings]
        return [Completion(list(y), row, 1, 0) for y, row in zip(self.strings, logps, strict=True)]  # type: ignore[arg-type]

    def batch(self) -> Batch:
        completions = self.completions()
        prompts = Prompts(tokens=[list(PROMPT)], rows=[{}], places=["here"], group=[0], seeds=[0])
        batch = to_batch(prompts, [completions], {(0, j): "" for j in range(len(completions))})
        reference = [[math.log(self.world.next_distribution(y[:t])[y[t]]) for t in range(len(y))] for y in self.strings]
        exact = {
            "logp_sampler": [[0.0, *completion.logps] for completion in completions],
            "logp_ref": [[0.0, *logps] for logps in reference],
            "reward": [self.world.reward[y] for y in self.strings],
        }
        zeros = torch.zeros(batch.mask.shape, dtype=torch.float64)
        return batch.set(step_reward=zeros, **{k: torch.tensor(v, dtype=torch.float64) for k, v in exact.items()})

    def run(self) -> None:
        """Runs one round: completions of the present distribution, values of all prefixes, the new distribution."""
        batch = self.batch()
        target = self.target(batch).double().tolist()
        values = {}
        for prefix in self.world.prefixes:
            through = [
                (self.distribution[y], target[i][len(prefix)])
                for i, y in enumerate(self.strings)
                if y[: len(prefix)] == prefix
            ]
            values[prefix] = sum(p * t for p, t in through) / sum(p for p, _ in through)
        self.values.append(values)
        completions = zip(self.strings, self.completions(), strict=True)
        self.distribution = {y: math.exp(sum(completion.logps)) for y, completion in completions}


def objectives(rounds: Rounds, count: int) -> list[float]:
    """Objective of the policy, and of the distribution after each of ``count`` rounds."""
    values = [rounds.world.objective(rounds.distribution)]
    for _ in range(count):
        rounds.run()
        values.append(rounds.world.objective(rounds.distribution))
    return values


def test_a_fixed_anchor_with_soft_values_reaches_the_tilted_distribution_after_as_many_rounds_as_tokens() -> None:
    rounds = Rounds("ivo_soft", WORLD, 1 / WORLD.beta)
    objectives(rounds, WORLD.length - 1)
    assert distance(rounds.distribution, WORLD.tilted()) > 1e-4
    rounds.run()
    assert distance(rounds.distribution, WORLD.tilted()) < 1e-9
    assert rounds.values[-1][()] < WORLD.beta * WORLD.log_z()  # the root is a round behind
    rounds.run()
    assert rounds.values[-1] == pytest.approx(WORLD.soft_values(), abs=1e-9)
    decoded = distribution_of(
        lambda choosers: tokens_of(rounds.guided(WORLD.engine(choosers)).generate([PROMPT], WORLD.sampling))
    )
    assert distance(decoded, WORLD.tilted()) < 1e-9


def test_a_fixed_anchor_with_plain_values_ends_at_its_own_fixed_point() -> None:
    rounds = Rounds("ivo", WORLD, 1 / WORLD.beta)
    values = objectives(rounds, WORLD.length)
    before = rounds.distribution
    rounds.run()
    assert distance(rounds.distribution, before) < 1e-9
    assert total_variation(rounds.distribution, WORLD.tilted()) > 0.02
    assert values[0] < values[-1] < WORLD.beta * WORLD.log_z() - 1e-4


def test_a_moving_anchor_goes_to_the_best_string_and_away_from_the_policy() -> None:
    rounds = Rounds("ivo_moving", WORLD, 12.0)
    rewards: list[float] = []
    for _ in range(15):
        rounds.run()
        rewards.append(sum(p * WORLD.reward[y] for y, p in rounds.distribution.items()))
    best = max(WORLD.reward, key=lambda y: WORLD.reward[y])
    assert rewards == sorted(rewards) and rounds.distribution[best] > 1 - 1e-6
    assert kl(rounds.distribution, WORLD.strings) == pytest.approx(-math.log(WORLD.strings[best]), abs=1e-4)


# ---------------------------------------------------------------------------------------------------- several processes


def test_settings_reach_a_program_of_its_own(tmp_path: Path) -> None:
    """Settings given as arguments make the same recipe as settings given as documents."""
    plan = plan_of(write(tmp_path), f"--folder={tmp_path / 'all'}", "--set={sampling: {max_tokens: 7}}")
    for number in (1, 2):
        arguments = as_arguments(plan.settings(number, "values"))
        assert load_recipe(plan.file("values"), arguments).resolved == recipe_of(plan, number, "values").resolved


def test_a_stage_that_fails_stops_the_rounds(tmp_path: Path, capsys) -> None:
    launch = f"--launch={sys.executable} -c 'raise SystemExit(3)'"
    assert main(["iterate", str(write(tmp_path)), f"--folder={tmp_path / 'all'}", launch]) == 2
    message = capsys.readouterr().err
    assert "ended with exit code 3" in message and "-m posttrain train" in message
    assert not (tmp_path / "all" / "rounds.jsonl").exists()


def test_several_processes_are_refused_with_what_to_do(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["iterate", str(write(tmp_path)), f"--folder={tmp_path / 'all'}"]) == 2
    assert "--launch='accelerate launch" in capsys.readouterr().err
