"""Hints for unknown keys: a near miss, the name that another toolkit uses, or the section that has such a key."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from posttrain.recipe.part import Part
from posttrain.recipe.validation import Hint, dataclass_in
from posttrain.recipe.yaml_reader import Location, dotted, suggestion

ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "max_steps": "steps",
    "num_generations": "completions",
    "n": "completions",
    "group_size": "completions",
    "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step",
    "num_iterations": "epochs",
    "ppo_epochs": "epochs",
    "max_new_tokens": "sampling.max_tokens",
    "max_completion_length": "sampling.max_tokens",
    "max_response_length": "sampling.max_tokens",
    "model_name_or_path": "policy.model",
    "model_name": "policy.model",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "output_dir": "run.folder",
    "save_steps": "run.save_every",
    "report_to": "run.trackers",
    "use_vllm": "engine.use",
    "reward_funcs": "verify",
}
"""Names of settings in other toolkits, with the name here."""


def hint_for(location: Location, kind: type[Any]) -> Hint:
    """Returns a function that writes the hint for an unknown key.

    Args:
        location: section that has the key; ``()`` at the top.
        kind: kind of recipe, whose sections are searched for such a key.
    """

    def hint(name: str, known: Iterable[str]) -> str:
        known = list(known)
        guess = suggestion(name, known)
        if guess.startswith("did"):
            return guess
        if (other := ELSEWHERE.get(name)) and tuple(other.split(".")) in _all_settings(kind):
            section, _, key = other.rpartition(".")
            return f"did you mean {key!r}?" if (section,) == location else f"it is {other!r} here"
        if other := next((dotted(at) for at in _all_settings(kind) if at[-1] == name and len(at) > 1), None):
            return f"there is {other!r}"
        return guess

    return hint


@functools.cache
def _all_settings(kind: type[Any]) -> tuple[Location, ...]:
    """Locations of all settings of a kind of recipe, sections included."""

    def inside(cls: Any, location: Location) -> Iterator[Location]:
        hints = typing.get_type_hints(cls)
        fields = {f.name for f in dataclasses.fields(cls)}
        for name in dict.fromkeys([*inspect.get_annotations(cls), *hints]):  # fields of the class before its base's
            if name not in fields:
                continue
            yield (*location, name)
            if (nested := dataclass_in(hints[name])) is not None and nested is not Part:
                yield from inside(nested, (*location, name))

    return tuple(inside(kind, ()))
