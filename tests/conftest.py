"""Shared fixtures: a tiny model on disk and random batches."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they bring, here and in children

import tempfile
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# The shapes in the signatures of what handles tensors are checked at every call that a test makes.
CHECKED = [
    f"posttrain.{name}" for name in ("batch", "compose", "heads", "models", "parts", "processes", "trained", "values")
]
with install_import_hook(CHECKED, "beartype.beartype"):
    import posttrain.models.joint
    import posttrain.models.policy
    import posttrain.models.value  # noqa: F401
    from posttrain.batch import Batch, Finish

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder: Path):
    """A byte-level tokenizer without merges: every string round-trips, 256 bytes plus a few special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=specials[2:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests() -> Iterator[None]:
    """Reference log-probs of tests do not go to the user's cache folder."""
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


def make_random_batch(seed: int = 0, *, groups: int = 3, size: int = 4, columns: int = 12, prompt: int = 3) -> Batch:
    """A batch with every field filled by random numbers: lengths differ, some tokens inside are not the policy's."""
    g = torch.Generator().manual_seed(seed)
    n = groups * size
    length = torch.randint(prompt + 1, columns + 1, (n,), generator=g)
    length[0] = columns
    column = torch.arange(columns)
    mask = (column >= prompt) & (column < length[:, None])
    mask &= (torch.rand(n, columns, generator=g) > 0.15) | (column == prompt)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(n, columns, generator=g) * scale * mask

    logp_old = -noise(1.0).abs()
    return Batch(
        tokens=torch.randint(5, 200, (n, columns), generator=g).where(column < length[:, None], 0),
        mask=mask,
        length=length,
        group=torch.arange(groups).repeat_interleave(size),
        finish=torch.where(torch.rand(n, generator=g) < 0.3, int(Finish.LENGTH), int(Finish.STOPPED)),
        logp_sampler=logp_old + noise(0.05),
        version=torch.zeros(n, dtype=torch.long),
        step_id=torch.where(mask, column[None] // 4, -1),
        baseline_only=torch.zeros(n, dtype=torch.bool),
        rows=tuple({"answer": str(i)} for i in range(n)),
        texts=tuple(f"text {i}" for i in range(n)),
        score=(reward := torch.randint(0, 2, (n,), generator=g).float()),
        reward=reward + 0.1 * torch.randn(n, generator=g),
        step_reward=noise(0.1),
        logp_old=logp_old,
        logp_ref=logp_old + noise(0.2),
        entropy=noise(1.0).abs(),
        value=noise(0.3),
        advantage=noise(1.0),
        target=noise(1.0),
        loss_share=mask / mask.sum(),
    )


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path):
    """``family_folder("Llama")`` -> a saved tiny model of the family."""
    from tiny_values import save_family

    return functools.cache(lambda family: save_family(family, tmp_path_factory.mktemp(family), tiny_model_folder))


@pytest.fixture(scope="session")
def policy_options(tiny_model_folder: Path):
    """The tiny model as a recipe's ``policy:``."""
    from posttrain.recipe.sections import PolicySection

    return PolicySection(model=str(tiny_model_folder))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path):
    """The tokenizer of the tiny model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def random_batch():
    """``random_batch(seed, groups=..., size=..., columns=..., prompt=...)`` -> Batch."""
    return make_random_batch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a mistake shows before the slow ones start."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)
