"""Fixtures of all tests: a tiny model on disk and random batches."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not pay for tiny models, here and in child processes

import tempfile
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Functions of these modules check the shapes in their signatures at every call that a test makes.
CHECKED = [f"posttrain.{name}" for name in ("batch", "models", "parts", "system.processes", "training.apply_parts")]
with install_import_hook(CHECKED, "beartype.beartype"):
    from random_batch import make_random_batch
    from tiny_model import make_tokenizer

    import posttrain.models.joint
    import posttrain.models.policy
    import posttrain.models.value
    import posttrain.system.processes
    import posttrain.training.apply_parts  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests() -> Iterator[None]:
    """Gives the tests a cache folder of their own for reference log-probs, instead of the user's."""
    with tempfile.TemporaryDirectory(prefix="posttrain-cache-") as folder:
        os.environ["POSTTRAIN_CACHE"] = folder
        yield
        del os.environ["POSTTRAIN_CACHE"]


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-shaped model of about 0.1M parameters with random weights, saved with its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32: the smallest that vLLM's CPU attention takes
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)  # wide enough that distributions are far from uniform
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path):
    """Function ``family_folder("Llama")`` that gives the folder of a saved tiny model of the family."""
    from tiny_values import save_family

    return functools.cache(lambda family: save_family(family, tmp_path_factory.mktemp(family), tiny_model_folder))


@pytest.fixture(scope="session")
def policy_options(tiny_model_folder: Path):
    """Section ``policy:`` of a recipe with the tiny model."""
    from posttrain.recipe.sections import PolicySection

    return PolicySection(model=str(tiny_model_folder))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path):
    """The tokenizer of the tiny model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def random_batch():
    """Function ``random_batch(seed, groups=..., size=..., columns=..., prompt=...)`` that makes a batch."""
    return make_random_batch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts fast tests first, so that they fail before the slow ones start."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)
