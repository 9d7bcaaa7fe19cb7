"""Checkpoints of a training run. A resumed run repeats, bit for bit, one that was never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.output.run_folder import prune_checkpoints, write_checkpoint
from posttrain.recipe.part import Part
from posttrain.training.learner import Learner
from posttrain.training.recipe import Recipe
from posttrain.training.setup import TrainingRun

STATE_FILE = "state.json"
SLOW_FILE = "target_network.pt"
OTHER_POLICIES_FILE = "other_policies.pt"


def parts_with_memory(recipe: Recipe) -> dict[str, Any]:
    """The parts that keep a ``state``, by their path in the recipe."""
    slots: dict[str, Part] = {"rollout": recipe.rollout, "combine": recipe.combine, "normaliser": recipe.normaliser}
    for slot in ("compare", "advantage", "baseline", "regroup", "target"):
        if (part := getattr(recipe, slot)) is not None:
            slots[slot] = part
    for slot in ("reward", "select", "shape", "keep", "loss", "value_loss"):
        for i, part in enumerate(getattr(recipe, slot)):
            slots[f"{slot}.{i}"] = part
            slots |= {f"{slot}.{i}.weights.{j}": weight for j, weight in enumerate(part.weights)}
    return {path: part.call for path, part in slots.items() if hasattr(part.call, "state")}


def run_state(run: TrainingRun) -> dict[str, Any]:
    """Everything that changes from step to step besides weights and optimiser, as plain data."""
    return json.loads(
        json.dumps(
            {
                "step": run.step,
                "unlogged": run.unlogged,
                "bad_steps": run.bad_steps,
                "policy_waits": run.policy_waits,
                "value": None if run.learner.value is None else run.learner.value.state,
                "world": run.processes.world,
                "evaluations": run.evaluations,
                "data": run.material.fingerprint,
                "prompts": run.sampler.state,
                "parts": {path: part.state for path, part in parts_with_memory(run.recipe).items()},
            }
        )
    )


def slow_weights(learner: Learner) -> Mapping[str, torch.Tensor]:
    """Weights of the target network, which the optimiser does not hold; empty if there is none."""
    return {} if learner.slow_value is None else learner.slow_value.own_parameters()


def save_checkpoint(run: TrainingRun, state: dict[str, Any]) -> None:
    """Writes a checkpoint that is complete or absent, and removes old ones. Called on all ranks."""
    processes = run.processes
    with write_checkpoint(run.folder, run.step, main=processes.is_main, barrier=processes.barrier) as folder:
        run.learner.optimiser.save(folder)
        if processes.is_main:
            slow = {name: weight.detach() for name, weight in slow_weights(run.learner).items()}
            torch.save(slow, folder / SLOW_FILE)
            torch.save(run.learner.other_policies.state(), folder / OTHER_POLICIES_FILE)
            (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    if processes.is_main:
        prune_checkpoints(run.folder, run.recipe.run.keep)


def load_checkpoint(run: TrainingRun, checkpoint: Path) -> None:
    """Restores a run from a checkpoint. Called on all ranks.

    Raises:
        UserError: if the number of processes changed under DeepSpeed, whose shards fit one number of processes.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if run.processes.uses_deepspeed and state["world"] != run.processes.world:
        raise UserError(
            f"{checkpoint} was written by {state['world']} processes under DeepSpeed and this run has "
            f"{run.processes.world}: resume with --num_processes {state['world']}"
        )
    if state["data"] != run.material.fingerprint and run.processes.is_main:
        print("resuming with other rows in the data than before, so not repeating that run exactly", flush=True)
    run.learner.optimiser.load(checkpoint)
    saved = torch.load(checkpoint / SLOW_FILE, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, weight in slow_weights(run.learner).items():
            weight.copy_(saved[name])
    run.learner.other_policies.restore(
        torch.load(checkpoint / OTHER_POLICIES_FILE, map_location="cpu", weights_only=True)
    )
    for value in (run.learner.value, run.learner.slow_value):
        if value is not None:
            value.state = state["value"]
    run.step, run.bad_steps, run.evaluations = state["step"], state["bad_steps"], state["evaluations"]
    run.policy_waits, run.unlogged = state["policy_waits"], state["unlogged"]
    run.sampler.state = state["prompts"]
    memories = parts_with_memory(run.recipe)
    for path, remembered in state["parts"].items():
        memories[path].state = remembered
