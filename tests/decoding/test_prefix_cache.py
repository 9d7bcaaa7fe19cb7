"""Values of prefixes that grow by blocks: those of whole forward passes, for the new tokens alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_families import tiny_language_model

from posttrain.batch import Finish
from posttrain.decoding.candidate_cache import CachedValueScore, value_score
from posttrain.decoding.model_scores import ValueScore
from posttrain.decoding.prefix_cache import PrefixCache
from posttrain.decoding.prefixes import Prefix
from posttrain.models.heads import Head
from posttrain.models.value import ValueModel, ValueSpec
from posttrain.models.value_files import build_value
from posttrain.recipe.sections import HeadSection, PolicySection, ValueSection


@pytest.fixture
def value(tiny_model_folder: Path):
    torch.manual_seed(0)
    model = build_value(ValueSection(), PolicySection(model=str(tiny_model_folder)))
    torch.nn.init.normal_(model.head.linear.weight)
    return model.eval().requires_grad_(False)


def grown(prefix: Prefix, length: int, rng: random.Random, finish: Finish | None = None) -> Prefix:
    tokens = [*prefix.tokens, *(rng.randrange(5, 250) for _ in range(length))]
    return Prefix(tokens=tokens, start=prefix.start, finish=finish)


def test_values_in_blocks_are_those_of_whole_forward_passes(value):
    """Blocks of different lengths, particles that end, that are dropped, that are copied, and one from nowhere."""
    rng = random.Random(0)
    score, plain = CachedValueScore(value), ValueScore(value)
    parents = [Prefix(tokens=[rng.randrange(5, 250) for _ in range(3 + i)], start=3 + i) for i in range(5)]
    whole = 0
    for _ in range(4):
        children = [grown(parent, rng.randint(1, 9), rng) for parent in parents for _ in range(3)]
        children += [grown(parents[0], 4, rng, Finish.STOPPED), Prefix(tokens=[7, 8], start=1)]
        assert torch.allclose(score.score(children), plain.score(children), atol=1e-5)
        whole += sum(len(child.tokens) for child in children)
        parents = [children[i] for i in (0, 0, 4, 9, 13)]
    assert score.prefix_cache.tokens_read < 0.6 * whole


def test_only_new_tokens_are_read(value):
    rng = random.Random(0)
    reader = PrefixCache(value)
    start = Prefix(tokens=list(range(10, 20)), start=10)
    first = [grown(start, 4, rng) for _ in range(3)]
    reader.read(first)
    assert reader.tokens_read == 3 * 14
    second = [grown(first[1], 5, rng) for _ in range(100)]
    reader.read(second)
    assert reader.tokens_read == 3 * 14 + 100 * 5
    reader.read(
        [second[0]]
    )  # itself, not a continuation of it: what came before its last token was not kept as a prefix
    assert reader.tokens_read == 3 * 14 + 100 * 5 + 19


def test_nothing_is_kept_of_what_has_ended_or_takes_too_much_memory(value):
    rng = random.Random(0)
    start = Prefix(tokens=list(range(10, 20)), start=10)
    ended = [grown(start, 4, rng, Finish.LENGTH)]
    reader, small = PrefixCache(value), PrefixCache(value, memory_mb=0)
    for own, prefixes in ((reader, ended), (small, [grown(start, 4, rng)])):
        own.read(prefixes)
        own.read([grown(prefixes[0], 1, rng)])
        assert own.tokens_read == 14 + 15


def test_values_of_other_weights_are_forgotten(value):
    rng = random.Random(0)
    score, plain = CachedValueScore(value), ValueScore(value)
    before = [Prefix(tokens=list(range(10, 20)), start=10)]
    score.score(before)
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.mul_(1.1)
    after = [grown(before[0], 3, rng)]
    assert torch.allclose(score.score(after), plain.score(after), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "eager"), ("mistral", "sdpa"), ("bloom", "eager"), ("mpt", "eager")]
)
def test_kernels_and_windows_that_caches_do_not_fit(family, attention):
    """The eager kernel adds its mask; sliding windows and ALiBi see columns, so they are read without a cache."""
    changes = {"sliding_window": 8} if family == "mistral" else {}
    model = tiny_language_model(family, **changes)
    model.set_attn_implementation(attention)
    value = ValueModel(model.get_decoder(), Head(HeadSection(), 64, 261), ValueSpec()).eval()
    torch.nn.init.normal_(value.head.linear.weight, std=0.3)
    score, plain, rng = value_score(value), ValueScore(value), random.Random(0)
    prefixes = [Prefix(tokens=[rng.randrange(5, 250) for _ in range(9 + i)], start=9 + i) for i in range(3)]
    for _ in range(3):
        assert torch.allclose(score.score(prefixes), plain.score(prefixes), atol=1e-5)
        prefixes = [grown(prefix, 3, rng) for prefix in prefixes]
