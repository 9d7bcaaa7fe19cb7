"""Runs over completions from a dataset report what is learned, and not the labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain import load_recipe, load_value
from posttrain.batch import Author, Batch, Outputs
from posttrain.errors import DataError
from posttrain.output.tracking import read_metrics
from posttrain.parts.preference.terms import pointwise
from posttrain.recipe.part import Part
from posttrain.training.display import columns_of
from posttrain.training.loop import train
from posttrain.training.metrics import PolicyMetrics, example_metrics, update_sums
from posttrain.training.ranking import area_under_curve, ranking_by_value
from posttrain.training.setup import load_material

RECIPES = Path(__file__).parents[2] / "recipes"
ALONE: Any = SimpleNamespace(all_sum=lambda tensor: tensor, all_max=lambda number: number, gather=lambda value: [value])
PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "no idea"} for a in range(6)]
RATED = [
    {"prompt": f"{a}+1=", "completion": text, "label": text != "no idea"}
    for a in range(6)
    for text in (str(a + 1), "no idea")
]
DEMONSTRATIONS = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(6)]
STEPWISE = [{"prompt": f"{a}+2=", "completions": [f"{a + 1}", f"{a}"], "labels": [True, False]} for a in range(6)]
LABELS = ("reward/", "accuracy", "score/", "groups/", "policy/entropy")


def run(name: str, rows: list[dict], folder: Path, model: Path, *more: str) -> list[dict]:
    """Trains a recipe of the repository for two steps on the rows, which are the held-out ones too."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = [
        f"--policy.model={model}",
        f"--data={{path: {data}, chat: false}}",
        f"--run.folder={folder / 'run'}",
        "--steps=2",
    ]
    changes += ["--policy.dtype=float32", "--policy.gradient_checkpointing=false", "--prompts_per_step=4"]
    changes += ["--run.trackers=[]", f"--evaluate={{examples: {{path: {data}, chat: false}}}}", *more]
    train(load_recipe(RECIPES / f"{name}.yaml", changes))
    return read_metrics(folder / "run")


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 7, 40):
        score = torch.randint(0, 6, (size,), generator=generator).double()
        positive = torch.arange(size) % 3 == 0
        pairs = [(a > b) + 0.5 * (a == b) for a in score[positive].tolist() for b in score[~positive].tolist()]
        assert area_under_curve(score, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert math.isnan(area_under_curve(torch.ones(3), torch.ones(3, dtype=torch.bool)))
    assert math.isnan(area_under_curve(torch.tensor([1.0, math.nan]), torch.tensor([True, False])))


def test_single_ratings_are_ranked_by_their_label_however_they_are_cut(random_batch) -> None:
    """No pair is there: the margin is a difference of means, and the area under the curve replaces the accuracy."""
    batch: Batch = random_batch(0, groups=8, size=1)
    batch = batch.set(reward=torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0]), logp_ref=torch.zeros_like(batch.logp_sampler))
    outputs = Outputs(logp=batch.logp_sampler)
    found = []
    for cuts in ([list(range(8))], [[0, 2], [1, 4], [3, 5, 6, 7]]):
        measured = PolicyMetrics([Part.of(pointwise)])
        for rows in cuts:
            measured.add_preferences(Outputs(logp=outputs.logp[rows]), batch[rows])
        found.append(measured.reduced(ALONE))
    assert found[0] == pytest.approx(found[1]) and "preference/accuracy" not in found[0]
    implicit = 0.1 * batch.logp_sampler.where(batch.mask, 0.0).sum(-1)
    good, bad = implicit[batch.reward > 0], implicit[batch.reward == 0]
    assert found[0]["preference/margin"] == pytest.approx(float(good.mean() - bad.mean()), rel=1e-5)
    assert found[0]["preference/auc"] == pytest.approx(float((good[:, None] > bad).float().mean()))


def test_only_tokens_that_the_policy_sampled_have_an_entropy(random_batch) -> None:
    batch: Batch = random_batch(0, groups=2, size=2)
    batch = batch.set(author=torch.tensor([Author.POLICY, Author.GIVEN, Author.POLICY, Author.OPPONENT]))
    outputs = Outputs(logp=torch.arange(4.0)[:, None].expand(batch.mask.shape))
    measured = PolicyMetrics([])
    measured.add(update_sums(outputs, batch, batch.by(Author.GIVEN)))
    lengths = batch.mask.sum(-1).tolist()
    means = measured.reduced(ALONE)
    assert means["nll"] == -1
    assert means["policy/entropy"] == pytest.approx(-2.0 * lengths[2] / (lengths[0] + lengths[2]))
    of_dataset = PolicyMetrics([])
    of_dataset.add(update_sums(outputs, batch, torch.ones(4, dtype=torch.bool)))
    assert "policy/entropy" not in of_dataset.reduced(ALONE)


def test_values_rank_the_pairs_of_a_group(random_batch) -> None:
    batch: Batch = random_batch(0, groups=3, size=2)
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    end = batch.mask & (batch.mask.cumsum(-1) == batch.mask.sum(-1, keepdim=True))
    value = torch.tensor([2.0, 1.0, 5.0, 3.0, 4.0, 4.0])[:, None] * end
    batch = batch.set(reward=reward, score=reward, value=value)
    batch = batch.set(target=reward[:, None].expand(end.shape).where(end, math.nan))
    found = ranking_by_value([batch[[0, 1]], batch[[2, 3, 4, 5]]], ALONE)
    assert found["value/pair_accuracy"] == pytest.approx(1.5 / 3)
    assert found["value/margin"] == pytest.approx((1.0 - 2.0 + 0.0) / 3)
    assert found["value/auc"] == pytest.approx(3.5 / 9)  # 2, 3 and 4 against 1, 5 and 4
    not_binary = batch.set(target=batch.target / 2)  # type: ignore[operator]
    assert "value/auc" not in ranking_by_value([not_binary], ALONE)


def test_labels_are_called_labels(random_batch) -> None:
    batch: Batch = random_batch(0, groups=2, size=2)
    score = torch.tensor([1.0, 0.0, 1.0, math.nan])
    found = example_metrics(batch.set(score=score, reward=score), ALONE)
    assert found["label/mean"] == found["label/positive"] == pytest.approx(2 / 3) and found["unlabelled"] == 0.25
    assert not any(name.startswith(LABELS) for name in found)


@pytest.mark.parametrize(
    ("name", "wanted", "unwanted"),
    [
        ("preference/sft", {"nll", "eval/nll", "loss"}, {"reward/mean", "accuracy"}),
        ("preference/kto", {"preference/auc", "preference/margin"}, {"reward/mean", "nll"}),
        (
            "value/bradley_terry",
            {"value/pair_accuracy", "eval/value/loss"},
            {"reward/mean", "value/explained_variance"},
        ),
        ("value/prm", {"value/auc", "value/explained_variance"}, {"accuracy"}),
        ("rl/ppo", {"reward/mean", "accuracy", "value/explained_variance"}, {"value/auc"}),
    ],
)
def test_the_display_shows_what_is_learned(name: str, wanted: set[str], unwanted: set[str]) -> None:
    shown = {column.metric for column in columns_of(load_recipe(RECIPES / f"{name}.yaml"))}
    assert wanted <= shown and not unwanted & shown


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "rows", "learned"),
    [
        ("preference/sft", DEMONSTRATIONS, {"nll"}),
        ("preference/kto", RATED, {"preference/auc", "preference/margin", "preference/chosen_reward"}),
        ("value/prm", STEPWISE, {"value/auc", "value/explained_variance"}),
    ],
)
def test_a_run_reports_what_is_learned(
    name: str, rows: list, learned: set, tmp_path, tiny_model_folder, capsys
) -> None:
    metrics = run(name, rows, tmp_path, tiny_model_folder)
    assert all(learned <= row.keys() for row in metrics[1:])
    assert all(f"eval/{metric}" in row for metric in learned for row in (metrics[0], metrics[2]))
    assert not any(key.startswith(LABELS) for row in metrics for key in row)
    lines = capsys.readouterr().out
    assert "nan" not in lines and "reward" not in lines and "accuracy" not in lines


@pytest.mark.engine
def test_held_out_pairs_measure_the_reward_model_that_is_trained(tmp_path, tiny_model_folder) -> None:
    """Before training, a head of zeros has the loss log 2. Afterwards the figures are those of the saved model."""
    changes = ["--value.optimizer.learning_rate=0.003", "--value_loss=[{use: bradley_terry}]"]
    before, *_, after = run("value/bradley_terry", PAIRS, tmp_path, tiny_model_folder, *changes)
    assert before["eval/value/loss"] == pytest.approx(math.log(2)) and before["eval/value/pair_accuracy"] == 0.5
    assert after["eval/value/loss"] < before["eval/value/loss"] and "eval/nll" not in after
    model, tokenizer = load_value(tmp_path / "run" / "value"), _tokenizer(tiny_model_folder)
    margins = []
    for row in PAIRS:
        ends = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id]
            states = torch.arange(len(ids))[None] == len(ids) - 1
            ends.append(float(model(torch.tensor([ids]), states)[0].detach().sum()))
        margins.append(ends[0] - ends[1])
    losses = torch.nn.functional.softplus(-torch.tensor(margins))
    assert after["eval/value/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert after["eval/value/margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert after["eval/value/pair_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


@pytest.mark.parametrize(
    ("name", "section", "rows"),
    [("preference/dpo", "examples", PAIRS), ("rl/grpo", "data", [{"prompt": "1", "answer": "1"}])],
)
def test_a_held_out_dataset_is_named_by_its_own_key(name, section, rows, tmp_path, tiny_model_folder) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = [f"--policy.model={tiny_model_folder}", f"--data={{path: {data}}}"]
    changes += [f"--evaluate={{{section}: {{path: nowhere.jsonl}}}}"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", changes)
    with pytest.raises(DataError, match=rf"^evaluate\.{section}\.path: there is no file 'nowhere.jsonl'"):
        load_material(recipe, _tokenizer(tiny_model_folder))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
