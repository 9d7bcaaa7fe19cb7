"""The contract of an engine, kept by both engines, and what each promises beyond it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.batch import Finish
from posttrain.engines import make_engine, vllm_cpu
from posttrain.engines.base import Completion, Engine, Sampling, WeightMismatch
from posttrain.engines.weights import load_verified
from posttrain.recipe.sections import EngineSection

MAX_MODEL_LEN = 160
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 90)), [5, 6, 7, 8, 200]]
SAMPLING = Sampling(max_tokens=24, temperature=0.7)
EOS = 1  # of the tiny model


def ambient_state() -> list:
    """Everything of the process that an engine shares with a trainer and must leave alone."""
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.is_grad_enabled(),
        torch.distributed.is_initialized(),
        sys.excepthook,
        {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
    ]


@pytest.fixture(
    scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.engine)], ids=lambda name: name
)
def engine(request: pytest.FixtureRequest, tiny_model_folder: Path):
    if request.param == "vllm":
        pytest.importorskip("vllm")
    before = ambient_state()
    options = EngineSection(use=request.param, cache_mb=64, max_concurrent=64)
    made = make_engine(tiny_model_folder, options, dtype="float32", max_model_len=MAX_MODEL_LEN)
    made.generate(PROMPTS, SAMPLING, seeds=range(4))
    assert ambient_state() == before
    yield made
    made.close()
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.generate(PROMPTS, SAMPLING)


@pytest.fixture
def model(engine: Engine, tiny_model_folder: Path):
    """A transformers model with the engine's weights; the engine gets them back at the end."""
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    yield AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    engine.load(original.state_dict().items(), 0)


@torch.no_grad()
def log_distributions(model, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """[tokens, V]: the model's distribution at each token of the completion, by a plain forward pass."""
    logits = model(torch.tensor([prompt + completion.tokens])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def largest_error(model, outputs: list[list[Completion]], temperature: float) -> float:
    """Between the engine's log-probs and the model's."""
    errors = []
    for prompt, completions in zip(PROMPTS, outputs, strict=True):
        for completion in completions:
            expected = log_distributions(model, prompt, completion, temperature)
            expected = expected.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            errors.append((expected - torch.tensor(completion.logps)).abs().max())
    return float(max(errors))


@torch.no_grad()
def perturb(model, scale: float = 0.02) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * scale)


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_log_probs_are_the_models_at_the_temperature(engine: Engine, model, temperature: float):
    outputs = engine.generate(PROMPTS, Sampling(max_tokens=24, temperature=temperature), n=3, seeds=range(4))
    assert largest_error(model, outputs, temperature) < 1e-4


def test_greedy_takes_the_most_probable_token(engine: Engine, model):
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    outputs = engine.generate(PROMPTS, sampling)
    for prompt, (completion,) in zip(PROMPTS, outputs, strict=True):
        expected = log_distributions(model, prompt, completion, 1.0)
        assert completion.tokens == expected.argmax(-1).tolist()
    assert largest_error(model, outputs, 1.0) < 1e-4


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=16, temperature=0.7, top_k=7),
        Sampling(max_tokens=16, temperature=0.7, top_p=0.6),
        Sampling(max_tokens=16, temperature=0.7, min_p=0.2),
        Sampling(max_tokens=16, temperature=1.3, top_p=0.8, top_k=20, min_p=0.05),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_log_probs_of_a_filtered_distribution_are_renormalised(engine: Engine, model, sampling: Sampling):
    outputs = engine.generate(PROMPTS, sampling, n=2, seeds=range(4))
    for prompt, completions in zip(PROMPTS, outputs, strict=True):
        for completion in completions:
            full = log_distributions(model, prompt, completion, sampling.temperature)
            for token, logp, row in zip(completion.tokens, completion.logps, full, strict=True):
                assert logp == pytest.approx(filtered_logp(row, token, sampling), abs=1e-4)


def filtered_logp(row: torch.Tensor, token: int, sampling: Sampling) -> float:
    """By definition: min-p, then the k most probable, then the smallest set of mass p; renormalised."""
    order = sorted(range(len(row)), key=lambda v: -row[v].item())
    order = [v for v in order if row[v] >= row[order[0]] + torch.tensor(max(sampling.min_p, 1e-30)).log()]
    order = order[: sampling.top_k or len(order)]
    mass = row[order].softmax(0).cumsum(0)
    kept = order[: 1 + int((mass < sampling.top_p).sum())] if sampling.top_p < 1 else order
    return float(row[token] - row[kept].logsumexp(0)) if token in kept else float("nan")


def test_seeds_repeat_and_differ(engine: Engine):
    first = engine.generate(PROMPTS, SAMPLING, n=3, seeds=[1, 2, 3, 4])
    assert engine.generate(PROMPTS, SAMPLING, n=3, seeds=[1, 2, 3, 4]) == first
    other = engine.generate(PROMPTS, SAMPLING, n=3, seeds=[11, 12, 13, 14])
    samples = [tuple(completion.tokens) for row in first + other for completion in row]
    assert len(set(samples)) > 20  # of 24


def test_without_seeds_fresh_ones_are_drawn(engine: Engine):
    assert engine.generate(PROMPTS, SAMPLING) != engine.generate(PROMPTS, SAMPLING)


def test_a_sample_does_not_depend_on_its_batch(engine: Engine):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (32,), generator=generator).tolist()
    prompts = [torch.randint(5, 200, (length,), generator=generator).tolist() for length in lengths]
    together = engine.generate(prompts, SAMPLING, n=2, seeds=range(32))
    for i in (0, 7, 31):
        (alone,) = engine.generate([prompts[i]], SAMPLING, n=2, seeds=[i])
        assert [completion.tokens for completion in alone] == [completion.tokens for completion in together[i]]


def test_more_requests_than_fit_at_once_come_back_in_order(engine: Engine):
    prompts = [[10 + i, 11, 12 + i][: 1 + i % 3] for i in range(50)]
    outputs = engine.generate(prompts, Sampling(max_tokens=4), n=3, seeds=range(50))  # 150 of 64 at a time
    assert [len(row) for row in outputs] == [3] * 50
    for i in (0, 23, 49):
        (alone,) = engine.generate([prompts[i]], Sampling(max_tokens=4), n=3, seeds=[i])
        assert [completion.tokens for completion in alone] == [completion.tokens for completion in outputs[i]]


def test_more_prompt_tokens_than_a_step_computes(engine: Engine):
    """6,400 tokens of prompts that share no prefix; vLLM would cut some of them into pieces."""
    prompts = [[5 + i, *range(10, 138)] for i in range(50)]
    together = engine.generate(prompts, Sampling(max_tokens=2), seeds=range(50))
    assert [len(group) for group in together] == [1] * 50
    alone = engine.generate(prompts[41:42], Sampling(max_tokens=2), seeds=[41])
    assert alone[0][0].tokens == together[41][0].tokens


def test_finish_reasons(engine: Engine):
    sampling = Sampling(max_tokens=60, stop_token_ids=(150, 151, 152, 153))
    outputs = engine.generate(PROMPTS, sampling, n=16, seeds=range(4))
    completions = [completion for row in outputs for completion in row]
    for completion in completions:
        stopped = completion.tokens[-1] in (EOS, *sampling.stop_token_ids)
        assert completion.finish == (Finish.STOPPED if stopped else Finish.LENGTH)
        assert stopped or len(completion.tokens) == 60
        assert not {EOS, *sampling.stop_token_ids} & set(completion.tokens[:-1])
        assert len(completion.logps) == len(completion.tokens)
    assert {completion.finish for completion in completions} == {Finish.STOPPED, Finish.LENGTH}
    assert any(completion.tokens[-1] == EOS for completion in completions)


def test_end_of_sequence_can_be_ignored(engine: Engine):
    sampling = Sampling(max_tokens=60, temperature=2.0, ignore_eos=True)
    completions = [completion for row in engine.generate(PROMPTS, sampling, n=16, seeds=range(4)) for completion in row]
    assert {len(completion.tokens) for completion in completions} == {60}
    assert any(EOS in completion.tokens for completion in completions)


def test_every_completion_is_announced_once_when_it_ends(engine: Engine):
    announced: dict[tuple[int, int], Completion] = {}

    def note(i: int, j: int, completion: Completion) -> None:
        assert (i, j) not in announced
        announced[i, j] = completion

    sampling = Sampling(max_tokens=60, stop_token_ids=tuple(range(150, 170)))
    outputs = engine.generate(PROMPTS, sampling, n=4, seeds=range(4), on_completion=note)
    assert announced == {(i, j): outputs[i][j] for i in range(4) for j in range(4)}
    lengths = [len(completion.tokens) for completion in announced.values()]
    assert lengths[0] < lengths[-1]  # not all at the end


def test_an_exception_in_a_callback_leaves_the_engine_usable(engine: Engine):
    expected = engine.generate(PROMPTS, SAMPLING, seeds=range(4))

    def fail(i: int, j: int, completion: Completion) -> None:
        raise KeyError("from the callback")

    with pytest.raises(KeyError, match="from the callback"):
        engine.generate(PROMPTS, SAMPLING, n=4, seeds=range(4), on_completion=fail)
    assert engine.generate(PROMPTS, SAMPLING, seeds=range(4)) == expected


def test_a_prompt_that_leaves_no_room_is_named(engine: Engine):
    fits = [5] * (MAX_MODEL_LEN - 24)
    engine.generate([fits], Sampling(max_tokens=24))
    with pytest.raises(ValueError, match=f"prompt 1 has {MAX_MODEL_LEN - 23} tokens.* {MAX_MODEL_LEN}"):
        engine.generate([[5], [*fits, 5]], Sampling(max_tokens=24))
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        engine.generate([[5], [6], []], Sampling(max_tokens=24))


def test_an_engine_is_an_engine(engine: Engine):
    assert isinstance(engine, Engine)
    assert engine.generate([], SAMPLING) == []


# -------------------------------------------------------------------------------------------------------- weights


def test_log_probs_follow_twenty_weight_loads(engine: Engine, model):
    memory = []
    for version in range(1, 21):
        perturb(model)
        engine.load(((name, tensor) for name, tensor in model.named_parameters()), version)
        outputs = engine.generate(PROMPTS, SAMPLING, n=2, seeds=range(4))  # prompts that the prefix cache has seen
        assert largest_error(model, outputs, SAMPLING.temperature) < 1e-4
        assert {completion.version for row in outputs for completion in row} == {version} == {engine.version}
        memory.append(psutil.Process().memory_info().rss >> 20)
    assert memory[-1] - memory[4] < 20  # MiB


def test_a_load_reaches_the_copies_that_vllm_packs_for_its_kernels(engine: Engine, model, monkeypatch):
    """The checksums are of the plain weights and would not see a copy that stayed behind: the log-probs do."""
    layers = [layer for layer in engine._model.modules() if hasattr(layer, "cpu_linear")]
    if not layers:
        pytest.skip("nothing is packed: another engine, or a GPU")

    def error() -> float:
        outputs = engine.generate(PROMPTS, SAMPLING, seeds=range(4))
        return largest_error(model, outputs, SAMPLING.temperature)

    perturb(model, 0.1)
    engine.load(model.state_dict().items(), 1)
    assert error() < 1e-4
    perturb(model, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_cpu, "pack_weights", lambda model: None)
        engine.load(model.state_dict().items(), 2)
    assert error() > 0.01


def test_weights_under_other_names_are_told_with_what_the_engine_has():
    held = {f"model.layers.0.mlp.experts.{name}": torch.zeros(2) for name in ("w13_weight", "w2_weight")}
    sent = [("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(2))]
    with pytest.raises(WeightMismatch) as error:
        load_verified(sent, held, list)
    assert str(error.value) == (
        "the engine's model has no tensor 'model.layers.0.mlp.experts.gate_up_proj'; in model.layers.0.mlp.experts it "
        "has model.layers.0.mlp.experts.w13_weight, model.layers.0.mlp.experts.w2_weight. The engine arranges these "
        "weights otherwise than Transformers does, as vLLM does those of a mixture of experts, and then a load cannot "
        "be checked: set engine.use: transformers"
    )


def sabotage(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = tensors.pop(name)
    if how == "renamed":
        tensors["model.layers.1.self_attn.k_porj.weight"] = tensor
    elif how == "reshaped":
        tensors[name] = tensor.reshape(tensor.shape[1], tensor.shape[0])
    elif how == "added":
        tensors |= {name: tensor, "model.layers.2.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"]}
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dropped", r"not sent: model\.layers\.1\.self_attn\.k_proj\.weight$"),
        ("renamed", r"no tensor .*k_porj.weight'; did you mean 'model.layers.1.self_attn.k_proj.weight'\?"),
        ("reshaped", r"k_proj.weight' is \[64, 32\], the engine's is \[32, 64\]"),
        ("added", r"no tensor 'model.layers.2.mlp.up_proj.weight'"),
    ],
)
def test_a_load_of_other_tensors_is_refused(engine: Engine, model, how: str, message: str):
    perturb(model)
    with pytest.raises(WeightMismatch, match=message):
        engine.load(sabotage(model.state_dict(), how).items(), 1)
    assert engine.version == 0


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_one_changed_bit_of_any_tensor_is_detected(engine: Engine, model, name: str, monkeypatch: pytest.MonkeyPatch):
    """The last bit of one number is flipped between the copy and the check, or before the copy."""
    perturb(model)
    altered = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    altered[name].view(torch.int32).view(-1)[-1] ^= 1

    def load_altered(tensors, places, load):
        sent = list(tensors)
        load_verified(sent, places, lambda stream: load((key, altered[key]) for key, _ in stream))

    monkeypatch.setattr(sys.modules[type(engine).__module__], "load_verified", load_altered)
    with pytest.raises(WeightMismatch, match=f"one of 2. tensors .*: {name}$"):
        engine.load(model.named_parameters(), 1)
    monkeypatch.undo()
    engine.load(model.named_parameters(), 2)


def test_tied_weights_that_differ_are_detected(engine: Engine, model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in tensors
    engine.load(tensors.items(), 1)
    tensors["lm_head.weight"][3, 5] += 1
    with pytest.raises(WeightMismatch, match="weight"):
        engine.load(tensors.items(), 2)


def test_tensors_of_another_dtype_are_converted_first(engine: Engine, model):
    engine.load(((name, tensor.double()) for name, tensor in model.named_parameters()), 1)
    outputs = engine.generate(PROMPTS, SAMPLING, seeds=range(4))
    assert largest_error(model, outputs, SAMPLING.temperature) < 1e-4


def test_a_streamed_tensor_may_be_freed_after_it_was_used(engine: Engine, model):
    perturb(model)

    def stream():
        for name, tensor in model.named_parameters():
            gathered = tensor.detach().clone()
            yield name, gathered
            gathered.fill_(float("nan"))

    engine.load(stream(), 1)
    outputs = engine.generate(PROMPTS, SAMPLING, seeds=range(4))
    assert largest_error(model, outputs, SAMPLING.temperature) < 1e-4


# ------------------------------------------------------------------------------------------------- several processes


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
    assert first != second  # other prompts
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
    """In a cache of the hub, filled by hand with two revisions of a model."""
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
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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
