"""The estimate of a run's memory: its arithmetic, what it measures, the setting that it names, and a real run."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import nullcontext

import pytest
import torch
from runs import command, write_run

from posttrain import load_recipe
from posttrain.models.activations import Activations, measure_activations
from posttrain.models.policy import build_policy
from posttrain.recipe.sections import LoraSection, PolicySection
from posttrain.training.memory import MemoryFacts, best_remedy, items, memory_line, shortage, total

FULL = MemoryFacts(
    weights=4e9,
    trained=10**9,
    rows=8,
    columns=1000,
    activations=(Activations(fixed=0, per_token=250_000, per_pair=0, layers=10, per_token_between=4000),),
    copies={"reference": 4e9},
    adapter_parameters=10**7,
    copies_without_adapters=("reference",),
)
"""A billion float32 parameters, a reference, and 8,000 tokens that keep 2 GB."""


def test_weights_gradients_and_states_are_exact():
    sizes = {item.name: item.size for item in items(FULL)}
    assert sizes == {
        "optimiser states": 8e9,  # two averages
        "weights": 4e9,
        "gradients": 4e9,
        "reference": 4e9,
        "activations": pytest.approx(2.2e9),  # 2 GB, and one of ten layers in the backward pass
    }
    assert total(FULL) == pytest.approx(22.2e9)
    sharded = {item.name: item.size for item in items(dataclasses.replace(FULL, world=4, sharded=True))}
    assert (sharded["optimiser states"], sharded["gradients"]) == (3e9, 1e9)
    ranks = {item.name: item.size for item in items(dataclasses.replace(FULL, world=2))}
    assert ranks["gradients"] == 8e9  # with the buckets of the sum


def test_checkpointing_keeps_hidden_states_and_one_layer():
    kept = FULL.activations[0].kept(8, 1000, checkpointing=True)
    assert kept == pytest.approx(8000 * 4000 * 10 + 1.25 * 0.2e9)
    quadratic = Activations(fixed=7, per_token=10, per_pair=2, layers=1, per_token_between=1)
    assert quadratic.kept(3, 100) == 7 + 2 * 3 * (100 * 10 + 100**2 * 2)


def test_the_sampling_cache_counts_where_it_exceeds_the_update():
    assert total(dataclasses.replace(FULL, sampling=5e9)) == total(FULL)  # gradients and activations take 6.2
    assert total(dataclasses.replace(FULL, sampling=8e9)) == pytest.approx(24e9)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({}, "policy.lora: {}"),  # 4 of gradients, 8 of states, 4 of the reference
        ({"adapter_parameters": 0, "rows": 32}, "policy.gradient_checkpointing: true"),
        ({"adapter_parameters": 0, "rows": 99, "checkpointing": True}, "micro_batch_tokens: 49000"),
        (
            {"trained": 10**6, "rows": 1, "adapter_parameters": 0, "frozen_float32": 4e9, "policy_float32": True},
            "policy.dtype: bfloat16",
        ),
        ({"engine_cache": 60e9, "engine_setting": ("engine.cache_mb: 30000", 30e9)}, "engine.cache_mb: 30000"),
        ({"sampling": 99e9, "engine_setting": ("engine.max_concurrent: 8", 50e9)}, "engine.max_concurrent: 8"),
        ({"engine_weights": 80e9, "engine_float32": True}, "engine.dtype: bfloat16"),
    ],
)
def test_the_setting_that_lowers_it_most_is_named_with_the_new_total(changes, setting):
    facts = dataclasses.replace(FULL, **changes)
    remedy = best_remedy(facts)
    assert remedy is not None and remedy.setting == setting
    assert remedy.total < 0.95 * total(facts)


def test_a_setting_that_changes_little_is_not_named():
    bare = MemoryFacts(weights=1e9, trained=0, rows=1, columns=8, program=1e9)
    assert best_remedy(bare) is None
    assert memory_line(bare) == "memory: about 2 GB (program 1, weights 1)"


def test_the_line_names_the_largest_first_and_the_remedy():
    assert memory_line(FULL) == (
        "memory: about 22 GB (optimiser states 8, weights 4, gradients 4, reference 4, activations 2.2); "
        "policy.lora: {} would make it about 6.4 GB"
    )


def test_a_machine_with_less_is_a_warning_with_the_remedy():
    warning = shortage(FULL, 16e9)
    assert warning is not None and "about 16 GB here" in warning and "set policy.lora: {}" in warning
    assert shortage(FULL, 30e9) is None
    assert shortage(FULL, None) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [None, LoraSection(rank=4)], ids=["full", "lora"])
def test_measured_activations_predict_those_of_longer_rows(tiny_model_folder, attention, lora):
    policy = build_policy(PolicySection(model=str(tiny_model_folder), attention=attention, lora=lora))
    policy.train()
    measured = measure_activations(policy, policy.hidden_states, policy.base.config, nullcontext)
    assert policy.base.training  # the mode is as before
    assert (measured.per_pair > 0) == (attention == "eager")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.hidden_states(torch.full((3, 300), 7))
    direct = sum(memory.nbytes() for address, memory in kept.items() if address not in own)
    of_layer = (measured.kept(3, 300) - measured.fixed) * measured.layers / (measured.layers + 1) / measured.layers
    assert measured.kept(3, 300) - of_layer == pytest.approx(direct, rel=0.05)


def sizes_of(line: str) -> dict[str, float]:
    """The sizes in the line of a run, in GB, with that of the whole as ``total``."""
    parts = re.search(r"memory: about ([\d.]+) GB \((.*?)\)", line)
    assert parts is not None, line
    named = (part.rsplit(" ", 1) for part in parts[2].split(", "))
    return {"total": float(parts[1])} | {name: float(size) for name, size in named}


@pytest.mark.engine
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_estimate_of_a_run_is_near_its_peak(tiny_model_folder, tmp_path, checkpointing):
    rows = [{"prompt": f"{i} is", "completion": " a number" * 55} for i in range(96)]
    policy = {"model": str(tiny_model_folder), "gradient_checkpointing": checkpointing}
    path = write_run(
        tmp_path,
        tiny_model_folder,
        policy=policy,
        examples={"use": "demonstrations", "max_tokens": 512},
        loss=[{"use": "nll"}],
        micro_batch_tokens=10**6,
        prompts_per_step=96,
        steps=2,
        **dict.fromkeys(("verify", "advantage", "sampling", "engine", "completions")),
    )
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = command("-m", "posttrain", "train", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    sizes = sizes_of(run.stdout)
    folder = load_recipe(path).run.folder
    metrics = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
    above = metrics[-1]["time/peak_memory_mb"] * 2**20 / 1e9 - sizes["program"]
    assert above > 0.15  # far above what the measurement is uncertain by
    assert 1 / 1.5 < (sizes["total"] - sizes["program"]) / above < 1.5
