"""Tests of datasets for a policy: tokens beyond its embedding, which tokenizer and data may hold all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from posttrain.batch import Finish
from posttrain.data import examples
from posttrain.data.for_policy import load_prompts, refuse_ids_without_weights
from posttrain.data.rollout_files import write_rollouts
from posttrain.engines.base import Completion
from posttrain.errors import DataError
from posttrain.models.load import load_tokenizer
from posttrain.models.text import written_text
from posttrain.recipe.sections import DataSection, PolicySection
from posttrain.rollout.rollouts import Prompts, to_batch

ROWS = [{"prompt": "How many?", "completion": "72"}, {"prompt": "What is on <image>?", "completion": "A <image>"}]


@pytest.fixture
def policy(tmp_path: Path, tiny_model_folder: Path) -> PolicySection:
    """The tiny model of 261 rows with a larger tokenizer, the last of which is special."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return PolicySection(model=str(tmp_path / "model"))


def test_prompts_and_completions_with_a_token_without_weights_are_refused(policy, tmp_path: Path) -> None:
    tokenizer, data = load_tokenizer(policy), DataSection(path="rows.jsonl")
    problem = (
        r"rows.jsonl:2: has the token '<image>' \(id 262\), for which '.*model' has no weights: its embedding has "
        r"261 rows. Take the token out of the row.*`model.resize_token_embeddings\(263\)`"
    )
    with pytest.raises(DataError, match=problem):
        load_prompts(data, policy, [], tokenizer=tokenizer, base=tmp_path)
    with pytest.raises(DataError, match=problem):
        refuse_ids_without_weights(examples.demonstrations(data, tokenizer, tmp_path), policy, tokenizer)
    good = DataSection(path="rows.jsonl", limit=1)
    assert len(load_prompts(good, policy, [], tokenizer=tokenizer, base=tmp_path)) == 1
    refuse_ids_without_weights(examples.demonstrations(good, tokenizer, tmp_path), policy, tokenizer)


def test_rollouts_with_ids_that_have_no_text_are_read_again(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Policies with a padded vocabulary sample ids beyond their tokenizer."""
    policy = PolicySection(model=str(tiny_model_folder))
    tokenizer = load_tokenizer(policy)
    ids = [*tokenizer("72")["input_ids"], 300, tokenizer.eos_token_id]
    text = written_text(tokenizer)(ids)
    assert text == "72<|id 300|>"
    prompts = Prompts(tokens=[[5]], rows=[{"prompt": "p"}], places=["x"], group=[0], seeds=[0])
    batch = to_batch(prompts, [[Completion(ids, [0.0] * len(ids), Finish.STOPPED, 0)]], {(0, 0): text})
    batch = batch.set(score=torch.ones(1), reward=torch.ones(1))
    write_rollouts(tmp_path / "rollouts" / "step-000001.parquet", batch, ["p"])
    stored = examples.rollouts(DataSection(path=str(tmp_path)), tokenizer, None)
    assert stored.batch([0]).texts == (text,)
    with pytest.raises(DataError, match=r"step-000001.parquet, row 1: has the token '<\|id 300\|>' .*261 rows"):
        refuse_ids_without_weights(stored, policy, tokenizer)


def test_texts_of_a_dataset_are_those_that_verifiers_read(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = load_tokenizer(PolicySection(model=str(tiny_model_folder)))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completion": "a<|user|>b"}) + "\n")
    loaded = examples.demonstrations(DataSection(path="rows.jsonl"), tokenizer, tmp_path)
    assert loaded.batch([0]).texts == ("a<|user|>b",)
