"""Arithmetic of prefix scores, and the engine of tables."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from exact_world import PROMPT, make_world
from function_score import FunctionScore
from tabular_engine import TabularEngine
from test_decoding_scores import WORLD, prefix_of, table_distribution

from posttrain.decoding.model_scores import LogRatio
from posttrain.decoding.prefix_scores import PathLogp, Product, TextScore, next_scores, sum_scores
from posttrain.decoding.prefixes import Prefix
from posttrain.engines.base import Sampling

# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_path_log_probs_by_length():
    prefix = Prefix(tokens=[9, 1, 2, 3], start=1, logps=[-1.0, -2.0, -3.0], steps=2)
    start = Prefix(tokens=[9], start=1)
    for alpha, expected_value in ((0.0, -6.0), (0.5, -6 / math.sqrt(2)), (1.0, -3.0)):
        assert PathLogp(alpha=alpha).score([prefix, start]).tolist() == pytest.approx([expected_value, 0.0])
    assert PathLogp(alpha=1.0, unit="tokens").score([prefix]).tolist() == pytest.approx([-2.0])


def test_products_and_sums():
    two = FunctionScore(function=lambda prefixes: [4.0] * len(prefixes))
    three = FunctionScore(function=lambda prefixes: [3.0] * len(prefixes), scale=2.0, kind="max")
    prefixes = [prefix_of(()), prefix_of((1,))]
    assert Product([(0.5, two), (1.0, three)]).score(prefixes).tolist() == [12.0, 12.0]
    total = sum_scores((0.5, two), (-1.0, three))
    assert total.score(prefixes).tolist() == [-4.0, -4.0]
    assert total.kind == "other" and sum_scores((2.0, two)).kind == "mean"
    with pytest.raises(ValueError, match="not negative"):
        Product([(1.0, FunctionScore(function=lambda prefixes: [-1.0] * len(prefixes)))]).score(prefixes)
    with pytest.raises(ValueError, match=r"2 prefixes has shape \[1\]"):
        FunctionScore(function=lambda prefixes: [1.0]).score(prefixes)


def test_sums_of_ratios_emit_vectors():
    distribution = table_distribution(make_world(21))
    both = sum_scores((0.5, LogRatio(plus=distribution)), (2.0, LogRatio(minus=distribution)))
    assert torch.allclose(
        both.score_next([prefix_of((1,))]), -1.5 * LogRatio(plus=distribution).score_next([prefix_of((1,))])
    )


def test_texts_are_those_of_prompt_and_completion():
    asked = []

    def judge(prompts, texts):
        asked.extend(zip(prompts, texts, strict=True))
        return [float(len(text)) for text in texts]

    score = TextScore(function=judge, decode=lambda tokens: "".join("abc"[token] for token in tokens), scale=0.5)
    assert score.score([prefix_of((1, 2)), prefix_of(())]).tolist() == [1.0, 0.0]
    assert asked == [("a", "bc"), ("a", "")]


def test_candidates_are_scored_in_one_batch():
    sizes = []
    values = WORLD.mean_values()
    score = FunctionScore(
        function=lambda prefixes: sizes.append(len(prefixes)) or [values[tuple(p.generated)] for p in prefixes]
    )
    found = next_scores(score, [prefix_of(()), prefix_of((1,))], torch.tensor([[2, 0], [1, 2]]))
    assert found.tolist() == [[values[2,], values[0,]], [values[1, 1], values[1, 2]]]
    assert sizes == [4]


# ------------------------------------------------------------------------------------------------ the engine of tables


def test_the_tables_weights_are_replaced_and_checked():
    engine = WORLD.engine()
    other = make_world(31)
    tensor = torch.tensor([other.logits[prefix] for prefix in WORLD.logits], dtype=torch.float64)
    engine.load([("logits", tensor)], version=4)
    assert engine.version == 4
    assert engine.next_logps([PROMPT])[0].exp().tolist() == pytest.approx(other.next_distribution(()))
    with pytest.raises(ValueError, match=r"no prefix \[0, 9\]"):
        engine.next_logps([[0, 9]])
    with pytest.raises(ValueError, match="more than max_model_len 4"):
        engine.generate([PROMPT], Sampling(max_tokens=4))


def test_a_tables_samples_depend_on_their_own_seed_alone():
    engine = TabularEngine(WORLD.logits)
    together = engine.generate([PROMPT] * 3, WORLD.sampling, 2, seeds=[1, 2, 3])
    assert engine.generate([PROMPT], WORLD.sampling, 2, seeds=[3])[0] == together[2]
    assert functools.reduce(max, (len(set(map(str, group))) for group in together)) == 2
