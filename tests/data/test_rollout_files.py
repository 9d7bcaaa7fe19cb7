"""Files of rollouts: batches come back as they were written, other programs can read them, and paths are found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.batch import Batch
from posttrain.data.rollout_files import find_rollouts, read_rollouts, write_rollouts
from posttrain.errors import DataError


def assert_equal(left: Batch, right: Batch) -> None:
    """Checks that all fields of two batches are equal, NaN included."""
    for field in dataclasses.fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)), field
        elif field.name != "all_sum":
            assert a == b, field


@given(
    seed=st.integers(0, 10_000),
    unfilled=st.sets(
        st.sampled_from(["logp_old", "logp_ref", "entropy", "value", "advantage", "target", "loss_share"]), max_size=7
    ),
)
@settings(max_examples=20, deadline=None)
def test_rollouts_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, seed: int, unfilled: set[str]):
    from random_batch import make_random_batch

    batch = make_random_batch(seed, columns=15).set(step=7, **dict.fromkeys(unfilled))
    batch = batch.set(score=batch.score.index_fill(0, torch.tensor([2]), float("nan")))
    batch = batch[batch.length < 15]  # so that the last columns are padding everywhere
    path = tmp_path_factory.mktemp("rollouts") / "step-000007.parquet"
    write_rollouts(path, batch, [f"prompt {i}" for i in batch.group.tolist()])
    assert_equal(batch.trim(), read_rollouts(path))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_rollouts_are_readable_by_pandas_and_datasets(tmp_path: Path, random_batch):
    from datasets import load_dataset

    batch = random_batch(1, groups=2, size=3).set(step=10)
    row = {"question": "3 + 4 = ?", "answer": "7", "tags": ["sum", {"digits": 1}]}
    batch = batch.set(rows=(row,) * 6, texts=("ответ: 7",) * 6)
    path = tmp_path / "rollouts" / "step-000010.parquet"
    write_rollouts(path, batch, ["3 + 4 = ?"] * 6, {"math": [1.0, 0.0, None, float("nan"), 1.0, 0.5]})

    frame = pandas.read_parquet(path)
    assert frame["verify/math"].isna().tolist() == [False, False, True, True, False, False]
    assert frame["finish"].isin(["stopped", "length"]).all() and (frame["step"] == 10).all()
    assert frame["length"].tolist() == batch.mask.sum(-1).tolist()
    assert [len(tokens) for tokens in frame["tokens"]] == batch.length.tolist()
    assert frame["completion"][0] == "ответ: 7" and json.loads(frame["row"][0]) == row

    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["tokens"][2] == batch.tokens[2, : batch.length[2]].tolist()
    assert read_rollouts(path).rows[5] == row


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        read_rollouts(tmp_path / "step-000001.parquet")
    pandas.DataFrame({"step": [1], "tokens": [[1]]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="column baseline_only, completion, finish"):
        read_rollouts(tmp_path / "other.parquet")


# ------------------------------------------------------------------------------------------------------ finding files


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folder of two runs, each with rollouts of two steps and with files that are not rollouts."""
    for run in ("first", "second"):
        for step in (2, 10):
            path = tmp_path / run / "rollouts" / f"step-{step:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / run / "rollouts" / ".step-000011.parquet.writing").touch()
        (tmp_path / run / "metrics.jsonl").touch()
        (tmp_path / run / "dump").mkdir()
        (tmp_path / run / "dump" / "step-000011.parquet").touch()
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def test_a_file_of_any_name_stands_for_itself(runs: Path):
    file = runs / "kept.parquet"
    file.touch()
    assert find_rollouts("kept.parquet", runs) == find_rollouts(str(file), None) == [file]


def test_a_run_and_its_rollouts_folder_stand_for_the_same_files(runs: Path):
    files = find_rollouts(str(runs / "first"), None)
    assert names(files, runs / "first" / "rollouts") == ["step-000002.parquet", "step-000010.parquet"]
    assert find_rollouts("first/rollouts", runs) == files


def test_a_folder_of_folders_stands_for_all_files_below_it(runs: Path):
    """Batches that broken runs left in ``dump`` are not among them, but that folder may be named itself."""
    files = find_rollouts(str(runs), None)
    assert files == [file for run in ("first", "second") for file in find_rollouts(run, runs)] and len(files) == 4
    assert names(find_rollouts("first/dump", runs), runs) == ["first/dump/step-000011.parquet"]


def test_a_path_without_rollouts_is_refused_with_its_setting(tmp_path: Path):
    with pytest.raises(DataError, match=r"^rollouts: there is no file or folder 'nowhere'$"):
        find_rollouts("nowhere", tmp_path)
    with pytest.raises(DataError, match=r"^data\.path: no rollouts \(step-\*\.parquet\) in .*rollouts_every"):
        find_rollouts(str(tmp_path), None, setting="data.path")
