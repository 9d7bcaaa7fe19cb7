"""Collects the numbers on which the memory of a run depends (:mod:`posttrain.training.memory`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.engines import uses_vllm
from posttrain.models.activations import Activations, measure_activations
from posttrain.models.load import DTYPES
from posttrain.models.policy import chunk_elements
from posttrain.recipe.sections import LoraSection
from posttrain.system.memory import free_bytes, resident_bytes
from posttrain.training.learner import Learner
from posttrain.training.memory import FLOAT32, MemoryFacts, memory_line, shortage
from posttrain.training.recipe import Recipe
from posttrain.training.reference_cache import uses_cache
from posttrain.training.setup import Material

VLLM_ON_CPU = 0.25e9
"""Memory of vLLM beside weights and cache, in bytes, on a CPU: 0.24 GB with the model of the quickstart."""


def say_memory(learner: Learner, material: Material, program: int) -> None:
    """Prints the estimate of the run's memory, and a warning if there is less. Called on all ranks; the first prints.

    Args:
        program: memory of this process before its models were built, in bytes.
    """
    learner.processes.from_main(lambda: _say_memory(learner, material, program))


def _say_memory(learner: Learner, material: Material, program: int) -> None:
    facts = memory_facts(learner, material, program)
    print(memory_line(facts))
    warning = shortage(facts, available(learner))
    if warning is not None:
        print(warning)


def available(learner: Learner) -> float | None:
    """Memory that one process of the run can have, in bytes; None if the system does not say."""
    if learner.processes.device.type == "cuda":
        return float(torch.cuda.get_device_properties(learner.processes.device).total_memory)
    free, on_machine = free_bytes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if free is None else free / on_machine + resident_bytes()


def memory_facts(learner: Learner, material: Material, program: int) -> MemoryFacts:
    """The facts of a run whose models are built and whose engine is not yet."""
    recipe, processes = learner.recipe, learner.processes
    trained_models = [m for m, loss in ((learner.policy, recipe.loss), (learner.value, recipe.value_loss)) if loss]
    models = [model for model in (learner.policy, learner.value) if model is not None]
    own = unique(parameter for model in models for parameter in model.parameters())
    rows, columns = largest_micro_batch(recipe, material, processes.world, whole_groups=learner.required.groups)
    on_gpu = processes.device.type == "cuda"
    copies = copies_of(learner, own)
    return MemoryFacts(
        weights=size_of(own),
        trained=sum(p.numel() for p in own if p.requires_grad),
        rows=rows,
        columns=columns,
        activations=tuple(activations_of(learner, model) for model in trained_models),
        checkpointing=recipe.policy.gradient_checkpointing,
        logits=logits_of(learner) if recipe.loss else 0.0,
        copies=copies,
        program=0.0 if on_gpu else program + (VLLM_ON_CPU if samples(material) and uses_vllm(recipe.engine) else 0),
        world=processes.world,
        sharded=processes.uses_deepspeed,
        frozen_float32=size_of(p for p in own if not p.requires_grad and p.dtype == torch.float32),
        adapter_parameters=0 if recipe.policy.lora or not recipe.loss else adapters_of(learner.policy.base),
        copies_without_adapters=("reference",) if recipe.reference.model is None else (),
        policy_float32=recipe.policy.dtype == "float32",
        **(engine_facts(learner, material) if samples(material) else {}),
    )


def samples(material: Material) -> bool:
    """True if the run has an engine."""
    return material.rows is not None or material.evaluation_rows is not None


def unique(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters, each once."""
    return list({id(parameter): parameter for parameter in parameters}.values())


def size_of(parameters: Iterable[Tensor]) -> int:
    """Bytes of parameters."""
    return sum(parameter.nbytes for parameter in parameters)


def copies_of(learner: Learner, own: list[Tensor]) -> dict[str, float]:
    """Bytes of the models beside policy and value model, by name."""
    seen = {id(parameter) for parameter in own}
    reads_cache = uses_cache(learner.recipe, learner.required)
    others: dict[str, nn.Module | None] = {
        "reference": None if reads_cache else learner.reference,  # it is freed before the first step
        "opponent": learner.other_policies.average,
        "slow value model": learner.slow_value,
    }
    sizes: dict[str, float] = {}
    for name, model in others.items():
        new = [p for p in unique(model.parameters()) if id(p) not in seen] if model is not None else []
        seen |= {id(parameter) for parameter in new}
        sizes[name] = size_of(new)
    if learner.recipe.extragradient:  # weights and both averages of AdamW, as they were before the look ahead
        sizes["state before the look ahead"] = 3 * FLOAT32 * sum(p.numel() for p in own if p.requires_grad)
    return {name: size for name, size in sizes.items() if size}


def activations_of(learner: Learner, model: Any) -> Activations:
    """Measures what a trained policy or value model keeps for its backward pass."""
    config = model.base.config if model is learner.policy else model.decoder.config
    return measure_activations(model, model.hidden_states, config, learner.processes.autocast)


def logits_of(learner: Learner) -> float:
    """Bytes of the logits that are held at once, three times, and of the gradient of a trained output layer."""
    head: Any = learner.policy.base.get_output_embeddings()
    weight = getattr(head, "weight", None)
    gradient = weight.nbytes if weight is not None and weight.requires_grad else 0
    return 3 * FLOAT32 * chunk_elements(learner.processes.device) + gradient


def adapters_of(model: nn.Module) -> int:
    """Number of parameters of adapters of the default rank on all linear layers but the output layer."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return LoraSection().rank * sum(m.in_features + m.out_features for m in linear)


def largest_micro_batch(recipe: Recipe, material: Material, world: int, *, whole_groups: bool) -> tuple[int, int]:
    """Rows and columns of the largest micro-batch of an update, if all its completions are as long as can be."""
    if material.examples is not None:
        group, columns = material.examples.extent
    else:
        assert material.rows is not None
        group, columns = recipe.completions, material.rows.longest_prompt + recipe.sampling.max_tokens
    in_step = -(-recipe.prompts_per_step * group // (world * recipe.minibatches))
    fitting = recipe.micro_batch_tokens // columns
    return max(1, min(in_step, max(fitting, group if whole_groups else 1))), columns


def engine_facts(learner: Learner, material: Material) -> dict[str, Any]:
    """The engine's weights and cache, and the setting that makes the cache smaller."""
    recipe, options = learner.recipe, learner.recipe.engine
    dtype = recipe.policy.dtype if options.dtype == "auto" else options.dtype
    parameters = unique(learner.policy.base.parameters())
    weights = sum(p.numel() for p in parameters) * DTYPES[dtype].itemsize
    if not uses_vllm(options):
        at_once, sampling = sampling_bytes(recipe, material, learner.policy.base.config, learner.processes.world, dtype)
        smaller = (f"engine.max_concurrent: {max(1, at_once // 2)}", sampling / 2)
        facts = {"engine_weights": weights, "sampling": sampling, "engine_setting": smaller}
    elif learner.processes.device.type == "cuda":
        whole = torch.cuda.get_device_properties(learner.processes.device).total_memory
        cache = max(0.0, options.gpu_memory * whole - weights)
        smaller = (f"engine.gpu_memory: {options.gpu_memory / 2:g}", min(cache, options.gpu_memory / 2 * whole))
        facts = {"engine_weights": weights, "engine_cache": cache, "engine_setting": smaller}
    else:
        cache, half = options.cache_mb << 20, max(1, options.cache_mb // 2)
        smaller = (f"engine.cache_mb: {half}", (options.cache_mb - half) << 20)  # vLLM packs a second copy of weights
        facts = {"engine_weights": 2 * weights, "engine_cache": cache, "engine_setting": smaller}
    return facts | {"engine_float32": dtype == "float32"}


def sampling_bytes(recipe: Recipe, material: Material, config: Any, world: int, dtype: str) -> tuple[int, float]:
    """Number of completions that the transformers engine samples at once, and bytes of their keys and values.

    Memory for them is made a quarter ahead.
    """
    text = config.get_text_config()
    rows = material.rows or material.evaluation_rows
    assert rows is not None
    at_once = min(recipe.engine.max_concurrent, -(-recipe.prompts_per_step * recipe.completions // world))
    columns = rows.longest_prompt + recipe.sampling.max_tokens
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    of_head = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    of_token = 2 * getattr(text, "num_hidden_layers", 1) * heads * of_head * DTYPES[dtype].itemsize
    return at_once, 1.25 * at_once * columns * of_token
