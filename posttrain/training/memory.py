"""Estimate of the memory of a run, from the sizes of its models and batches, and the settings that lower it.

Weights, gradients and optimiser states follow exactly from the parameters. What a backward pass needs is measured on a
few tokens of the model (:mod:`posttrain.models.activations`). :mod:`posttrain.training.memory_facts` collects the
numbers from a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from posttrain.models.activations import Activations

FLOAT32 = 4  # bytes
ROUNDED_SHARE = 0.7
"""Activations under autocast to bfloat16 beside those in float32: 0.68 for Llama, 0.67 with adapters; the residual
stream and the norms stay in float32."""

WORTHWHILE = 0.05
"""Least share of the total by which a setting must lower it to be named."""


@dataclass(frozen=True)
class MemoryFacts:
    """The numbers of a run on which its memory depends. Sizes are in bytes, of one process."""

    weights: float
    """Size of the weights of policy and value model; shared ones count once."""
    trained: int
    """Number of trained parameters, which are float32."""
    rows: int
    """Number of rows of the largest micro-batch."""
    columns: int
    """Length of its rows, in tokens."""
    activations: tuple[Activations, ...] = ()
    """Measurements of the trained models."""
    checkpointing: bool = False
    logits: float = 0.0
    """Size of the logits that are held at once, and of the gradient of the output layer."""
    copies: Mapping[str, float] = field(default_factory=dict)
    """Sizes of models that are not trained, by name: reference, opponent."""
    engine_weights: float = 0.0
    engine_cache: float = 0.0
    """Size of the cache of keys and values, where it is held all the time."""
    sampling: float = 0.0
    """Size of the cache of keys and values, where it is freed before the update."""
    program: float = 0.0
    """Memory of the process without models."""
    world: int = 1
    sharded: bool = False
    """True if DeepSpeed shards gradients and optimiser states over the processes."""

    # What other settings would change
    micro_batch_tokens: int = 0
    frozen_float32: float = 0.0
    """Size of the frozen weights of trained models in float32."""
    adapter_parameters: int = 0
    """Number of parameters that adapters on all linear layers would have; 0 if there are adapters already."""
    copies_without_adapters: tuple[str, ...] = ()
    """Names of the copies that adapters would make needless."""
    engine_setting: tuple[str, float] | None = None
    """A setting of the engine that takes less memory, and the bytes that it frees."""
    engine_float32: bool = False
    policy_float32: bool = False


class Item(NamedTuple):
    """One kind of memory."""

    name: str
    size: float  # bytes


def items(facts: MemoryFacts) -> list[Item]:
    """The memory of a run by kind, largest first. Nothing is smaller than 0."""
    shares = facts.world if facts.sharded else 1
    gradients = FLOAT32 * facts.trained / shares
    if facts.world > 1 and not facts.sharded:
        gradients *= 2  # the buckets in which data-parallel processes add them up
    states = (3 if facts.sharded else 2) * FLOAT32 * facts.trained / shares
    backward = sum(
        each.kept(facts.rows, facts.columns, checkpointing=facts.checkpointing) for each in facts.activations
    )
    backward += facts.logits if facts.activations else 0.0
    named = {
        "program": facts.program,
        "weights": facts.weights,
        "gradients": gradients,
        "optimiser states": states,
        "activations": backward,
        **facts.copies,
        "engine's weights": facts.engine_weights,
        "engine's cache": facts.engine_cache,
        "cache while sampling": max(0.0, facts.sampling - gradients - backward),
    }
    return sorted((Item(name, size) for name, size in named.items() if size), key=lambda item: -item.size)


def total(facts: MemoryFacts) -> float:
    """The estimate of the peak, in bytes."""
    return sum(item.size for item in items(facts))


class Remedy(NamedTuple):
    """A setting that lowers the memory of a run."""

    setting: str
    total: float  # estimate with it, in bytes


def best_remedy(facts: MemoryFacts) -> Remedy | None:
    """The setting that lowers the estimate most; None if none of them lowers it by a twentieth."""
    remedies = [Remedy(setting, total(changed)) for setting, changed in _changes(facts)]
    best = min(remedies, key=lambda remedy: remedy.total, default=None)
    return best if best is not None and best.total < (1 - WORTHWHILE) * total(facts) else None


def _changes(facts: MemoryFacts) -> Iterator[tuple[str, MemoryFacts]]:
    change = dataclasses.replace
    if facts.activations and not facts.checkpointing:
        yield "policy.gradient_checkpointing: true", change(facts, checkpointing=True)
    if facts.activations and facts.rows > 1:
        tokens = max(facts.columns, facts.rows // 2 * facts.columns)
        yield f"micro_batch_tokens: {tokens}", change(facts, rows=facts.rows // 2)
    if facts.policy_float32:
        yield "policy.dtype: bfloat16", _rounded(facts)
    if facts.adapter_parameters:
        kept = {name: size for name, size in facts.copies.items() if name not in facts.copies_without_adapters}
        more = FLOAT32 * facts.adapter_parameters
        lora = change(facts, trained=facts.adapter_parameters, weights=facts.weights + more, copies=kept)
        yield "policy.lora: {}", lora
    if facts.engine_setting is not None:
        setting, freed = facts.engine_setting
        freed_of_cache = min(freed, facts.engine_cache)
        smaller = facts.sampling - (freed - freed_of_cache)
        yield setting, change(facts, engine_cache=facts.engine_cache - freed_of_cache, sampling=smaller)
    if facts.engine_float32:
        yield "engine.dtype: bfloat16", change(facts, engine_weights=facts.engine_weights / 2)


def _rounded(facts: MemoryFacts) -> MemoryFacts:
    """The facts with ``policy.dtype: bfloat16``; autocast holds a rounded copy of trained weights meanwhile."""
    fixed = facts.trained * FLOAT32 / 2 / max(1, len(facts.activations))
    rounded = tuple(
        each._replace(
            fixed=each.fixed + fixed,
            per_token=each.per_token * ROUNDED_SHARE,
            per_pair=each.per_pair * ROUNDED_SHARE,
        )
        for each in facts.activations
    )
    engine = facts.engine_weights / 2 if facts.engine_float32 else facts.engine_weights
    weights = facts.weights - facts.frozen_float32 / 2
    return dataclasses.replace(facts, activations=rounded, weights=weights, engine_weights=engine)


def memory_line(facts: MemoryFacts) -> str:
    """One line: the estimate, what it is made of, and the setting that would lower it most."""
    whole, remedy = total(facts), best_remedy(facts)
    parts = ", ".join(f"{item.name} {_shown(item.size)}" for item in items(facts) if item.size > 0.01 * whole)
    advice = "" if remedy is None else f"; {remedy.setting} would make it about {_shown(remedy.total)} GB"
    return f"memory: about {_shown(whole)} GB ({parts}){advice}"


def shortage(facts: MemoryFacts, free: float | None) -> str | None:
    """A warning if the run needs more memory than there is; None if there is enough or if that is not known.

    Args:
        free: memory that all processes of the run on this machine can have, in bytes, for each of them.
    """
    if free is None or total(facts) <= free:
        return None
    remedy = best_remedy(facts)
    advice = "take a smaller model or more memory" if remedy is None else f"set {remedy.setting}"
    return (
        f"warning: memory: a process has about {_shown(free)} GB here, and the run needs about "
        f"{_shown(total(facts))}: the system may end it without a word; {advice}"
    )


def _shown(size: float) -> str:
    """A size in GB, with two digits."""
    return f"{size / 1e9:.2g}" if size < 9.95e9 else f"{size / 1e9:.0f}"
