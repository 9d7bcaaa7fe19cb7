"""Tests of the quickstart: problems, tokenizer, model and files; the warm-up; a short run of its recipe."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import load_recipe
from posttrain.errors import UserError
from posttrain.models.policy import Policy
from posttrain.quickstart.__main__ import clear, find_recipe, start_folder
from posttrain.quickstart.imitation import Example, fit, negative_log_likelihood, shuffled_batches, to_tensors
from posttrain.quickstart.model import make_model, make_tokenizer
from posttrain.quickstart.problems import Problem, draw, estimated, worked_out
from posttrain.quickstart.start import SHARE_WORKED_OUT, Start, prompt_ids, write_problems
from posttrain.recipe.sections import OptimizerSection
from posttrain.system.files import read_rows
from posttrain.verify.mathematics import math

TOKENIZER = make_tokenizer()
problems = st.builds(Problem, st.integers(100, 999), st.integers(100, 999))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Problem files and an untrained model."""
    files = Start(tmp_path_factory.mktemp("quickstart-start"))
    write_problems(files, seed=0, shown=1000)
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(files.model)
    tokenizer.save_pretrained(files.model)
    return files


@given(problems)
def test_worked_out_columns_add_up_to_the_answer(problem: Problem):
    *lines, last = worked_out(problem).split("\n")
    carry, digits = 0, ""
    for line in lines:
        a, b, carried, total = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", line).groups())
        assert carried == carry and a + b + carried == total
        carry, digits = total // 10, f"{total % 10}{digits}"
    assert int(f"{carry}{digits}") == problem.a + problem.b
    assert last == f"\\boxed{{{problem.answer}}}"


@given(problems)
def test_verifier_takes_worked_out_sums_for_right(problem: Problem):
    assert math(worked_out(problem), answer=problem.answer) == 1
    assert math(worked_out(problem), answer=str(int(problem.answer) + 1)) == 0


def test_estimates_are_rounded_and_nearly_always_wrong():
    assert estimated(Problem(614, 950)) == "\\boxed{1600}"
    right = [math(estimated(problem), answer=problem.answer) for problem in draw(2000, random.Random(0))]
    assert 0 < sum(right) / 2000 < 0.03


def test_draw_repeats_no_sum_in_either_order():
    drawn = draw(5000, random.Random(0))
    assert len({frozenset(problem) for problem in drawn}) == 5000
    assert any(problem.a > problem.b for problem in drawn) and any(problem.a < problem.b for problem in drawn)


def test_files_are_disjoint_and_half_of_the_demonstrations_show_steps(start: Start):
    files = [read_rows(path) for path in (start.demonstrations, start.train, start.held_out)]
    seen = [frozenset(row["prompt"].removesuffix("=?").split("+")) for rows in files for row in rows]
    assert len(seen) == len(set(seen))
    assert len(files[2]) >= 200
    with_steps = sum("\n" in row["completion"] for row in files[0])
    assert with_steps == pytest.approx(SHARE_WORKED_OUT * len(files[0]), abs=80)  # five standard deviations


def test_files_repeat_by_seed(start: Start, tmp_path: Path):
    for seed, same in ((0, True), (1, False)):
        write_problems(other := Start(tmp_path), seed=seed, shown=1000)
        assert (other.held_out.read_text() == start.held_out.read_text()) is same


@given(st.text())
def test_tokenizer_round_trips_every_text(text: str):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and max(ids, default=0) < len(TOKENIZER)


def test_saved_tokenizer_keeps_boxed_as_one_token_and_the_chat_template(start: Start):
    tokenizer = AutoTokenizer.from_pretrained(start.model)
    assert len(tokenizer.encode("\\boxed{12}")) == 4
    assert tokenizer.decode(tokenizer.encode("\\boxed{12}"), skip_special_tokens=True) == "\\boxed{12}"
    assert tokenizer.decode(prompt_ids(tokenizer, "1+2=?")) == "<|user|>1+2=?<|end|><|assistant|>"


def test_saved_model_loads_as_it_was(start: Start):
    loaded = AutoModelForCausalLM.from_pretrained(start.model)
    original = make_model(TOKENIZER, seed=0)
    assert 0.5e6 < loaded.num_parameters() < 1.5e6
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded(tokens).logits, original(tokens).logits, rtol=0, atol=0)


def test_fresh_start_removes_only_what_a_quickstart_made(tmp_path: Path):
    earlier = tmp_path / "earlier"
    for path in (earlier, start_folder(earlier)):
        path.mkdir()
    Start(start_folder(earlier)).demonstrations.touch()
    clear(earlier)
    assert not earlier.exists() and not start_folder(earlier).exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(UserError, match="not from a quickstart"):
        clear(foreign)
    assert (foreign / "thesis.txt").exists()


# ---------------------------------------------------------------------------------------------------------- imitation


EXAMPLES = [Example([4, 5, 6], [7, 8, 1]), Example([4], [9, 1]), Example([5, 5], [6, 7, 8, 9, 1])]


def test_the_mask_is_on_the_completions_only():
    tokens, mask = to_tensors(EXAMPLES[:2])
    assert tokens.tolist() == [[4, 5, 6, 7, 8, 1], [4, 9, 1, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]


def test_negative_log_likelihood_is_that_of_transformers():
    model = make_model(TOKENIZER, seed=1)
    tokens, mask = to_tensors(EXAMPLES)
    expected = model(tokens, labels=tokens.where(mask, -100)).loss
    torch.testing.assert_close(negative_log_likelihood(Policy(model), tokens, mask), expected, rtol=1e-6, atol=1e-6)


def test_fit_learns_its_examples_and_repeats_by_seed():
    curves = []
    for _ in range(2):
        model, losses = make_model(TOKENIZER, seed=2), []
        fit(
            Policy(model),
            EXAMPLES,
            steps=30,
            batch_size=2,
            optimizer=OptimizerSection(learning_rate=5e-3, betas=(0.9, 0.98), warmup_steps=5),
            on_step=lambda step, metrics, losses=losses: losses.append(metrics["loss"]),
        )
        curves.append(losses)
    assert curves[0] == curves[1] and len(curves[0]) == 30
    assert curves[0][0] > 4 and curves[0][-1] < 0.5


def test_every_row_comes_once_before_any_comes_again():
    rows = [row for batch in shuffled_batches(size=7, batch_size=3, steps=7, seed=0) for row in batch]
    assert all(sorted(rows[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert rows[:7] != rows[7:14]
    with pytest.raises(ValueError, match="no examples"):
        next(shuffled_batches(size=0, batch_size=3, steps=1, seed=0))


# ------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_recipe_runs_two_steps_from_the_start_it_was_given(start: Start, tmp_path: Path, engine: str):
    from posttrain.quickstart.story import answers, compare
    from posttrain.training.loop import train

    if engine == "vllm":
        pytest.importorskip("vllm")
    folder = tmp_path / "run"
    overrides = [f"--policy.model={start.model}", f"--data.path={start.train}", f"--engine.use={engine}"]
    overrides += [f"--evaluate.data.path={start.held_out}", "--evaluate.data.limit=8", f"--run.folder={folder}"]
    overrides += ["--steps=2", "--prompts_per_step=4", "--completions=4"]
    assert train(load_recipe(find_recipe(), overrides)) == folder / "model"
    before, after = compare(start, folder, seed=0)
    assert (before, after) == (0, 0)  # the model is random
    assert len(answers(folder / "model", ["123+456=?"])) == 1
