"""The recipes on a real pretrained model, and the pure functions of their benchmark. Nothing is downloaded."""

from __future__ import annotations

import math
import random
import runpy
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

from posttrain.decoding.recipe import DecodeRecipe
from posttrain.errors import UserError
from posttrain.recipe.loading import load_as
from posttrain.reports.value_suite import ValueSuite
from posttrain.serving.recipe import ServeRecipe
from posttrain.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "real"
FILES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import real_model
        import real_start

        yield {**vars(real_start), **vars(real_model)}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_each_recipe_is_a_part_of_the_benchmark_that_loads_at_both_sizes(benchmark):
    tasks = benchmark["TASKS"]
    assert sorted(tasks) == FILES
    for name, task in tasks.items():
        for overrides in ((), task.small):
            path = RECIPES / f"{name}.yaml"
            kinds = {"train": Recipe, "decode": DecodeRecipe, "evaluate": ValueSuite, "serve": ServeRecipe}
            load_as(kinds[task.kind], path, overrides)


def test_only_the_right_sum_at_the_end_of_a_finished_answer_counts():
    right_sum = runpy.run_path(str(RECIPES / "sums.py"))["right_sum"]
    assert right_sum("31 + 39 = 70.", answer="70") == 1
    assert right_sum("31 + 39", answer="70") == 0
    assert right_sum("70 is 31 + 39", answer="70") == 0
    assert right_sum("The sum is 70", answer="70", finish="length") == 0
    assert right_sum("", answer="70") == 0


def test_held_out_additions_are_not_trained_on(benchmark):
    training, held_out = benchmark["additions"](4000, seed=0)
    assert (len(training), len(held_out)) == (4000, 512)
    asked = [{row["prompt"][-1]["content"] for row in rows} for rows in (training, held_out)]
    assert not asked[0] & asked[1]
    a, b = training[0]["prompt"][-1]["content"].removesuffix(" =").split(" + ")
    assert training[0]["answer"] == str(int(a) + int(b))
    (answer,) = benchmark["demonstration"](training[0])["completion"]
    assert answer == {"role": "assistant", "content": f"{a} + {b} = {int(a) + int(b)}"}


def test_errors_of_shares_and_areas_are_those_of_repeated_draws(benchmark):
    """1,000 draws of 60 right and 40 wrong scores; Hanley and McNeil's formula is for exponential scores."""
    generator = random.Random(0)
    areas = []
    for _ in range(1000):
        right = [generator.expovariate(0.5) for _ in range(60)]
        wrong = [generator.expovariate(1.0) for _ in range(40)]
        areas.append(sum(a > b for a in right for b in wrong) / 2400)
    assert benchmark["area_error"](fmean(areas), 60, 40) == pytest.approx(stdev(areas), rel=0.1)
    rows = [{"label": True}] * 60 + [{"label": False}] * 40
    assert benchmark["standard_error"]("eval/value/auc", 0.7, rows) == benchmark["area_error"](0.7, 60, 40)
    assert benchmark["standard_error"]("eval/accuracy", 0.5, rows) == pytest.approx(0.05)
    assert benchmark["standard_error"]("eval/accuracy", 0.5, []) is None


def test_a_pair_is_a_right_and_a_wrong_solution_of_one_problem(benchmark):
    written = [("wrong", False), ("right", True), ("right", True), ("right too", True)]
    problem = {
        name: {"solution": text, "is_correct": label}
        for name, (text, label) in zip(benchmark["WRITERS"], written, strict=True)
    } | {"question": "How many?"}
    (pair,) = benchmark["pairs"](problem)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("right", "wrong")
    assert [row["label"] for row in benchmark["solutions"](problem)] == [False, True, True]
    right = {name: {"solution": "right", "is_correct": True} for name in benchmark["WRITERS"]}
    assert benchmark["pairs"]({**right, "question": "How many?"}) == []


def test_before_and_after_are_the_first_and_the_last_evaluation(benchmark):
    rows = [{"eval/accuracy": 0.1}, {"loss": 1.0}, {"eval/accuracy": None}, {"eval/accuracy": 0.5}]
    assert benchmark["before_and_after"](rows, "eval/accuracy") == {"before": 0.1, "after": 0.5}
    with pytest.raises(UserError, match="reports no eval/score"):
        benchmark["before_and_after"](rows, "eval/score")
    assert math.isclose(benchmark["proportion_error"](0.5, 100), 0.05)


def test_a_part_says_which_other_part_it_needs(benchmark, tmp_path):
    assert benchmark["missing"](["critic", "ppo"], tmp_path) == []
    assert benchmark["missing"](["ppo"], tmp_path) == ["ppo needs the part critic: add it to --parts"]
    (tmp_path / "runs" / "real" / "critic" / "value").mkdir(parents=True)
    assert benchmark["missing"](["ppo"], tmp_path) == []


def test_a_command_that_fails_is_told_with_its_last_words(benchmark, tmp_path):
    with pytest.raises(UserError, match="ended with 3:\nno such model"):
        benchmark["run"]([sys.executable, "-c", "print('no such model'); exit(3)"], tmp_path, tmp_path / "log")
    large = "import time; x = b'1' * 80_000_000; time.sleep(0.3)"
    cost = benchmark["run"]([sys.executable, "-c", large], tmp_path, tmp_path / "log")
    assert cost["seconds"] > 0.3 and 76 < cost["peak_memory_mb"] < 150  # its own, not that of these tests
