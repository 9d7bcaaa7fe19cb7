"""Tests of the models that engines load: one for each rank, the right revision, and code only if it is trusted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_checks import perturb
from tiny_families import save_tiny
from transformers import AutoModelForCausalLM

from posttrain.engines import make_engine
from posttrain.engines.base import Sampling
from posttrain.models.load import load_tokenizer
from posttrain.models.policy import build_policy, save_model
from posttrain.recipe.sections import EngineSection, PolicySection


@pytest.mark.engine
def test_each_of_two_ranks_has_its_own_vllm(tiny_model_folder: Path):
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_endpoint=localhost:0"]
    script = Path(__file__).parents[1] / "helpers" / "two_ranks.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [*command, "--rdzv_backend=c10d", str(script), str(tiny_model_folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    (first_rank, first), (second_rank, second) = result["gathered"]
    assert (first_rank, second_rank) == (0, 1)
    assert len(first) == len(second) == 8
    assert first != second  # each rank has other prompts
    assert result["total"] == 3.0
    assert result["gradient"] == pytest.approx(3 * 1.5)  # mean over ranks of 1 and 2, over three steps


REVISIONS = """
import sys
import torch
from posttrain.engines import make_engine
from posttrain.engines.base import Sampling
from posttrain.recipe.sections import EngineSection

def greedy(model, **source):
    options = EngineSection(use=sys.argv[1], cache_mb=16, max_concurrent=8)
    engine = make_engine(model, options, dtype="float32", max_model_len=64, **source)
    [[completion]] = engine.generate([[5, 6, 7, 8]], Sampling(max_tokens=16, temperature=0.0, ignore_eos=True))
    engine.close()
    return completion.logps

main, other = greedy("someone/tiny"), greedy("someone/tiny", revision="other")
assert main != other and other == greedy(sys.argv[2])
"""


@pytest.mark.engine
@pytest.mark.parametrize("use", ["transformers", "vllm"])
def test_the_revision_that_is_asked_for_is_sampled_from(use: str, tiny_model_folder: Path, tmp_path: Path):
    """The two revisions are in a cache of the hub that the test fills."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("other", "b" * 40)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(tiny_model_folder, snapshot)
        model.save_pretrained(snapshot)
        (repository / "refs" / name).write_text(commit, encoding="utf-8")
        perturb(model)
    command = [sys.executable, "-c", REVISIONS, use, str(repository / "snapshots" / ("b" * 40))]
    offline = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


REMOTE = """
from transformers import Qwen2ForCausalLM

class Ours(Qwen2ForCausalLM):
    ran = True
"""


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tiny_model_folder: Path, tmp_path: Path):
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    (tmp_path / "model" / "ours.py").write_text(REMOTE, encoding="utf-8")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "ours.Ours"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for trusted in (False, True):
        engine = make_engine(
            tmp_path / "model",
            EngineSection(use="transformers"),
            dtype="float32",
            max_model_len=64,
            trust_remote_code=trusted,
        )
        assert hasattr(engine._model, "ran") == trusted


@pytest.mark.engine
def test_vllm_leaves_the_trainers_class_alone_for_a_family_that_it_has_no_code_for(tmp_path: Path):
    """vLLM decorates the class of SmolLM3's layers: a model from before, and one from after, work all the same."""
    pytest.importorskip("vllm")
    options = PolicySection(model=str(save_tiny("smollm3", tmp_path)))
    before = build_policy(options).eval()
    engine = make_engine(
        tmp_path, EngineSection(use="vllm", cache_mb=16, max_concurrent=8), dtype="float32", max_model_len=64
    )
    try:
        perturb(before.base)
        engine.load(before.weights(), version=1)
        [[completion]] = engine.generate([[5, 6, 7, 8]], Sampling(max_tokens=16, ignore_eos=True), seeds=[1])
        tokens = torch.tensor([[5, 6, 7, 8, *completion.tokens]])
        mask = torch.arange(20)[None] >= 4
        with torch.no_grad():
            logp = before(tokens, mask)[0][0, 4:]
            build_policy(options)(tokens, mask)
        torch.testing.assert_close(logp, torch.tensor(completion.logps), atol=1e-4, rtol=0)
        save_model(before, load_tokenizer(options), tmp_path / "saved", torch.float32)
        assert (tmp_path / "saved" / "model.safetensors").exists()
    finally:
        engine.close()
