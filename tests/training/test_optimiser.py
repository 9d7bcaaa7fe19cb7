"""Learning rates as functions of the step, and checkpoints that belong to another kind of optimiser."""

from __future__ import annotations

import pytest
import torch

from posttrain.errors import UserError
from posttrain.recipe.sections import OptimizerSection
from posttrain.system.processes import Processes
from posttrain.training.optimiser import Group, Optimiser, learning_rate


def test_learning_rates():
    options = OptimizerSection(learning_rate=1.0, schedule="linear", warmup_steps=4)
    assert [learning_rate(options, step, 12) for step in (0, 3, 4, 8)] == [0.25, 1.0, 1.0, 0.5]
    cosine = OptimizerSection(learning_rate=2.0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(1.0)
    assert learning_rate(OptimizerSection(learning_rate=3.0), 99, 100) == 3.0


def test_a_checkpoint_of_deepspeed_is_refused_without_it(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    layer = torch.nn.Linear(1, 1)
    with Processes() as processes:
        optimiser = Optimiser(processes, layer, [Group(list(layer.parameters()), OptimizerSection())])
        with pytest.raises(UserError, match="with DeepSpeed: resume with it"):
            optimiser.load(tmp_path)
