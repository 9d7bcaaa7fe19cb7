"""posttrain: post-training of language models on one engine.

``Batch``, ``Outputs``: what flows through a run. ``Recipe``, ``Part``, ``load_recipe``: what a run is made of.
``train``: runs it. ``ValueModel``, ``load_value``: what a run with a critic leaves beside the policy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.batch import Batch, Outputs
    from posttrain.models.value import ValueModel
    from posttrain.models.value_files import load_value
    from posttrain.recipe.part import Part
    from posttrain.training.loop import train
    from posttrain.training.recipe import Recipe, load_recipe

__all__ = ["Batch", "Outputs", "Part", "Recipe", "ValueModel", "load_recipe", "load_value", "train"]

_HOME = {
    "Batch": "posttrain.batch",
    "Outputs": "posttrain.batch",
    "Part": "posttrain.recipe.part",
    "Recipe": "posttrain.training.recipe",
    "ValueModel": "posttrain.models.value",
    "load_recipe": "posttrain.training.recipe",
    "load_value": "posttrain.models.value_files",
    "train": "posttrain.training.loop",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when asked for: the command line and worker processes start without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
