"""A recipe: what a run is made of, as a frozen dataclass of callables and plain settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain import options


@dataclass(frozen=True, kw_only=True)
class Part:
    """A callable in a slot, with where it came from and the numbers that belong to the slot.

    ``call`` has its hyper-parameters bound. A part with memory is an object with a ``state`` dict, which checkpoints
    keep under the slot's path.
    """

    call: Callable[..., Any]
    name: str  # as the recipe wrote it
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0  # of a verifier or reward in the sum
    coef: float = 1.0  # of a loss term
    weights: tuple[Part, ...] = ()  # of a loss term: factors, detached
    time_limit: float = 10.0  # of a verifier, seconds a completion
    on_error: str = "stop"  # of a verifier: stop | skip
    spec: str = ""  # what other processes resolve again: file.py:name or package.module.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of a run. Slots: see ``posttrain show`` for each slot's signature."""

    policy: options.Policy
    data: options.Data
    verify: tuple[Part, ...]
    loss: tuple[Part, ...]
    advantage: Part
    normaliser: Part
    rollout: Part
    prompts: Part
    reward: tuple[Part, ...] = ()
    select: tuple[Part, ...] = ()
    shape: tuple[Part, ...] = ()
    keep: tuple[Part, ...] = ()
    reference: options.Reference = field(default_factory=options.Reference)
    sampling: options.SamplingOptions = field(default_factory=options.SamplingOptions)
    engine: options.EngineOptions = field(default_factory=options.EngineOptions)
    optimizer: options.Optimizer = field(default_factory=options.Optimizer)
    evaluate: options.Evaluation | None = None
    run: options.Run = field(default_factory=options.Run)

    steps: int = 100
    prompts_per_step: int = 32  # over all processes
    completions: int = 8  # a prompt
    epochs: int = 1  # passes over a batch
    minibatches: int = 1  # optimiser steps a pass
    micro_batch_tokens: int = 16384  # padded tokens in one forward pass
    max_refills: int = 10  # rounds of generation in which `select` may find enough prompts
    seed: int = 0

    name: str = "recipe"
    path: Path | None = None
    resolved: Mapping[str, Any] = field(default_factory=dict)  # plain data of the whole recipe, as saved with the run
