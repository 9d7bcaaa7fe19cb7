"""Every decoder on the real engines: what the exact world promises holds for log-probs of a model."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from function_score import FunctionScore
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from posttrain.batch import Finish
from posttrain.decoding.answers import vote, weighted
from posttrain.decoding.candidate_cache import CachedValueScore, value_score
from posttrain.decoding.editing import Edited
from posttrain.decoding.model_scores import LogRatio, NextTokenValueScore, ValueScore, head_value, model_distribution
from posttrain.decoding.nodes import a_star_key, beam, best_first, most_visited, path_key, puct, where_moves_led
from posttrain.decoding.particles import keep, resample, tilted
from posttrain.decoding.population import Population
from posttrain.decoding.prefix_scores import RolloutScore, next_scores
from posttrain.decoding.prefixes import Prefix
from posttrain.decoding.refine import jacobi, model_greedy
from posttrain.decoding.rejection import Rejection
from posttrain.decoding.shaping import Shaped
from posttrain.decoding.tree import TreeSearch, sampled_steps, top_tokens
from posttrain.engines import make_engine
from posttrain.engines.base import Engine, Sampling
from posttrain.models.heads import Head
from posttrain.models.value import ValueModel, ValueSpec
from posttrain.recipe import sections
from posttrain.recipe.sections import EngineSection

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 60)), [5, 6, 7, 8, 200]]
SAMPLING = Sampling(max_tokens=8, temperature=0.8)


pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest, tiny_model_folder: Path):
    if request.param == "vllm":
        pytest.importorskip("vllm")
    made = make_engine(
        tiny_model_folder,
        EngineSection(use=request.param, cache_mb=64, max_concurrent=64),
        dtype="float32",
        max_model_len=96,
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tuned(model):
    """The model with other weights: a proxy."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


def make_value_model(folder: Path, kind: str = "scalar") -> ValueModel:
    """A value model on the tiny decoder, with random weights in its head."""
    spec = ValueSpec(head=sections.HeadSection(type=kind), shift=0.5, scale=2.0)
    head = Head(spec.head, 64, 261)
    torch.manual_seed(2)
    nn.init.normal_(head.linear.weight, std=0.3)
    backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ValueModel(backbone, head, spec).eval().requires_grad_(False)


def low_tokens(prefixes) -> list[float]:
    """Share of generated tokens below 100: something that can be made larger."""
    return [sum(t < 100 for t in p.generated) / max(len(p.generated), 1) for p in prefixes]


LOW = FunctionScore(function=low_tokens)


@torch.no_grad()
def log_distributions(model, prompt, tokens, temperature: float = 0.8) -> torch.Tensor:
    logits = model(torch.tensor([list(prompt) + list(tokens)])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def check_base_log_probs(model, outputs) -> None:
    for prompt, completions in zip(PROMPTS, outputs, strict=True):
        for completion in completions:
            distribution = log_distributions(model, prompt, completion.tokens)
            expected = distribution.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-4)
            assert completion.finish is Finish.STOPPED or len(completion.tokens) == SAMPLING.max_tokens


def check_repeats(decoder: Engine) -> list:
    """The decoder's completions; those of a prompt are the same without the other prompts."""
    assert isinstance(decoder, Engine)
    outputs = decoder.generate(PROMPTS, SAMPLING, 2, seeds=[1, 2, 3, 4])
    alone = decoder.generate(PROMPTS[1:2], SAMPLING, 2, seeds=[2])
    assert [c.tokens for c in alone[0]] == [c.tokens for c in outputs[1]]
    return outputs


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_proxy_tuning_multiplies_distributions(engine: Engine, model, tuned, strength: float):
    score = LogRatio(plus=model_distribution(tuned), minus=model_distribution(model))
    outputs = check_repeats(Shaped(engine, score, strength=strength))
    for prompt, completions in zip(PROMPTS, outputs, strict=True):
        for completion in completions:
            base = log_distributions(model, prompt, completion.tokens)
            ratio = log_distributions(tuned, prompt, completion.tokens, 1.0) - log_distributions(
                model, prompt, completion.tokens, 1.0
            )
            shaped = (base + strength * ratio).log_softmax(-1)
            chosen = torch.tensor(completion.tokens)[:, None]
            assert torch.allclose(torch.tensor(completion.logps), shaped.gather(-1, chosen)[:, 0], atol=1e-3)
            kl = (shaped.exp() * (shaped - base)).sum()
            assert completion.measured["kl"] == pytest.approx(float(kl), abs=1e-3)
            assert completion.measured["base_logp"] == pytest.approx(float(base.gather(-1, chosen).sum()), abs=1e-3)
            assert completion.measured["scored"] == len(completion.tokens)


@pytest.mark.parametrize("rest", ["drop", "state"])
def test_a_value_model_shapes_its_top_candidates(engine: Engine, model, tiny_model_folder: Path, rest: str):
    value = make_value_model(tiny_model_folder)
    outputs = Shaped(engine, value_score(value), k=4, rest=rest).generate(PROMPTS[:2], SAMPLING, seeds=[1, 2])
    for prompt, (completion,) in zip(PROMPTS[:2], outputs, strict=True):
        base = log_distributions(model, prompt, completion.tokens)
        for t, token in enumerate(completion.tokens):
            prefix = [*prompt, *completion.tokens[:t]]
            bonus = base[t].topk(4)
            extended = torch.tensor([[*prefix, int(a)] for a in bonus.indices])
            values = value(extended, last(extended))[0][:, -1]
            now = torch.tensor([prefix])
            state = value(now, last(now))[0][0, -1] if rest == "state" else torch.tensor(-torch.inf)
            shaped = (base[t] + state).scatter(0, bonus.indices, bonus.values + values).log_softmax(-1)
            assert completion.logps[t] == pytest.approx(float(shaped[token]), abs=1e-3)


def last(tokens: torch.Tensor) -> torch.Tensor:
    states = torch.zeros_like(tokens, dtype=torch.bool)
    states[:, -1] = True
    return states


def test_greedy_decoding_under_a_shaper(engine: Engine, model):
    """Only tokens below 100 are wanted, at any price, and the most probable of them is taken."""
    score = FunctionScore(function=lambda prefixes: [float(prefix.tokens[-1] < 100) for prefix in prefixes])
    greedy = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)
    outputs = Shaped(engine, score, strength=50.0, k=200, rest="drop").generate(PROMPTS[:2], greedy)
    for prompt, (completion,) in zip(PROMPTS[:2], outputs, strict=True):
        distribution = log_distributions(model, prompt, completion.tokens, 1.0)
        assert completion.tokens == distribution[:, :100].argmax(-1).tolist()


def test_a_score_that_raises_is_raised_and_leaves_the_engine_as_it_was(engine: Engine):
    calls = []

    def broken(prefixes):
        calls.append(len(prefixes))
        return [1 / (3 - len(calls))] * len(prefixes)

    before = engine.generate(PROMPTS, SAMPLING, seeds=range(4))
    with pytest.raises(ZeroDivisionError):
        Shaped(engine, FunctionScore(function=broken), k=2).generate(PROMPTS, SAMPLING, seeds=range(4))
    assert len(calls) == 3
    assert [c[0].tokens for c in engine.generate(PROMPTS, SAMPLING, seeds=range(4))] == [c[0].tokens for c in before]


POPULATIONS = {
    "best-of-n": {"branch": 4},
    "soft best-of-n": {"branch": 4, "pick": tilted, "strength": 5.0},
    "blockwise": {"branch": 4, "block": 3},
    "beam": {"particles": 2, "branch": 2, "block": 2},
    "smc": {"particles": 4, "block": 2, "pick": resample, "final": weighted, "strength": 5.0},
    "majority": {
        "particles": 5,
        "pick": keep,
        "final": functools.partial(vote, answer=lambda tokens: tokens[0] % 2),
        "decode": tuple,
    },
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_populations(engine: Engine, model, name: str):
    outputs = check_repeats(Population(engine, LOW, **POPULATIONS[name]))
    check_base_log_probs(model, outputs)
    if name not in ("majority", "smc"):
        plain = engine.generate(PROMPTS, SAMPLING, 2, seeds=[1, 2, 3, 4])
        assert mean_score(outputs) > mean_score(plain)


def mean_score(outputs) -> float:
    scores = [low_tokens([Prefix(tokens=c.tokens, start=0)])[0] for completions in outputs for c in completions]
    return sum(scores) / len(scores)


def test_smc_with_a_shaped_proposal(engine: Engine, model, tuned):
    """Twists that are log-ratios of normalised distributions, with the same strength: all weights stay 1."""
    base_at_temperature = model_distribution(model, temperature=SAMPLING.temperature)
    score = LogRatio(plus=model_distribution(tuned), minus=base_at_temperature)
    proposal = Shaped(engine, score)
    decoder = Population(proposal, score, particles=3, block=3, pick=resample, final=weighted)
    for (completion,) in decoder.generate(PROMPTS[:2], SAMPLING, seeds=[1, 2]):
        assert completion.measured["log_z"] == pytest.approx(0.0, abs=1e-3)
        assert completion.measured["log_weight"] == pytest.approx(0.0, abs=1e-3)
    (outcome,) = decoder.populations(PROMPTS[:1], SAMPLING, seeds=[1], pinned=[[5, 6, 7, 8, 9, 10, 11, 12]])
    particles = outcome.particles
    assert [particle.log_weight for particle in particles] == pytest.approx([0.0] * 3, abs=1e-3)
    assert particles[0].prefix.generated == [5, 6, 7, 8, 9, 10, 11, 12]


def test_exact_draws_and_bounds_of_log_z(engine: Engine, model):
    """Low tokens make at most 1; 64 completions are enough to see which estimate of log Z lies on which side."""
    decoder = Rejection(engine, Population(engine, LOW, particles=2, block=2, pick=resample, strength=3.0), rounds=8)
    check_base_log_probs(model, check_repeats(decoder))
    (found,) = decoder.generate(PROMPTS[:1], SAMPLING, 64, seeds=[7])
    assert all(one.measured["accepted"] == 1.0 for one in found)
    lower, upper = (sum(one.measured[name] for one in found) / 64 for name in ("log_z", "log_z_upper"))
    plain = engine.generate(PROMPTS[:1], SAMPLING, 512, seeds=[8])
    weights = [math.exp(3.0 * low_tokens([Prefix(tokens=one.tokens, start=0)])[0]) for one in plain[0]]
    assert lower < math.log(sum(weights) / 512) < upper
    assert mean_score([found]) > mean_score(plain)


STEPS = functools.partial(sampled_steps, width=3, tokens=3)
SEARCHES = {
    "beam": {"select": functools.partial(beam, width=2)},
    "best-first": {"select": best_first, "paths": 1},
    "a*": {"select": functools.partial(best_first, key=a_star_key), "paths": 1, "process": LOW},
    "bfs-prover": {"select": functools.partial(best_first, key=functools.partial(path_key, alpha=0.5)), "paths": 1},
    "mcts": {"select": puct, "simulations": 8, "act": most_visited, "decide": where_moves_led, "delay": 1},
    "rollout": {"select": puct, "simulations": 40, "paths": 2},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_searches(engine: Engine, model, name: str):
    outputs = check_repeats(TreeSearch(engine=engine, score=LOW, propose=STEPS, **SEARCHES[name]))
    check_base_log_probs(model, outputs)
    if name not in ("bfs-prover",):  # it looks for probable paths
        assert mean_score(outputs) > mean_score(engine.generate(PROMPTS, SAMPLING, 2, seeds=[1, 2, 3, 4]))


def test_searches_over_tokens(engine: Engine, model):
    search = TreeSearch(
        engine=engine, score=LOW, propose=functools.partial(top_tokens, k=3), select=functools.partial(beam, width=2)
    )
    (tree,) = search.search(PROMPTS[:1], SAMPLING, seeds=[0])[0]
    distribution = log_distributions(model, PROMPTS[0], [0])[0]
    assert [child.step[0] for child in tree.root.children] == distribution.topk(3).indices.tolist()
    check_base_log_probs(model, search.generate(PROMPTS, SAMPLING, 1, seeds=range(4)))


def test_rewards_after_rollouts(engine: Engine):
    score = RolloutScore(engine=engine, reward=LOW, sampling=SAMPLING, completions=4)
    prefixes = [Prefix(tokens=[5, 6, 7, *extra], start=3) for extra in ([], [8], [8, 9, 10])]
    values = score.score(prefixes).tolist()
    assert all(0 <= value <= 1 for value in values) and values == score.score(prefixes).tolist()
    outputs = Population(engine, score, branch=2, block=4).generate(PROMPTS[:1], SAMPLING, seeds=[1])
    assert outputs[0][0].measured["scored"] == 2 * -(-len(outputs[0][0].tokens) // 4)


# ------------------------------------------------------------------------------------------- scores made of models


def prefixes_of(*lengths: int) -> list[Prefix]:
    return [Prefix(tokens=[5 + (7 * i + length) % 200 for i in range(length)], start=2) for length in lengths]


def test_values_are_read_at_the_last_token(tiny_model_folder: Path):
    value = make_value_model(tiny_model_folder)
    score = value_score(value)
    assert (score.kind, score.beta, score.scale) == ("mean", None, 2.0)
    prefixes = prefixes_of(3, 9, 5)
    one_by_one = []
    for prefix in prefixes:
        tokens = torch.tensor([prefix.tokens])
        one_by_one.append(float(value(tokens, last(tokens))[0][0, -1]))
    assert score.score(prefixes).tolist() == pytest.approx(one_by_one, abs=1e-5)


def test_values_of_every_next_token_are_those_of_the_extended_prefixes(tiny_model_folder: Path):
    score = value_score(make_value_model(tiny_model_folder, "per_token"))
    prefixes = prefixes_of(3, 9, 5)
    vectors = score.score_next(prefixes)
    assert vectors.shape == (3, 261)
    for token in (0, 100, 260):
        extended = [Prefix(tokens=[*prefix.tokens, token], start=2) for prefix in prefixes]
        assert torch.allclose(score.score(extended), vectors[:, token], atol=1e-5)


def test_per_token_heads_read_only_the_last_token(tiny_model_folder: Path):
    value = make_value_model(tiny_model_folder, "per_token")
    cached = value_score(value)
    plain = NextTokenValueScore(value)
    prefixes = prefixes_of(3, 9, 5)
    for _ in range(4):
        vectors = cached.score_next(prefixes)
        assert torch.allclose(vectors, plain.score_next(prefixes), atol=1e-5)
        prefixes = [
            Prefix(tokens=[*prefix.tokens, int(best)], start=2)
            for prefix, best in zip(prefixes, vectors.argmax(-1), strict=True)
        ]
    assert cached.candidate_cache.computed == {"prefixes": 3, "candidates": 3 * 4}


def test_distributions_of_models_in_batches(model):
    distribution = model_distribution(model, temperature=0.8)
    prefixes = prefixes_of(3, 9, 5, 2)
    paths, following = distribution(prefixes)
    for prefix, path, row in zip(prefixes, paths, following, strict=True):
        distributions = log_distributions(model, prefix.tokens[:2], [*prefix.generated, 0])
        expected = distributions[:-1].gather(-1, torch.tensor(prefix.generated, dtype=torch.long)[:, None]).sum()
        assert float(path) == pytest.approx(float(expected), abs=1e-4)
        assert torch.allclose(row, distributions[-1], atol=1e-4)


def test_cached_values_are_those_of_whole_forward_passes(tiny_model_folder: Path):
    """Prefixes that go on with a candidate, with another token, that are new, that left, in another order."""
    value = make_value_model(tiny_model_folder)
    cached, plain = CachedValueScore(value), ValueScore(value)
    prefixes = prefixes_of(3, 9, 5)
    for turn in range(4):
        candidates = torch.tensor([[10 + turn, 20, 30 + row] for row in range(len(prefixes))])
        expected = next_scores(plain, prefixes, candidates)
        assert torch.allclose(next_scores(cached, prefixes, candidates), expected, atol=1e-5)
        assert torch.allclose(cached.score(prefixes), plain.score(prefixes), atol=1e-5)
        prefixes = [
            Prefix(tokens=[*p.tokens, int(c[turn % 3])], start=2) for p, c in zip(prefixes, candidates, strict=True)
        ]
        if turn == 1:
            prefixes = [prefixes[2], *prefixes_of(4, 70), prefixes[0]]
        if turn == 2:
            prefixes[0] = Prefix(tokens=[*prefixes[0].tokens[:-1], 99], start=2)
    assert cached.candidate_cache.computed == {"prefixes": 3 + 2 + 1, "candidates": 3 * (3 + 3 + 4 + 4)}
    with torch.no_grad():
        value.head.linear.weight.mul_(2.0)
    expected = next_scores(plain, prefixes, candidates)
    assert torch.allclose(next_scores(cached, prefixes, candidates), expected, atol=1e-5)  # old values are forgotten


def test_any_module_of_that_signature_is_a_value_model(tiny_model_folder: Path):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = AutoModel.from_pretrained(tiny_model_folder, dtype=torch.float32)

        def forward(self, tokens, states):
            return self.body(tokens).last_hidden_state.mean(-1) * states

    assert ValueScore(Bare().eval(), kind="soft", beta=0.1).score(prefixes_of(4, 6)).shape == (2,)


# ---------------------------------------------------------------------------------------------------------- editing


@pytest.fixture(scope="module")
def plain_engine(tiny_model_folder: Path):
    made = make_engine(tiny_model_folder, EngineSection(use="transformers"), dtype="float32", max_model_len=96)
    yield made
    made.close()


def test_editing_with_a_linear_value_is_a_logit_bias(plain_engine, model):
    torch.manual_seed(3)
    direction = torch.randn(64)
    decoder = Edited(plain_engine, lambda hidden: hidden @ direction, step_size=0.1, steps=3)
    outputs = check_repeats(decoder)
    bias = 0.1 * 3 * model.get_output_embeddings().weight @ direction / SAMPLING.temperature
    for prompt, completions in zip(PROMPTS, outputs, strict=True):
        for completion in completions:
            distribution = (log_distributions(model, prompt, completion.tokens) + bias).log_softmax(-1)
            expected = distribution.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-4)
    check_base_log_probs(model, plain_engine.generate(PROMPTS, SAMPLING, seeds=range(4)))  # the hook is gone


def test_editing_raises_the_value_of_a_head(plain_engine, model, tiny_model_folder: Path):
    value = make_value_model(tiny_model_folder)
    plain = plain_engine.generate(PROMPTS, SAMPLING, 8, seeds=range(4))
    edited = Edited(plain_engine, head_value(value), step_size=0.05, steps=5).generate(
        PROMPTS, SAMPLING, 8, seeds=range(4)
    )
    assert [c.tokens for g in plain for c in g] != [c.tokens for g in edited for c in g]
    with torch.no_grad():
        hidden = value.hidden_states(torch.tensor([PROMPTS[0]]))
        read = value(torch.tensor([PROMPTS[0]]), last(torch.tensor([PROMPTS[0]])))[0][0, -1]
        assert float(head_value(value)(hidden)[0, -1]) == pytest.approx(float(read), abs=1e-5)


def test_jacobi_sweeps_of_a_model_are_its_greedy_completion(plain_engine, model):
    greedy = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    (completion,) = plain_engine.generate(PROMPTS[:1], greedy)[0]
    refined, changed = jacobi(model_greedy(model), PROMPTS[0], [9] * 8)
    assert refined == completion.tokens and 0 < changed <= 8
