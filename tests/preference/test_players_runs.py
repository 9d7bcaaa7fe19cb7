"""Whole runs with other policies: their effect on a run, and that a resumed run repeats it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_preference_recipes_run import small

from posttrain.errors import UserError
from posttrain.models.policy import build_policy
from posttrain.output.tracking import read_metrics
from posttrain.recipe.sections import PolicySection
from posttrain.training.loop import train
from posttrain.training.other_policies import weights_of

pytestmark = pytest.mark.engine


def run(name: str, folder: Path, model: Path, *, resume: bool = False, **changes: Any) -> Path:
    every = {"steps": 4, "run.save_every": 1, "run.keep": 9, "run.keep_finished": 9, "optimizer.schedule": "constant"}
    folder.mkdir(exist_ok=True)
    train(small(f"preference/{name}", folder, model, **(every | changes)), resume=resume)
    return folder / "run"


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "model" / "model.safetensors")


def saved(run_folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(run_folder / "checkpoints" / f"step-{step:06d}" / "other_policies.pt")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tr_dpo", {"reference.every": 2}),
        ("iterative_dpo", {"reference.every": 3, "policy.lora": "{rank: 4}"}),
        ("nash_ema", {"opponent.average": 0.2}),
        ("egpo", {}),
    ],
)
def test_a_run_that_is_resumed_after_each_step_ends_the_same(
    name: str, changes: dict[str, Any], tmp_path: Path, tiny_model_folder: Path
) -> None:
    """The policy and the other policies are equal to the bit. Step 3 is between the two steps of an extragradient."""
    whole = run(name, tmp_path / "whole", tiny_model_folder, **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    checkpoints = tmp_path / "again" / "run" / "checkpoints"
    (tmp_path / "again" / "run" / "finished.json").unlink()
    for step in (2, 3, 4) if name != "egpo" else (4,):
        shutil.rmtree(checkpoints / f"step-{step:06d}")
    again = run(name, tmp_path / "again", tiny_model_folder, resume=True, **changes)
    before, after = weights(whole), weights(again)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for player, held in saved(whole, 4).items():
        assert all(torch.equal(saved(again, 4)[player][key], weight) for key, weight in held.items())


def test_the_reference_is_where_it_should_be(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The reference stays for two steps and is then a mixture of itself and the policy."""
    folder = run("tr_dpo", tmp_path / "a", tiny_model_folder, steps=2, **{"reference.every": 2})
    start = weights_of(build_policy(PolicySection(model=str(tiny_model_folder))))
    first, second = saved(folder, 1)["reference"], saved(folder, 2)["reference"]
    now = weights_of(build_policy(PolicySection(model=str(folder / "model"))))
    moved = 0.0
    for name, weight in start.items():
        assert torch.equal(first[name], weight)
        torch.testing.assert_close(second[name], 0.4 * weight + 0.6 * now[name], atol=1e-6, rtol=0)
        moved = max(moved, float((now[name] - weight).detach().abs().max()))
    assert moved > 1e-3
    kl = [row["policy/kl_ref"] for row in read_metrics(folder) if "policy/kl_ref" in row]
    assert kl[0] == 0 and float(kl[1] or 0) > 0


def test_an_extragradient_samples_ahead_and_starts_again(tmp_path: Path, tiny_model_folder: Path) -> None:
    """After its first step the policy is as before; the second one samples from where the first one led."""
    folder = run("egpo", tmp_path / "a", tiny_model_folder, steps=2, **{"run.rollouts_every": 1})
    start = weights_of(build_policy(PolicySection(model=str(tiny_model_folder))))
    trained = torch.load(folder / "checkpoints" / "step-000001" / "trainer.pt")
    assert all(torch.equal(trained["weights"][f"policy.{name}"], weight) for name, weight in start.items())
    assert not trained["optimizer"]["state"]  # as before the step, too
    ahead = saved(folder, 1)["ahead"]
    assert not any(torch.equal(ahead[name], weight) for name, weight in start.items())
    assert not saved(folder, 2)
    policy = build_policy(PolicySection(model=str(tiny_model_folder)))
    sampled = []
    for step in (1, 2):
        (path,) = (folder / "rollouts").glob(f"*{step:06d}*.parquet")
        row = pq.read_table(path).to_pylist()[0]
        if step == 2:
            policy.load_state_dict(ahead, strict=False)
        mask = torch.tensor([row["mask"]]).bool()
        logp = policy(torch.tensor([row["tokens"]]), mask)[0].detach()
        sampled.append(float((logp - torch.tensor([row["logp_sampler"]]))[mask].abs().max()))
    assert max(sampled) < 1e-4


def test_a_reference_that_nothing_reads_is_not_moved(tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="no part of the recipe reads the reference"):
        run("spo", tmp_path / "a", tiny_model_folder, **{"reference.every": 2})
