"""Runs with ``select`` or ``keep`` report and store what was drawn, what was kept and what was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from runs import command, launch, write_run

from posttrain import load_recipe
from posttrain.commands.cli import main
from posttrain.data.rollout_files import find_rollouts
from posttrain.output.tracking import read_metrics
from posttrain.training.loop import train

pytestmark = pytest.mark.engine
VERIFIER = '''
def odd_sums(completion, *, answer):
    """Always 0 where the sum is even, so that half of the groups are equal."""
    return float(int(answer) % 2 == 1) * sum(c.isdigit() for c in completion) / max(1, len(completion))
'''
SELECT: dict[str, Any] = {
    "verify": [{"use": "own.py:odd_sums"}],
    "select": [{"use": "mixed_groups"}],
    "evaluate": {"data": {"path": "data.jsonl", "limit": 4}, "every": 2},
}


def write(folder: Path, model: Path, **changes: Any) -> Path:
    path = write_run(folder, model, **(SELECT | changes))
    (folder / "own.py").write_text(VERIFIER, encoding="utf-8")
    return path


def column(files: list[Path], name: str) -> list[Any]:
    return [value for file in files for value in pq.read_table(file)[name].to_pylist()]


def test_what_was_drawn_is_reported_and_stored_and_a_resumed_run_repeats_it(tmp_path, tiny_model_folder) -> None:
    train(load_recipe(write(tmp_path / "whole", tiny_model_folder, steps=4)))
    run, rollouts = tmp_path / "whole" / "run", tmp_path / "whole" / "run" / "rollouts"
    metrics = {row["step"]: row for row in read_metrics(run, timing=False)}
    for step in range(1, 5):
        kept, dropped = rollouts / f"step-{step:06d}.parquet", rollouts / "dropped" / f"step-{step:06d}.parquet"
        files, row = [kept, dropped], metrics[step]
        assert set(column([kept], "used_for")) == {"training"} and set(column([dropped], "used_for")) == {"dropped"}
        for name, wanted in (("", files), ("kept/", [kept])):
            scores, lengths = column(wanted, "score"), column(wanted, "length")
            assert row[f"{name}score/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)
            assert row[f"{name}accuracy"] == pytest.approx(sum(s > 0 for s in scores) / len(scores))
            assert row[f"{name}length/mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert row["prompts/drawn"] * 4 == len(column(files, "score")) and row["prompts/missing"] == 0
        assert row["groups/mixed"] < row["kept/groups/mixed"] == 1 and row["groups/equal"] > 0
    evaluated = [rollouts / "evaluation" / f"step-{step:06d}.parquet" for step in (0, 2, 4)]
    assert sorted((rollouts / "evaluation").iterdir()) == evaluated and set(column(evaluated, "used_for")) == {
        "evaluation"
    }
    assert metrics[2]["eval/score"] == pytest.approx(sum(column([evaluated[1]], "score")) / 4, abs=1e-6)
    assert find_rollouts(str(run), None) == sorted(rollouts.glob("step-*.parquet"))
    assert len(find_rollouts(str(rollouts / "dropped"), None)) == 4
    path = write(tmp_path / "parts", tiny_model_folder, steps=4)
    train(load_recipe(path, ["--steps=3"]))
    train(load_recipe(path), resume=True)
    again = [row for row in read_metrics(tmp_path / "parts" / "run", timing=False) if row["step"] > 3]
    assert again == [metrics[4]]
    names = [path.relative_to(rollouts) for path in rollouts.rglob("*.parquet")]
    assert all(
        (tmp_path / "parts" / "run" / "rollouts" / name).exists() for name in names if "evaluation" not in name.parts
    )


def test_keep_is_told_apart_and_storing_can_be_limited(tmp_path, tiny_model_folder) -> None:
    """``keep: finished`` leaves out the completions that were cut off; their rows stay in the file of the step."""
    run = {"folder": str(tmp_path / "run"), "rollouts_of": ["training"]}
    changes = {"select": [], "keep": [{"use": "finished"}], "steps": 1, "sampling": {"max_tokens": 40}, "run": run}
    train(load_recipe(write(tmp_path, tiny_model_folder, **changes)))
    (row,) = [row for row in read_metrics(tmp_path / "run") if row["step"] == 1]
    rollouts = tmp_path / "run" / "rollouts"
    assert [path.name for path in rollouts.iterdir()] == ["step-000001.parquet"]
    uses, finishes = (column([rollouts / "step-000001.parquet"], name) for name in ("used_for", "finish"))
    assert [use == "dropped" for use in uses] == [finish == "length" for finish in finishes]
    assert row["kept/truncated"] == 0 < row["truncated"] == pytest.approx(uses.count("dropped") / len(uses))


def test_a_step_with_too_few_prompts_is_said_or_an_error(tmp_path, tiny_model_folder, capsys) -> None:
    changes: dict[str, Any] = {"prompts_per_step": 8, "max_refills": 1, "steps": 2, "evaluate": None}
    only_nine = VERIFIER.replace("int(answer) % 2 == 1", "answer in ('9', '11')")
    path = write(tmp_path, tiny_model_folder, **changes)
    (tmp_path / "own.py").write_text(only_nine, encoding="utf-8")
    assert main([str(path)]) == 0
    said, rows = capsys.readouterr().out, read_metrics(tmp_path / "run")
    first = rows[0]
    assert 0 < first["prompts/missing"] < 8 and first["prompts/drawn"] == 16 and first["prompts/rounds"] == 2
    learned = 8 - int(first["prompts/missing"])
    assert f"warning, step 1: only {learned} of 8 prompts are learned from: no more passed `select` of 16 drawn" in said
    assert "warning: too few prompts passed `select` in 2 of 2 steps" in said
    assert main([str(path), "--short_steps=error", f"--run.folder={tmp_path / 'strict'}"]) == 2
    assert f"only {learned} of the 8 prompts of a step passed `select`" in capsys.readouterr().err
    assert column([tmp_path / "strict" / "rollouts" / "dropped" / "step-000001.parquet"], "group")[-1] == 15


def test_two_processes_draw_and_keep_the_prompts_of_one(tmp_path, tiny_model_folder) -> None:
    changes = {"steps": 1, "evaluate": None}
    done = command("-m", "posttrain", str(write(tmp_path / "one", tiny_model_folder, **changes)))
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = str(write(tmp_path / "two", tiny_model_folder, **changes))
    flags = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    done = launch(*flags, recipe, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    one, two = (read_metrics(tmp_path / name / "run", timing=False)[0] for name in ("one", "two"))
    for name in ("prompts/drawn", "prompts/rounds", "accuracy", "kept/accuracy", "length/mean", "loss", "grad_norm"):
        assert one[name] == pytest.approx(two[name], abs=1e-5), name
    kept = [sorted((tmp_path / name / "run" / "rollouts").glob("step-*")) for name in ("one", "two")]
    assert sorted(column(kept[0], "completion")) == sorted(column(kept[1], "completion")) and len(kept[1]) == 2
