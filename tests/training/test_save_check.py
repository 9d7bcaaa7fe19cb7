"""Loading and saving is tried before the first step: unsaveable models, missing weights, other tokenizers, adapters."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import write_run
from safetensors.torch import load_file, save_file
from tiny_model import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain import load_recipe, train
from posttrain.engines.for_policy import engine_of_length
from posttrain.errors import CannotWrite, RecipeError
from posttrain.models.load import check_tokens, load_model, load_tokenizer
from posttrain.models.policy import Policy, build_policy, save_model
from posttrain.models.value import ValueModel
from posttrain.models.value_files import build_value
from posttrain.recipe.sections import EngineSection, LoraSection, PolicySection, ValueSection
from posttrain.training.save_check import check_saving


@pytest.fixture
def folder(tiny_model_folder, tmp_path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def learner_of(policy: Policy | None, section: PolicySection, value: ValueModel | None = None) -> SimpleNamespace:
    """The attributes of a learner that the check reads."""
    recipe = SimpleNamespace(policy=section, loss=[policy], value_loss=[value] if value else [])
    return SimpleNamespace(
        recipe=recipe, policy=policy, value=value, processes=SimpleNamespace(from_main=lambda make: make())
    )


def test_a_generation_config_that_transformers_does_not_save_is_kept(folder):
    path = folder / "generation_config.json"
    wanted = json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.9, "do_sample": False}
    path.write_text(json.dumps(wanted))
    policy = build_policy(PolicySection(model=str(folder)))
    save_model(policy, AutoTokenizer.from_pretrained(folder), folder.parent / "saved", torch.float32)
    saved = json.loads((folder.parent / "saved" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"]) == (0.6, 0.9)
    AutoModelForCausalLM.from_pretrained(folder.parent / "saved")


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("lora", [None, LoraSection(rank=2)], ids=["full", "lora"])
def test_models_that_can_be_saved_pass(folder, monkeypatch, capsys, small, lora):
    monkeypatch.setattr("posttrain.training.save_check.SMALL", 10**9 if small else 0)
    section = PolicySection(model=str(folder), lora=lora)
    policy = build_policy(section)
    value = build_value(ValueSection(), section, policy)
    check_saving(learner_of(policy, section, value), load_tokenizer(section))  # type: ignore[arg-type]
    assert ("value.model is too large" in capsys.readouterr().out) != small


@pytest.mark.parametrize("small", [True, False])
def test_a_configuration_that_cannot_be_saved_is_found(folder, monkeypatch, small):
    monkeypatch.setattr("posttrain.training.save_check.SMALL", 10**9 if small else 0)
    section = PolicySection(model=str(folder))
    policy = build_policy(section)
    policy.base.config.not_json = {1, 2}  # a set cannot be written to config.json
    with pytest.raises(RecipeError, match=r"policy.model: the trained model could not be saved"):
        check_saving(learner_of(policy, section), load_tokenizer(section))  # type: ignore[arg-type]


def test_a_disk_without_room_is_no_fault_of_the_model(folder):
    section = PolicySection(model=str(folder))
    policy, tokenizer = build_policy(section), load_tokenizer(section)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, usual[1]))
    try:
        with pytest.raises(CannotWrite, match=r"cannot write '.*policy.model': .*File too large"):
            check_saving(learner_of(policy, section), tokenizer)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_model_that_reads_back_differently_is_found(folder):
    section = PolicySection(model=str(folder))
    policy = build_policy(section)
    policy.base.config.rms_norm_eps = 0.5  # the model in memory has another one
    with pytest.raises(RecipeError, match="differs from the trained one"):
        check_saving(learner_of(policy, section), load_tokenizer(section))  # type: ignore[arg-type]


def test_a_run_finds_it_before_the_first_step(folder, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("the tokenizer has no files to save")

    path = write_run(tmp_path / "run", folder, steps=1)
    monkeypatch.setattr("posttrain.training.save_check.save_text_files", refused)
    monkeypatch.setattr("posttrain.models.policy.save_text_files", refused)
    with pytest.raises(RecipeError, match="no files to save"):
        train(load_recipe(path))
    assert not (tmp_path / "run" / "run" / "metrics.jsonl").exists()


def renamed(folder: Path, rename) -> None:
    """Changes the names of the saved weights; None drops one."""
    path = folder / "model.safetensors"
    weights = {rename(name): tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: t for name, t in weights.items() if name}, path, metadata={"format": "pt"})


SPOILT = {
    "prefix": lambda name: f"base_model.model.{name}",
    "one missing": lambda name: None if name.endswith("0.mlp.up_proj.weight") else name,
    "one renamed": lambda name: name.replace("1.self_attn.q_proj", "1.self_attn.query"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_missing_and_unexpected_weights_are_errors(folder, kind):
    renamed(folder, SPOILT[kind])
    section = PolicySection(model=str(folder))
    with pytest.raises(RecipeError, match=r"policy.model: .*are missing \((lm_head|model)"):
        load_model(section, dtype=torch.float32)
    with pytest.raises(RecipeError, match=r"value.model: .*are missing"):
        build_value(ValueSection(model=str(folder)), section)


@pytest.mark.parametrize("kind", SPOILT)
def test_missing_weights_are_errors_before_vllm_starts(folder, kind):
    """vLLM alone starts without the up projection, which it holds in one matrix with the gate."""
    pytest.importorskip("vllm")
    renamed(folder, SPOILT[kind])
    section = PolicySection(model=str(folder))
    with pytest.raises(RecipeError, match=r"policy.model: .*are missing \((lm_head|model)"):
        engine_of_length(section, EngineSection(use="vllm"), 32, tokenizer=load_tokenizer(section), seed=0)


def test_weights_of_other_shapes_are_errors_with_their_names(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(RecipeError, match=r"have another shape \(model.layers.0.mlp.down_proj.weight \[64, 128\]"):
        load_model(PolicySection(model=str(folder)), dtype=torch.float32)


def test_a_classifier_is_no_policy(folder):
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"score.weight.*saved as Qwen2ForSequenceClassification"):
        load_model(PolicySection(model=str(folder)), dtype=torch.float32)


def test_an_untied_output_layer_may_be_missing_for_a_value_model_alone(family_folder, tmp_path):
    folder = Path(shutil.copytree(family_folder("Llama"), tmp_path / "model"))
    renamed(folder, lambda name: None if name == "lm_head.weight" else name)
    section = PolicySection(model=str(folder))
    with pytest.raises(RecipeError, match=r"1 are missing \(lm_head.weight\)"):
        load_model(section, dtype=torch.float32)
    build_value(ValueSection(), section)


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2)], ids=["full", "lora"])
def test_the_folder_of_an_adapter_is_no_model(folder, tmp_path, lora):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "adapter")
    section = PolicySection(model=str(tmp_path / "adapter"), lora=lora)
    for load in (lambda: load_tokenizer(section), lambda: build_policy(section)):
        with pytest.raises(RecipeError, match="is a LoRA adapter of"):
            load()


def test_tokens_without_a_row_in_the_embedding_are_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"'<extra>' \(id 262\).*resize_token_embeddings\(263\)"):
        load_tokenizer(PolicySection(model=str(folder)))


def test_a_reference_with_another_tokenizer_is_refused(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    make_tokenizer(other)
    section = PolicySection(model=str(folder))
    check_tokens(section, str(other), "reference.model", kind="reference")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"A":', '"@@":').replace('"B":', '"A":').replace('"@@":', '"B":'))
    with pytest.raises(RecipeError, match=r"reference.model: .*another tokenizer than the policy: 2 of 262"):
        check_tokens(section, str(other), "reference.model", kind="reference")
    recipe = write_run(tmp_path / "run", folder, steps=1, reference={"model": str(other)}, loss=[{"use": "kl"}])
    with pytest.raises(RecipeError, match="another tokenizer"):
        train(load_recipe(recipe))
