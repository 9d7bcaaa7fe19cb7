"""Micro-batches, learning rates, and launches that would silently be one process."""

from __future__ import annotations

import pickle

import pytest
import torch

from posttrain.errors import UserError, VerifierError
from posttrain.micro_batches import length_groups, micro_batches
from posttrain.recipe.sections import OptimizerSection
from posttrain.system.processes import Processes, _portable, refuse_hidden_single_process, refuse_lost_processes
from posttrain.training.optimiser import Group, Optimiser, learning_rate


def test_micro_batches_stay_within_the_budget_and_lose_nothing(random_batch):
    batch = random_batch(0, groups=5, size=6, columns=30)
    parts = micro_batches(batch, 64, lambda count: count)
    assert sorted(text for part in parts for text in part.texts) == sorted(batch.texts)
    assert all(part.tokens.numel() <= 64 or len(part) == 1 for part in parts)
    assert all(part.tokens.shape[1] == int(part.length.max()) for part in parts)
    assert len(parts) < len(batch)


def test_a_row_longer_than_the_budget_stands_alone():
    assert length_groups(torch.tensor([100, 3, 4]), 10) == [[1, 2], [0]]


@pytest.mark.parametrize("wanted", [7, 12, 20])
def test_every_rank_brings_as_many_micro_batches(random_batch, wanted):
    batch = random_batch(1)
    parts = micro_batches(batch, 60, lambda count: max(count, wanted))
    assert len(parts) == wanted
    texts = sorted(text for part in parts for text in part.texts if part.mask.any())
    assert texts == sorted(batch.texts)
    assert sum(float(part.loss_share.sum()) for part in parts) == pytest.approx(float(batch.loss_share.sum()))


def test_learning_rates():
    options = OptimizerSection(learning_rate=1.0, schedule="linear", warmup_steps=4)
    assert [learning_rate(options, step, 12) for step in (0, 3, 4, 8)] == [0.25, 1.0, 1.0, 0.5]
    cosine = OptimizerSection(learning_rate=2.0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(1.0)
    assert learning_rate(OptimizerSection(learning_rate=3.0), 99, 100) == 3.0


def test_a_launch_that_would_hide_processes_is_refused():
    """What ``accelerate launch --cpu --num_processes 2`` sets, and what torchrun sets."""
    with pytest.raises(UserError, match="--multi_gpu --num_processes"):
        refuse_hidden_single_process({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"})
    refuse_hidden_single_process({"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "RANK": "0"})
    refuse_hidden_single_process({"ACCELERATE_USE_CPU": "True"})


def test_ranks_that_would_train_alone_are_refused():
    with pytest.raises(UserError, match="WORLD_SIZE=2"):
        refuse_lost_processes({"WORLD_SIZE": "2"}, 1)
    refuse_lost_processes({"WORLD_SIZE": "2"}, 2)
    refuse_lost_processes({}, 1)


def test_errors_reach_other_processes_whole():
    """Or, where they cannot be rebuilt there, with their type and message."""
    error = VerifierError("math", "raised ValueError: no", "data.jsonl:3", {"answer": 1}, "text", "trace")
    copied = pickle.loads(pickle.dumps(_portable(error)))
    assert type(copied) is VerifierError and str(copied) == str(error) and copied.place == "data.jsonl:3"

    class Local(Exception):
        pass

    assert str(_portable(Local("said"))) == "Local: said"


def test_a_checkpoint_of_deepspeed_is_refused_without_it(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    layer = torch.nn.Linear(1, 1)
    with Processes() as processes:
        optimiser = Optimiser(processes, layer, [Group(list(layer.parameters()), OptimizerSection())])
        with pytest.raises(UserError, match="with DeepSpeed: resume with it"):
            optimiser.load(tmp_path)
