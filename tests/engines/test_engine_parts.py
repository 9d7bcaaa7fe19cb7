"""Tests of single parts of engines: checksums, random numbers, end tokens, and the choice of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_checks import MAX_MODEL_LEN, PROMPTS, SAMPLING, largest_error
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from posttrain.engines import make_engine
from posttrain.engines.base import Sampling
from posttrain.engines.ends import end_of_sequence_ids
from posttrain.engines.sampling import draw, filters, inverse_cdf, uniforms
from posttrain.engines.transformers import TransformersEngine
from posttrain.engines.weights import checksum
from posttrain.errors import RecipeError
from posttrain.recipe.sections import EngineSection
from posttrain.seeds import sample_seed

# ------------------------------------------------------------------------------------------- the parts of engines


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
    position=st.floats(0, 1, exclude_max=True),
)
def test_checksum_depends_on_every_bit_and_its_place(size: int, dtype: torch.dtype, seed: int, position: float):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    here = int(position * size)
    changed = tensor.clone()
    changed.view(bits)[here] ^= 1 << (seed % 15)
    assert checksum(changed) != checksum(tensor)
    assert checksum(tensor.clone()) == checksum(tensor)
    assert checksum(torch.cat([tensor[:1], tensor])[1:]) == checksum(tensor)  # at another address in memory
    there = (here + 1 + seed) % size
    swapped = tensor.clone()
    swapped[[here, there]] = tensor[[there, here]]
    assert bool(checksum(swapped) == checksum(tensor)) == bool(tensor[here] == tensor[there])


def test_checksum_of_a_part_is_that_of_a_copy():
    whole = torch.randn(300, 70)
    for part in (whole[:96], whole[96:97], whole[97:], whole[:, 3:5], whole[:0]):
        assert checksum(part) == checksum(part.clone())


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 1000))
def test_inverse_cdf_is_the_cumulative_search(size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(8, size, generator=generator) ** 20
    probs = probs.where(torch.rand(8, size, generator=generator) < 0.5, 0.0)
    probs[:, seed % size] += 1e-3
    uniform = torch.rand(8, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1.0 - 2**-53])
    tokens = inverse_cdf(probs, uniform)
    cumulative = probs.double().cumsum(-1)
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    assert tokens[2:].tolist() == expected[2:].tolist()
    assert (probs.gather(-1, tokens[:, None]) > 0).all()


def test_tokens_are_drawn_with_their_probabilities():
    """Frequencies in 20000 draws from 5 tokens are within 5 standard errors of the probabilities."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).expand(20000, 5)
    uniform = uniforms(range(20000), 1)[:, 0]
    tokens, logps = draw(logits, uniform, 0.8, filters(Sampling()))
    probs = (logits[0] / 0.8).softmax(-1)
    frequency = torch.bincount(tokens, minlength=5) / 20000
    assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / 20000).sqrt()).all()
    assert torch.allclose(logps.exp(), probs[tokens], atol=1e-6)


def test_uniform_numbers_belong_to_their_seed():
    together = uniforms([3, 1, 2], 10)
    assert torch.equal(together[1], uniforms([1], 10)[0])
    assert torch.equal(together[:, :4], uniforms([3, 1, 2], 4))


def test_sample_seeds_do_not_collide():
    seeds = {sample_seed(seed, sample) for seed in range(200) for sample in range(50)}
    assert len(seeds) == 10000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_transformers_engine_in_bfloat16(tiny_model_folder: Path):
    engine = TransformersEngine(tiny_model_folder, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16).eval()
    engine.load(model.float().named_parameters(), 1)  # exact: the float32 numbers were bfloat16 before
    outputs = engine.generate(PROMPTS, SAMPLING, seeds=range(4))
    assert largest_error(model, outputs, SAMPLING.temperature) < 0.2  # the model's forward pass is in float32


@pytest.mark.parametrize(
    ("generation", "model", "expected"), [([7, 8], 3, (7, 8)), (7, 3, (7,)), (None, 3, (3,)), (None, None, ())]
)
def test_end_of_sequence_tokens_are_the_models_own(tmp_path: Path, generation, model, expected: tuple[int, ...]):
    Qwen2Config(eos_token_id=model).save_pretrained(tmp_path)
    assert end_of_sequence_ids(tmp_path) == (() if model is None else (model,))
    GenerationConfig(eos_token_id=generation).save_pretrained(tmp_path)
    assert end_of_sequence_ids(tmp_path) == expected


# ------------------------------------------------------------------------------------------------------ make_engine


def test_options_of_vllm_are_checked_for_the_transformers_engine(tiny_model_folder: Path):
    options = EngineSection(use="transformers", options={"enforce_eager": True})
    with pytest.raises(RecipeError, match="engine.options: enforce_eager: .*vllm"):
        make_engine(tiny_model_folder, options, dtype="float32", max_model_len=64)


def test_vllm_missing_says_how_to_install_it(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install"):
        make_engine(tiny_model_folder, EngineSection(use="vllm"), dtype="float32", max_model_len=64)
    engine = make_engine(tiny_model_folder, EngineSection(), dtype="float32", max_model_len=64)
    assert isinstance(engine, TransformersEngine)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "message"), [("enforce_eagr", "did you mean 'enforce_eager'"), ("logprobs_mode", "sets this argument")]
)
def test_wrong_options_of_vllm_are_named(tiny_model_folder: Path, name: str, message: str):
    pytest.importorskip("vllm")
    options = EngineSection(use="vllm", options={name: True})
    with pytest.raises(RecipeError, match=f"engine.options.{name}: .*{message}"):
        make_engine(tiny_model_folder, options, dtype="float32", max_model_len=64)
