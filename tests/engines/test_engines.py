"""Tests of the contract of engines, on both engines: sampling, and loads of weights."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from engine_checks import MAX_MODEL_LEN, PROMPTS, SAMPLING, largest_error, log_distributions, perturb
from transformers import AutoModelForCausalLM

from posttrain.batch import Finish
from posttrain.engines import make_engine, vllm_cpu
from posttrain.engines.base import Completion, Engine, Sampling, WeightMismatch
from posttrain.engines.weights import load_verified
from posttrain.recipe.sections import EngineSection

EOS = 1  # end-of-sequence token of the tiny model


def ambient_state() -> list:
    """State of the process that an engine shares with a trainer and must not change."""
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
    sampler = make_engine(tiny_model_folder, options, dtype="float32", max_model_len=MAX_MODEL_LEN)
    sampler.generate(PROMPTS, SAMPLING, seeds=range(4))
    assert ambient_state() == before
    yield sampler
    sampler.close()
    sampler.close()
    with pytest.raises(RuntimeError, match="closed"):
        sampler.generate(PROMPTS, SAMPLING)


@pytest.fixture
def model(engine: Engine, tiny_model_folder: Path):
    """A transformers model with the engine's weights; the engine gets them back at the end."""
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    yield AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    engine.load(original.state_dict().items(), 0)


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
    """Log-prob by definition: min-p, then the k most probable tokens, then the smallest set of mass p; renormalised."""
    order = sorted(range(len(row)), key=lambda v: -row[v].item())
    order = [v for v in order if row[v] >= row[order[0]] + torch.tensor(max(sampling.min_p, 1e-30)).log()]
    order = order[: sampling.top_k or len(order)]
    mass = row[order].softmax(0).cumsum(0)
    allowed = order[: 1 + int((mass < sampling.top_p).sum())] if sampling.top_p < 1 else order
    return float(row[token] - row[allowed].logsumexp(0)) if token in allowed else float("nan")


def test_seeds_repeat_and_differ(engine: Engine):
    first = engine.generate(PROMPTS, SAMPLING, n=3, seeds=[1, 2, 3, 4])
    assert engine.generate(PROMPTS, SAMPLING, n=3, seeds=[1, 2, 3, 4]) == first
    other = engine.generate(PROMPTS, SAMPLING, n=3, seeds=[11, 12, 13, 14])
    samples = [tuple(completion.tokens) for row in first + other for completion in row]
    assert len(set(samples)) > 20  # of 24


def test_without_seeds_fresh_seeds_are_drawn(engine: Engine):
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
    """The prompts have 6,400 tokens and share no prefix; by default vLLM would cut some of them into pieces."""
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


def test_every_completion_is_reported_once_when_it_ends(engine: Engine):
    reported: dict[tuple[int, int], Completion] = {}

    def note(i: int, j: int, completion: Completion) -> None:
        assert (i, j) not in reported
        reported[i, j] = completion

    sampling = Sampling(max_tokens=60, stop_token_ids=tuple(range(150, 170)))
    outputs = engine.generate(PROMPTS, sampling, n=4, seeds=range(4), on_completion=note)
    assert reported == {(i, j): outputs[i][j] for i in range(4) for j in range(4)}
    lengths = [len(completion.tokens) for completion in reported.values()]
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


def test_an_engine_fits_the_protocol(engine: Engine):
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
    """Checksums are those of the plain weights, which cannot show an outdated copy. Log-probs can."""
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


def test_the_error_for_unknown_names_lists_the_names_of_the_engine():
    places = {f"model.layers.0.mlp.experts.{name}": torch.zeros(2) for name in ("w13_weight", "w2_weight")}
    sent = [("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(2))]
    with pytest.raises(WeightMismatch) as error:
        load_verified(sent, places, list)
    assert str(error.value) == (
        "the engine's model has no tensor 'model.layers.0.mlp.experts.gate_up_proj'; in model.layers.0.mlp.experts it "
        "has model.layers.0.mlp.experts.w13_weight, model.layers.0.mlp.experts.w2_weight. The engine arranges these "
        "weights in another way than Transformers, as vLLM does for a mixture of experts, so a load cannot be checked: "
        "set engine.use: transformers"
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
    """One bit of the copy in the engine differs from the tensor that was sent."""
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
