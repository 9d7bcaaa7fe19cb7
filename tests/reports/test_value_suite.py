"""``posttrain eval eval/value.yaml``: mistakes in a suite, and whole reports on real engines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import reference_value_report as reference
import torch
import yaml
from runs import VERIFIER, command, launch, write_run

from posttrain.commands.cli import main
from posttrain.data.rollout_files import read_rollouts
from posttrain.models.value_files import load_value

SUITE = {
    "suite": "value",
    "value": {"model": "value"},
    "data": {"path": "data.jsonl", "limit": 10},
    "verify": [{"use": "verifier.py:share_of_digits"}],
    "sampling": {"max_tokens": 12},
    "completions": 3,
    "engine": {"use": "transformers"},
    "branches": {"prompts": 4, "prefixes": 2, "completions": 3},
    "report": {"bins": 4, "folder": "report"},
}


def write_suite(folder: Path, **changes) -> Path:
    """Writes a small value suite with its data and verifier, and returns its path; None drops a section."""
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(1, 5) for b in range(1, 5)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "verifier.py").write_text(VERIFIER)
    suite = SUITE | {"report": {"bins": 4, "folder": str(folder / "report")}} | changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in suite.items() if v is not None}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "overrides", "place", "words"),
    [
        ({"vlaue": {}}, [], "suite.yaml:[0-9]+:1: vlaue:", "did you mean 'value'"),
        ({"suite": "values"}, [], "suite.yaml:1:1: suite:", "did you mean 'value'"),
        ({"value": None}, [], "suite.yaml:1:1:", "'value' is missing"),
        ({"policy": None}, [], "suite.yaml:1:1:", "'policy' is missing"),
        ({"verify": None}, [], "suite.yaml:1:1:", "'verify' is missing"),
        ({"data": None}, [], "suite.yaml:1:1:", "give `data`"),
        ({"rollouts": "rollouts"}, [], "suite.yaml:4:1: data:", "leave one of them out"),
        ({"report": {"bins": 1}}, [], "suite.yaml:[0-9]+:3: report.bins:", "greater than or equal to 2"),
        ({}, ["--sampling.temperature=0"], "command line: --sampling.temperature=0:", "greedily"),
        ({}, ["--value.model=nowhere/at/all"], "command line: --value.model=nowhere/at/all:", "no folder"),
        ({}, ["--lr=1"], "command line: --lr=1:", "unknown key"),
    ],
)
def test_mistakes_in_a_suite_are_reported_with_their_place(
    changes, overrides, place, words, tmp_path, capsys, monkeypatch, tiny_model_folder
):
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path, **({"policy": {"model": str(tiny_model_folder)}} | changes))
    assert main(["eval", "suite.yaml", *overrides]) == 2
    message = capsys.readouterr().err
    assert re.search(place, message) and words in message and "Traceback" not in message, message


def test_the_shipped_suite_names_the_section_to_add(capsys):
    assert main(["eval", str(Path(__file__).parents[2] / "eval" / "value.yaml")]) == 2
    message = capsys.readouterr().err
    assert "value.yaml:1:1" in message and "'value' is missing" in message


@pytest.fixture(scope="module")
def value_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved value model of the tiny policy, with a head of random weights."""
    from transformers import AutoTokenizer

    from posttrain.models.value_files import build_value, save_value
    from posttrain.recipe import sections

    torch.manual_seed(1)
    head = sections.HeadSection(type="bernoulli")
    model = build_value(sections.ValueSection(head=head), sections.PolicySection(model=str(tiny_model_folder)))
    torch.nn.init.normal_(model.head.linear.weight, std=0.1)
    folder = tmp_path_factory.mktemp("value")
    save_value(model, AutoTokenizer.from_pretrained(tiny_model_folder), folder)
    return folder


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "report" / "metrics.json").read_text())["metrics"]


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_whole_report(engine: str, tmp_path: Path, tiny_model_folder: Path, value_folder: Path):
    path = write_suite(tmp_path, policy={"model": str(tiny_model_folder)}, value={"model": str(value_folder)})
    done = command("-m", "posttrain", "eval", str(path), f"--engine.use={engine}", "--engine.cache_mb=16")
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(tmp_path)
    assert metrics["value/states"] > 10 * 3 and metrics["branches/prefixes"] == 8
    assert metrics["value/rmse"] > 0 and metrics["value/calibration_error"] > 0
    assert f"{metrics['value/explained_variance']:.4f}" in done.stdout and "index.html" in done.stdout
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/png") == len(list((tmp_path / "report").glob("*.png"))) >= 4
    assert page.count("<pre>") == 6 + 1


@pytest.mark.engine
def test_two_processes_report_what_one_does(tmp_path: Path, tiny_model_folder: Path, value_folder: Path):
    models = {"policy": {"model": str(tiny_model_folder)}, "value": {"model": str(value_folder)}}
    one, two = write_suite(tmp_path / "one", **models), write_suite(tmp_path / "two", **models)
    assert main(["eval", str(one)]) == 0
    done = launch("--multi_gpu", "--num_processes", "2", "-m", "posttrain", "eval", str(two), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "two") == pytest.approx(metrics_of(tmp_path / "one"), abs=1e-5, nan_ok=True)


@pytest.mark.engine
def test_stored_rollouts_are_read_instead_of_sampled(tmp_path: Path, tiny_model_folder: Path, value_folder: Path):
    """Metrics of a run's stored rollouts equal scalar loops over its files and the model's values."""
    run = write_run(tmp_path / "run", tiny_model_folder, steps=2)
    assert main([str(run)]) == 0
    rollouts = tmp_path / "run" / "run" / "rollouts"
    path = write_suite(
        tmp_path,
        value={"model": str(value_folder)},
        data=None,
        verify=None,
        rollouts=str(rollouts),
        branches={"prompts": 0},
    )
    assert main(["eval", str(path)]) == 0
    metrics = metrics_of(tmp_path)
    model, states = load_value(value_folder), []
    for number, file in enumerate(sorted(rollouts.glob("*.parquet"))):
        batch = read_rollouts(file)
        with torch.no_grad():
            value, _ = model(batch.tokens, batch.states)
        states += [state | {"group": (number, state["group"])} for state in reference.states(batch, value, batch.score)]
    explained = reference.explained_variance([s["value"] for s in states], [s["outcome"] for s in states])
    assert metrics["value/states"] == len(states)
    assert metrics["value/explained_variance"] == pytest.approx(explained, abs=1e-5)
    error = reference.calibration_error(reference.calibration(states, 4))
    assert metrics["value/calibration_error"] == pytest.approx(error, abs=1e-5)
