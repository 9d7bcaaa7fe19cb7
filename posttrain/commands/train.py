"""``posttrain train recipes/grpo.yaml``: runs a training recipe."""

from __future__ import annotations

from pathlib import Path

from posttrain.recipe.loading import run_file
from posttrain.recipe.yaml_reader import Overrides
from posttrain.training.recipe import Recipe


def run_train(path: str | Path, overrides: Overrides = (), *, resume: bool = False) -> None:
    """Runs the training recipe in a YAML file.

    Args:
        resume: go on from the newest checkpoint in the run folder.

    Raises:
        UserError: if the file or its data are wrong; the message says where and what to change.
    """

    def run(recipe: Recipe) -> None:
        from posttrain.training.loop import train  # after reading, so that mistakes in a recipe show at once

        train(recipe, resume=resume)

    run_file(Recipe, path, overrides, run)
