"""posttrain: post-training of language models on one engine.

``load_recipe`` reads a ``Recipe``, whose slots hold ``Part`` objects, and ``train`` runs it. Parts exchange a ``Batch``
and ``Outputs``: read ``posttrain/batch.py`` first. ``load_value`` loads the ``ValueModel`` of a run with a critic.
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
    """Imports a public name when it is first used: the command line and worker processes start without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
