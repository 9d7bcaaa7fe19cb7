"""Tests of values that a verifier, a group or a stored row cannot take, and of datasets that changed under a run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import check_columns, load_rows
from posttrain.data.examples import rated
from posttrain.data.rollout_files import read_rollouts, write_rollouts
from posttrain.engines.for_policy import LengthBudget
from posttrain.errors import DataError
from posttrain.recipe.part import Part
from posttrain.recipe.sections import DataSection
from posttrain.verify import functions as verifiers
from posttrain.verify.columns import reads
from posttrain.verify.worker import BadValue, as_values


def section(folder: Path, rows: list[Any], **settings: Any) -> DataSection:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(path=str(folder / "rows.jsonl"), **settings)


@reads(answer=int)
def counts(completion: str, *, answer: str) -> float:
    return float(len(completion) == int(answer))


@pytest.mark.parametrize(
    ("verifier", "value", "readable"),
    [
        (verifiers.math, "72", True),
        (verifiers.math, 5e-05, True),
        (verifiers.math, float("nan"), False),
        (verifiers.math, "", False),
        (verifiers.math, ["72", "seventy-two"], False),
        (verifiers.math, {"value": 72}, False),
        (verifiers.math, True, False),
        (verifiers.exact, "72", True),
        (verifiers.exact, 72, True),
        (verifiers.exact, 72.0, False),
        (verifiers.exact, ["72"], False),
        (counts, "12", True),
        (counts, "twelve", False),
        (partial(counts), "twelve", False),
    ],
)
def test_answers_that_a_verifier_cannot_read_are_refused(tokenizer, tmp_path: Path, verifier, value, readable) -> None:
    data = section(tmp_path, [{"prompt": "q", "answer": None}, {"prompt": "q", "answer": value}])
    rows = load_rows(replace(data, limit=None), tokenizer=tokenizer)
    part = Part.of(verifier, settings={"name": "own"})
    with pytest.raises(DataError) as error:
        check_columns(rows, [part])
    unreadable = "rows.jsonl:2: column 'answer': the verifier 'own' cannot read it" in str(error.value)
    assert unreadable is not readable and "rows.jsonl:1" in str(error.value)  # null is refused in the first row


def test_completions_without_a_key_make_no_group(tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "completion": "a", "score": s, "g": None if p == "q2" else p} for p, s in (("q1", 1), ("q2", 0))
    ]
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'g', by which completions are grouped, is missing"):
        rated(section(tmp_path, rows), tokenizer, None, group="g")


def test_equal_completions_with_different_ratings_are_no_pair(tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": c, "score": s} for c, s in (("a", 1), ("a", 0), ("b", 0))]
    examples = rated(section(tmp_path, rows), tokenizer, None, group="prompt", into="pairs")
    assert [examples.batch([i]).texts for i in range(len(examples))] == [("a", "b")]


@pytest.mark.parametrize("scores", [{0: 1.0, 1: 1.0}, {0.0, 1.0}, "01"])
def test_scores_that_are_no_list_are_refused(scores: Any) -> None:
    with pytest.raises(BadValue, match="it must return a list with a number for each completion"):
        as_values(scores, 2)


def test_rows_with_nan_are_stored_as_json(random_batch, tmp_path: Path) -> None:
    import pyarrow.parquet

    batch = random_batch(0)
    row = {"prompt": "q", "x": float("nan"), "y": [{"z": float("inf")}, 1.5]}
    write_rollouts(tmp_path / "r.parquet", batch.set(rows=(row,) * len(batch)), ["q"] * len(batch))
    text = pyarrow.parquet.read_table(tmp_path / "r.parquet")["row"][0].as_py()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse) == {"prompt": "q", "x": None, "y": [{"z": None}, 1.5]}
    assert read_rollouts(tmp_path / "r.parquet").rows[0]["y"][1] == 1.5


def test_the_fingerprint_is_that_of_all_columns(tokenizer, tmp_path: Path) -> None:
    def fingerprint(rows: list[Any], **settings: Any) -> str:
        return load_rows(section(tmp_path, rows, **settings), tokenizer=tokenizer).fingerprint()

    rows = [{"prompt": f"{i}+1", "answer": str(i + 1), "info": {"i": i}} for i in range(3)]
    same = [fingerprint(rows), fingerprint(rows)]
    others = [
        fingerprint([*rows[:2], {**rows[2], "answer": "4"}]),
        fingerprint([*rows[:2], {**rows[2], "info": {}}]),
        fingerprint([rows[1], rows[0], rows[2]]),
        fingerprint(rows, chat=False),
    ]
    assert same[0] == same[1] and len({same[0], *others}) == 5


def test_a_prompt_that_is_too_long_is_named(tokenizer, tmp_path: Path) -> None:
    rows = load_rows(section(tmp_path, [{"prompt": "a"}, {"prompt": "a" * 50}]), tokenizer=tokenizer)
    budget = LengthBudget(rows.longest_prompt, 10, place=rows.longest_place)
    assert "rows.jsonl:2)" in str(budget) and f"({rows.longest_prompt} tokens" in str(budget)
