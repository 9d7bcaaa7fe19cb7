"""Tests of step labels in a world in which every state's chance of a right answer is known."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular_engine import TabularEngine

from posttrain.batch import Finish
from posttrain.commands.label import run_labels
from posttrain.data import examples
from posttrain.data.rollout_files import write_rollouts
from posttrain.data.steps import cut
from posttrain.engines.base import Completion, Sampling
from posttrain.errors import DataError, RecipeError
from posttrain.models.load import load_tokenizer
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.rollout.collect import CompletionSource
from posttrain.rollout.rollouts import Prompts, single_turn, to_batch
from posttrain.rollout.step_labels import Solution, StepLabels, binary_search, find_solutions, make_step_labels, to_row
from posttrain.system.files import read_rows, write_rows
from posttrain.verify import VerifierPool
from posttrain.verify.functions import exact

ZERO, ONE, LINE, END, PROMPT = range(5)
RIGHT = 0.7  # chance that a step is right, whatever came before
STEPS = 4
SAMPLING = Sampling(max_tokens=2 * STEPS)
STORED = ("data: {path: problems.jsonl}", "rollouts: stored")


def decode(ids) -> str:
    return "".join("01\n"[i] for i in ids if i < END)


def engine() -> TabularEngine:
    """An engine that writes STEPS digits, a line each; a digit is 1 with probability RIGHT."""
    table = {}
    digit = [math.log(1 - RIGHT), math.log(RIGHT), -1e9, -1e9, -1e9]
    for count in range(STEPS):
        for digits in product((ZERO, ONE), repeat=count):
            start = [PROMPT, *(token for d in digits for token in (d, LINE))]
            table[tuple(start)] = digit
            for last in (ZERO, ONE):
                after = END if count == STEPS - 1 else LINE
                table[(*start, last)] = [0.0 if token == after else -1e9 for token in range(5)]
    return TabularEngine(table, eos=[END], max_model_len=64)


def solutions(*digits: str):
    """A batch of solutions with their scores: right if all digits are 1."""
    ids = [[token for d in word for token in (int(d), LINE)][:-1] + [END] for word in digits]
    row = {"prompt": "p", "answer": "\n".join("1" * STEPS)}
    n = len(digits)
    prompts = Prompts(tokens=[[PROMPT]] * n, rows=[row] * n, places=["x"] * n, group=range(n), seeds=range(n))
    completions = [[Completion(tokens, [0.0] * len(tokens), Finish.STOPPED, 0)] for tokens in ids]
    batch = to_batch(prompts, completions, {(i, 0): decode(tokens) for i, tokens in enumerate(ids)})
    score = torch.tensor([float(word == "1" * STEPS) for word in digits])
    return batch.set(score=score, reward=score)


def label(batch, **chosen):
    with VerifierPool([Part.of(exact)]) as pool:
        source = CompletionSource(engine=engine(), verifiers=pool, rollout=Part.of(single_turn), decode=decode)
        return make_step_labels(source, batch, StepLabels(**chosen), SAMPLING, seed=3)


def test_soft_labels_are_the_chance_of_a_right_answer():
    k = 150
    labelled = label(solutions("1111", "1101"), estimate="soft", completions=k)
    for solution, right_so_far in ((labelled[0], 4), (labelled[1], 2)):
        assert solution.branches == [k, k, k, 1]
        for step in range(STEPS - 1):
            chance = RIGHT ** (STEPS - step - 1) if step < right_so_far else 0.0
            error = math.sqrt(chance * (1 - chance) / k)
            assert solution.labels[step] == pytest.approx(chance, abs=4.5 * error + 1e-12)
        assert solution.labels[-1] == (1.0 if right_so_far == STEPS else 0.0)
        assert solution.estimates == solution.labels


def test_hard_labels_are_1_up_to_the_first_wrong_step():
    labelled = label(solutions("1111", "1101", "0111", "1110"), completions=40)
    assert [each.labels for each in labelled] == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert labelled[0].estimates[0] == pytest.approx(RIGHT**3, abs=0.35) and labelled[0].estimates[0] < 1


def test_binary_search_finds_the_same_with_fewer_branches():
    batch = solutions("1111", "1101", "0111", "1110", "1011")
    each_step, searched = label(batch, completions=40), label(batch, completions=40, method="binary_search")
    assert [a.labels for a in searched] == [b.labels for b in each_step]
    visited = [sum(count > 0 for count in each.branches[:-1]) for each in searched]
    assert visited == [0, 2, 2, 2, 2]  # log2 of 4 steps, and none for the right solution
    soft = label(batch, completions=40, method="binary_search", estimate="soft")
    for solution, hard in zip(soft, searched, strict=True):
        assert [label is not None for label in solution.labels] == [count > 0 for count in solution.branches]
        assert solution.labels == hard.estimates


@given(first_wrong=st.integers(0, 40), extra=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_search_of_any_length_takes_log2_rounds(first_wrong: int, extra: int):
    steps = first_wrong + extra
    solution = Solution([9], list(range(steps)), list(range(1, steps + 1)), ["s"] * steps, {}, 0.0, 1)
    rounds = []

    def oracle(points):
        rounds.append(len(points))
        return torch.tensor([[float(len(point.chosen) <= first_wrong)] for point in points])

    (labelled,) = binary_search([solution], oracle, StepLabels(method="binary_search", completions=1))
    assert labelled.labels == [1.0] * first_wrong + [0.0] * extra
    assert len(rounds) <= math.ceil(math.log2(steps)) if steps > 1 else not rounds


def test_unfinished_and_unscored_completions_are_left_out():
    batch = solutions("1111", "1101", "0111")
    batch = batch.set(finish=torch.tensor([1, 0, 0]), score=torch.tensor([1.0, 0.0, math.nan]))
    assert [each.score for each in find_solutions(batch, decode, "\n")] == [0.0]


def test_step_cannot_be_branched_after_several_turns():
    batch = solutions("1111")
    batch = batch.set(mask=batch.mask & (torch.arange(batch.mask.shape[1]) != 3))
    with pytest.raises(DataError, match="several turns"):
        find_solutions(batch, decode, "\n")


@pytest.mark.parametrize("text", ["a", "a\nb", "a\n\nb\nc", "a\nb\n", "\n\na\nb\n\n\nc\n\n", "\n"])
def test_steps_joined_are_the_text(text: str):
    count = max(1, len([piece for piece in text.split("\n") if piece]))
    steps = cut(text, "\n", count)
    assert "\n".join(steps) == text and len(steps) == count


def test_steps_lie_where_their_tokens_do():
    batch = solutions("1101")
    (solution,) = find_solutions(batch, decode, "\n")
    assert solution.ends == [2, 4, 6, 8]
    assert solution.steps == ["1", "1", "0", "1"]
    assert decode(solution.prefix(2).chosen) == "1\n1\n" and solution.prefix(2).prompt == [PROMPT]
    assert solution.prefix(1).seed != solution.prefix(2).seed


@pytest.mark.engine
def test_labels_from_a_file_to_examples(tmp_path: Path, tiny_model_folder: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "problems.jsonl", [{"prompt": f"{i}", "answer": "no", "level": i} for i in range(4)])
    (tmp_path / "labels.yaml").write_text(
        f"policy: {{model: {tiny_model_folder}}}\ndata: {{path: problems.jsonl}}\n"
        f"verify: [{{use: {__file__}:has_an_e}}]\nsampling: {{max_tokens: 24}}\nengine: {{use: transformers}}\n"
        "completions: 6\nlabel: {separator: ' ', completions: 2}\noutput: labels/steps.jsonl\n"
    )
    path = run_labels("labels.yaml", ["--label.estimate=soft"])
    rows = read_rows(path)
    assert f"{len(rows)} of 24 completions labelled" in capsys.readouterr().out
    tokenizer = load_tokenizer(sections.PolicySection(model=str(tiny_model_folder)))
    stepwise = examples.stepwise(sections.DataSection(path=str(path)), tokenizer, None, separator=" ")
    batch = stepwise.batch(range(len(stepwise)))
    for i, row in enumerate(rows):
        assert len(row["completions"]) == len(row["labels"]) == len(row["estimates"]) == len(row["branches"])
        assert row["level"] in range(4) and row["reward"] in (0.0, 1.0)
        assert batch.texts[i] == " ".join(row["completions"])
        assert batch.reward[i] == row["reward"] == row["labels"][-1]
    scored = batch.set(score=batch.reward, logp_sampler=torch.zeros(batch.mask.shape))
    write_rollouts(tmp_path / "stored" / "step-000001.parquet", scored, [""] * len(batch))
    (tmp_path / "again.yaml").write_text((tmp_path / "labels.yaml").read_text().replace(*STORED))
    again = run_labels("again.yaml", ["--output=again.jsonl"])
    assert [row["completions"] for row in read_rows(again)] == [row["completions"] for row in rows]


def has_an_e(completion: str) -> float:
    """A verifier: 1 if the completion contains the letter e, else 0."""
    return float("e" in completion)


def test_rows_hold_the_dataset_s_columns(tmp_path: Path):
    labelled = label(solutions("1101"), completions=20)
    write_rows(tmp_path / "deep" / "rows.jsonl", map(to_row, labelled))
    (row,) = read_rows(tmp_path / "deep" / "rows.jsonl")
    assert row["prompt"] == "p" and row["answer"] == "1\n1\n1\n1"
    assert row["completions"] == ["1", "1", "0", "1"] and row["labels"] == [1.0, 1.0, 0.0, 0.0]
    assert row["branches"] == [20, 20, 20, 1] and row["reward"] == 0.0


def test_label_recipe_says_what_is_missing(tmp_path: Path):
    recipe = tmp_path / "labels.yaml"
    recipe.write_text("policy: {model: x}\nverify: [{use: math}]\nsampling: {temperature: 0}\n")
    with pytest.raises(RecipeError, match="which completions to label") as error:
        run_labels(recipe)
    assert "labels.yaml:3:" in str(error.value) and "all branches of a step are equal" in str(error.value)
