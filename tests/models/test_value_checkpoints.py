"""Value models on disk, and the settings with which a recipe may load them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_values import FAMILIES, shared_pair, stirred
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from posttrain.errors import RecipeError, UserError
from posttrain.models.value import ValueKind, ValueSpec, target_copy
from posttrain.models.value_files import build_value, load_value, save_value
from posttrain.recipe.sections import HeadSection as HeadOptions
from posttrain.recipe.sections import LoraSection, ValueSection
from posttrain.recipe.sections import PolicySection as PolicyOptions

TYPES = ("scalar", "categorical", "quantile", "bernoulli", "per_token")


# -------------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_equal_to_the_bit_after_loading(policy_options, tokenizer, tmp_path, random_batch, kind):
    section = ValueSection(head=HeadOptions(type=kind, bins=5, low=-1, high=1), members=1 if kind == "per_token" else 2)
    value, batch = stirred(build_value(section, policy_options, kind=ValueKind("soft", 0.3))), random_batch(12)
    if kind != "bernoulli":
        value.update_statistics(torch.tensor([1.0, 2.0]))
    save_value(value, tokenizer, tmp_path, step=7)
    loaded = load_value(tmp_path)
    for before, after in zip(value(batch.tokens, batch.states), loaded(batch.tokens, batch.states), strict=True):
        assert after is None if before is None else torch.equal(before, after)
    spec = loaded.spec
    assert (spec.head, spec.kind, spec.beta, spec.step, spec.members) == (section.head, "soft", 0.3, 7, section.members)
    assert (spec.shift, spec.scale) == (value.spec.shift, value.spec.scale) and spec.base == policy_options.model


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_a_saved_value_model(family_folder, tokenizer, tmp_path, random_batch, family):
    options, batch = PolicyOptions(model=str(family_folder(family))), random_batch(13)
    for kind, auto in (("scalar", AutoModelForTokenClassification), ("per_token", AutoModelForCausalLM)):
        value = stirred(build_value(ValueSection(head=HeadOptions(type=kind)), options)).eval()
        save_value(value, tokenizer, tmp_path / kind)
        plain = auto.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
        outputs = plain(input_ids=batch.tokens).logits.detach()
        if kind == "per_token":
            outputs = outputs[:, :-1].gather(-1, batch.tokens[:, 1:, None])
            outputs = torch.nn.functional.pad(outputs, (0, 0, 1, 0))
        values, _ = value(batch.tokens, batch.states)
        torch.testing.assert_close(values, outputs[..., 0].where(batch.states, 0.0), atol=1e-5, rtol=1e-5)
        assert torch.equal(load_value(tmp_path / kind)(batch.tokens, batch.states)[0], values)


PROGRAM = """
import sys, torch
from posttrain.models.value_files import load_value
batch = torch.load(sys.argv[2])
torch.save(load_value(sys.argv[1])(batch["tokens"], batch["states"])[0], sys.argv[3])
"""


@pytest.mark.engine
def test_a_fresh_process_needs_only_the_path(policy_options, tokenizer, tmp_path, random_batch):
    value, batch = stirred(build_value(ValueSection(), policy_options)), random_batch(14)
    save_value(value, tokenizer, tmp_path / "value")
    torch.save({"tokens": batch.tokens, "states": batch.states}, tmp_path / "batch.pt")
    command = [sys.executable, "-c", PROGRAM, *(str(tmp_path / name) for name in ("value", "batch.pt", "values.pt"))]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "values.pt"), value(batch.tokens, batch.states)[0])


@pytest.mark.parametrize("how", ["lora", "share"])
def test_adapters_are_merged_into_the_saved_model(tiny_model_folder, tokenizer, tmp_path, random_batch, how):
    torch.manual_seed(0)
    if how == "share":
        _, value = shared_pair(tiny_model_folder)
    else:
        value = stirred(
            build_value(ValueSection(lora=LoraSection(rank=2)), PolicyOptions(model=str(tiny_model_folder))), std=0.1
        )
    batch = random_batch(15)
    save_value(value, tokenizer, tmp_path)
    loaded = load_value(tmp_path)
    assert loaded.adapter is None
    expected = value(batch.tokens, batch.states)[0]
    torch.testing.assert_close(loaded(batch.tokens, batch.states)[0], expected, atol=1e-5, rtol=1e-4)
    target_copy(value)
    stirred(value, seed=4, std=0.1)  # the model's own adapter is merged, not that of its target
    save_value(value, tokenizer, tmp_path)
    expected = value(batch.tokens, batch.states)[0]
    torch.testing.assert_close(load_value(tmp_path)(batch.tokens, batch.states)[0], expected, atol=1e-4, rtol=1e-4)


def test_training_can_start_from_a_saved_critic(policy_options, tokenizer, tmp_path, random_batch):
    section = ValueSection(head=HeadOptions(type="categorical", bins=5), members=2, reduce="min")
    value, batch = stirred(build_value(section, policy_options, kind=ValueKind("soft", 0.5))), random_batch(16)
    save_value(value, tokenizer, tmp_path)
    expected, _ = value(batch.tokens, batch.states)
    warm = build_value(ValueSection(model=str(tmp_path)), policy_options)
    assert torch.equal(warm(batch.tokens, batch.states)[0], expected)
    assert (warm.spec.kind, warm.spec.beta, warm.spec.reduce, warm.spec.members) == ("soft", 0.5, "min", 2)
    assert all(p.requires_grad for p in warm.parameters())
    frozen = build_value(ValueSection(model=str(tmp_path), frozen=True), policy_options, kind=ValueKind("mean"))
    assert frozen.spec.kind == "soft" and not any(p.requires_grad for p in frozen.parameters())
    changed = build_value(ValueSection(model=str(tmp_path), reduce="max"), policy_options, kind=ValueKind("mean"))
    assert (changed.spec.kind, changed.spec.beta) == ("mean", None)
    assert (changed(batch.tokens, batch.states)[0] >= expected).all()
    adapted = build_value(ValueSection(model=str(tmp_path), lora=LoraSection(rank=2)), policy_options)
    assert torch.equal(adapted(batch.tokens, batch.states)[0], expected)  # adapters start at zero
    assert {n.split(".")[0] for n, p in adapted.named_parameters() if p.requires_grad} == {"backbone", "head"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_is_a_value_model(family_folder, tokenizer, tmp_path, random_batch, family):
    folder, batch = family_folder(family), random_batch(17)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    value = load_value(tmp_path)
    assert value.spec == ValueSpec()
    values, _ = value(batch.tokens, batch.states)
    for row, length in enumerate(batch.length.tolist()):
        if batch.states[row, length - 1]:
            expected = model(batch.tokens[row : row + 1, :length]).logits[0, 0]
            torch.testing.assert_close(values[row, length - 1], expected, atol=1e-5, rtol=1e-5)
    critic = build_value(ValueSection(model=str(tmp_path)), PolicyOptions(model=str(folder))).eval()
    assert torch.equal(critic(batch.tokens, batch.states)[0], values)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_process_model_is_a_value_model(tiny_model_folder, tokenizer, tmp_path, random_batch, labels):
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_folder, num_labels=labels, dtype=torch.float32)
    torch.nn.init.normal_(model.score.bias)
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    batch = random_batch(18)
    logits = model(batch.tokens).logits
    right = logits[..., 0] if labels == 1 else logits.softmax(-1)[..., 1]
    value = load_value(tmp_path)
    assert value.spec.head.type == ("scalar" if labels == 1 else "bernoulli")
    values, _ = value(batch.tokens, batch.states)
    torch.testing.assert_close(values, right.where(batch.states, 0.0), atol=1e-5, rtol=1e-5)


def test_one_label_can_be_read_as_a_probability(tiny_model_folder, tokenizer, tmp_path, random_batch):
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_folder, num_labels=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    section = ValueSection(model=str(tmp_path), head=HeadOptions(type="bernoulli"))
    value, batch = build_value(section, PolicyOptions(model=str(tiny_model_folder))), random_batch(19)
    assert torch.equal(
        value(batch.tokens, batch.states)[0],
        value(batch.tokens, batch.states)[1][..., 0].sigmoid().where(batch.states, 0.0),
    )


# --------------------------------------------------------------------------------------------------------------- errors


def test_folders_that_hold_no_value_model_are_refused(tiny_model_folder, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_value(tmp_path / "absent")
    with pytest.raises(UserError, match="without a value head"):
        load_value(tiny_model_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_value(tmp_path / "empty")
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_folder, num_labels=5)
    model.save_pretrained(tmp_path / "tagger")
    with pytest.raises(UserError, match="has 5 labels"):
        load_value(tmp_path / "tagger")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="has 3 labels"):
        load_value(tmp_path / "classifier")


def test_the_message_names_a_broken_entry(policy_options, tokenizer, tmp_path):
    save_value(build_value(ValueSection(), policy_options), tokenizer, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"posttrain": config["posttrain"] | {"kind": "median"}}))
    with pytest.raises(UserError, match="kind"):
        load_value(tmp_path)
    wider = config["posttrain"] | {"members": 2}
    path.write_text(json.dumps(config | {"posttrain": wider}))
    with pytest.raises(UserError, match="1 outputs.*describes one with 2"):
        load_value(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"head": HeadOptions(type="bernoulli")}, "value.head: .*does not fit"),
        ({"members": 3}, "value.members: 3"),
    ],
)
def test_a_recipe_that_does_not_fit_the_saved_model_is_refused(policy_options, tokenizer, tmp_path, section, message):
    save_value(build_value(ValueSection(members=2), policy_options), tokenizer, tmp_path)
    with pytest.raises(RecipeError, match=message):
        build_value(ValueSection(model=str(tmp_path), **section), policy_options)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"share": True}, "policy.lora"),
        ({"frozen": True}, "without a value head"),
        ({"frozen": True, "lora": LoraSection()}, "leave out `value.lora`"),
        ({"normalise": True, "head": HeadOptions(type="bernoulli")}, "probability"),
        ({"members": 2, "head": HeadOptions(type="per_token")}, "one member"),
        ({"head": HeadOptions(type="categorical", low=1.0, high=0.0)}, "must be below"),
    ],
)
def test_contradictions_are_refused(policy_options, section, message):
    with pytest.raises(RecipeError, match=message):
        build_value(ValueSection(**section), policy_options)


def test_a_soft_value_needs_a_temperature(policy_options):
    with pytest.raises(RecipeError, match="target.beta"):
        build_value(ValueSection(), policy_options, kind=ValueKind("soft"))


def test_a_value_model_of_another_tokenizer_is_refused(policy_options, tmp_path):
    from tiny_model import make_tokenizer

    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert len(tokenizer) <= 261
    save_value(build_value(ValueSection(), policy_options), tokenizer, tmp_path / "value")
    build_value(ValueSection(model=str(tmp_path / "value")), policy_options)
    swapped = (tmp_path / "value" / "tokenizer.json").read_text().replace('"a":', '"swap":').replace('"b":', '"a":')
    (tmp_path / "value" / "tokenizer.json").write_text(swapped.replace('"swap":', '"b":'))
    with pytest.raises(RecipeError, match="another tokenizer"):
        build_value(ValueSection(model=str(tmp_path / "value")), policy_options)
