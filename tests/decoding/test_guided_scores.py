"""Scores of recipes: rollouts, TQ* and SVDD-PM on the exact world; verifiers and reward models that read text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from exact_world import PROMPT, String, World, distance, distribution_of, make_world, table_score, tokens_of
from test_decoding_scores import Strata, as_world, expected, quarters
from tiny_model import make_tokenizer
from tiny_values import save_random_value
from transformers import AutoModelForTokenClassification, AutoTokenizer

from posttrain.decoding import decoders, scores
from posttrain.decoding.context import DecoderContext
from posttrain.decoding.particles import tilted
from posttrain.decoding.population import Population
from posttrain.decoding.prefixes import Prefix
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.engines.base import Engine
from posttrain.errors import RecipeError
from posttrain.models.value import ValueSpec
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Part
from reward_models import outcome

RECIPES = Path(__file__).parents[2] / "recipes" / "decode"


def context_of(**engines: Engine) -> DecoderContext:
    return DecoderContext(tokenizer=None, device=torch.device("cpu"), engines=engines)  # type: ignore[arg-type]


def decoder_of(name: str, world: World, tilt: dict[String, float] | None = None, **changes) -> Part:
    """A shipped recipe's decoder with rewards, and weights of completions, from tables."""
    part = load_as(DecodeRecipe, RECIPES / f"{name}.yaml").decoder
    assert part is not None
    score = part.options["score"]
    given = {"reward": lambda context: table_score(world.reward), "max_tokens": world.length}
    given |= {} if tilt is None else {"tilt": lambda context: table_score(tilt)}
    score = Part.of(score.target, **{**score.options, **given, **changes})
    return Part.of(part.target, **{**part.options, "score": score, "strength": 1 / world.beta})


def shaped_by(world: World, values: dict[String, float]) -> dict[String, float]:
    """Π_t p0 exp(Q / α) / Z_t, string by string."""
    distribution = dict.fromkeys(world.strings, 1.0)
    for y, t in itertools.product(distribution, range(world.length)):
        weights = [p * math.exp(values[*y[:t], a] / world.beta) for a, p in enumerate(world.next_distribution(y[:t]))]
        distribution[y] *= weights[y[t]] / sum(weights)
    return distribution


def decoded(decoder: Part, world: World, context: DecoderContext) -> dict[String, float]:
    return distribution_of(
        lambda made: tokens_of(decoder(world.engine(made), context).generate([PROMPT], world.sampling))
    )


def test_direct_transfer_guides_by_the_mean_reward_of_the_aligned_policys_rollouts() -> None:
    aligned = quarters()
    plain = make_world(8, vocabulary=2, length=3)
    decoder = decoder_of("tq_star", aligned, policy="aligned", completions=64, temperature=1.0, horizon=None)
    distribution = decoded(decoder, plain, context_of(aligned=aligned.engine(Strata(64))))
    expected_distribution = shaped_by(World(plain.logits, aligned.reward, 2, 3), aligned.mean_values())
    assert distance(distribution, expected_distribution) < 1e-12
    assert distance(distribution, plain.strings) > 0.01


def test_indirect_transfer_guides_by_the_value_of_the_policy_aligned_to_the_reward_itself() -> None:
    """ρ_BL ∝ p exp(r_BL / β); with weights exp((r - r_BL) / β) its rollouts have the value of p exp(r / β) / Z."""
    aligned = quarters()
    beta, other = aligned.beta, {y: 0.3 * len(set(y)) - 0.2 * y[0] for y in aligned.reward}
    weights = {y: p * math.exp(-other[y] / beta) for y, p in aligned.strings.items()}
    plain = as_world(aligned, {y: w / sum(weights.values()) for y, w in weights.items()})
    tilt = {y: (r - other[y]) / beta for y, r in aligned.reward.items()}
    decoder = decoder_of("tq_star_indirect", aligned, tilt, policy="aligned", completions=64)
    distribution = decoded(decoder, plain, context_of(aligned=aligned.engine(Strata(64))))
    values = expected(plain, plain.tilted(), lambda y, prefix: plain.reward[y])
    assert distance(distribution, shaped_by(plain, values)) < 1e-10


def test_the_posterior_mean_guess_draws_among_candidates_by_the_reward_of_their_greedy_completions() -> None:
    world = make_world(9, vocabulary=2, length=2)
    options = decoder_of("svdd_pm", world).options

    def run(made) -> String:
        engine = world.engine(made)
        score, rules = options["score"](context_of().on(engine)), {"pick": tilted, "strength": options["strength"]}
        population = Population(engine, score, branch=2, block=1, make_chooser=made, **rules)
        return tokens_of(population.generate([PROMPT], world.sampling))

    distribution = distribution_of(run)

    def guess(string: String) -> float:
        while not world.ended(string):
            string = (*string, max(range(2), key=lambda a: world.next_distribution(string)[a]))
        return math.exp(world.reward[string] / world.beta)

    exact = dict.fromkeys(world.strings, 1.0)
    for y, t in itertools.product(exact, range(2)):
        p, chosen = world.next_distribution(y[:t]), 0.0
        for pair in itertools.product(range(2), repeat=2):
            weights = [guess((*y[:t], a)) for a in pair]
            share = sum(w for a, w in zip(pair, weights, strict=True) if a == y[t]) / sum(weights)
            chosen += p[pair[0]] * p[pair[1]] * share
        exact[y] *= chosen
    assert distance(distribution, exact) < 1e-12


def test_rollouts_are_no_longer_than_completions(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    score = "{use: rollout, reward: {use: path_logp}, max_tokens: 9}"
    path.write_text(
        "policy: {model: m}\ndata: {path: d.jsonl}\nsampling: {max_tokens: 8}\n"
        f"decoder: {{use: population, score: {{use: logarithm, of: {score}}}}}\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match=r"r.yaml:4:\d+: decoder.score.of.max_tokens: .* `sampling.max_tokens: 8`"):
        load_as(DecodeRecipe, path)


def test_what_a_rollout_cannot_do_without_is_named() -> None:
    reward = Part.of(scores.path_logp)
    with pytest.raises(RecipeError, match="needs the engine"):
        scores.rollout(context_of(), reward=reward, max_tokens=3)
    with pytest.raises(RecipeError, match="needs `beta`"):
        scores.rollout(context_of().on(make_world().engine()), reward=reward, max_tokens=3, kind="soft")


def test_a_rollout_is_of_the_engine_that_is_guided() -> None:
    world = quarters()
    engine = world.engine(Strata(64))
    built = decoders.population(
        engine,
        context_of(),
        score=Part.of(scores.rollout, reward=lambda context: table_score(world.reward), max_tokens=3, completions=64),
    )
    assert built.score.engine is engine  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------- scores that are handed text


def score_of(folder: Path, text: str) -> Part:
    """The score of a decode recipe."""
    path = folder / "r.yaml"
    path.write_text(
        f"policy: {{model: m}}\ndata: {{path: d.jsonl}}\ndecoder: {{use: population, score: {text}}}\n",
        encoding="utf-8",
    )
    decoder = load_as(DecodeRecipe, path).decoder
    assert decoder is not None
    return decoder.options["score"]


def prefix(tokenizer, prompt: str, completion: str) -> Prefix:
    start = tokenizer.encode(prompt)
    return Prefix(tokens=[*start, *tokenizer.encode(completion)], start=len(start))


def test_a_verifier_scores_what_is_there_so_far(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    context = DecoderContext(tokenizer=tokenizer, device=torch.device("cpu"))
    score = score_of(tmp_path, "{use: verifier, of: {use: length, minimum: 3, margin: 3, unit: words}}")(context)
    prefixes = [prefix(tokenizer, "three words here", text) for text in ("", "one", "one two three")]
    assert score.score(prefixes).tolist() == [0.25, 0.5, 1.0]
    with pytest.raises(RecipeError, match=r"r.yaml:3:\d+: decoder.score.of: option 'answer' is missing"):
        score_of(tmp_path, "{use: verifier, of: {use: exact}}")


def test_a_reward_part_that_reads_no_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not read texts"):
        score_of(tmp_path, "{use: text, of: {use: process, model: m}}")(context_of())


@pytest.mark.engine
def test_a_reward_model_with_a_tokenizer_of_its_own_is_handed_text(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    save_random_value(tmp_path / "reward", tiny_model_folder, ValueSpec(head=sections.HeadSection(type="scalar")))
    context = DecoderContext(tokenizer=tokenizer, device=torch.device("cpu"))
    score = score_of(tmp_path, f"{{use: text, of: {{use: outcome, model: {tmp_path / 'reward'}, input: text}}}}")(
        context
    )
    found = score.score([prefix(tokenizer, "1+1=", "2"), prefix(tokenizer, "1+1=", "11")])
    expected = outcome(model=str(tmp_path / "reward"), input="text").of_texts(["1+1=", "1+1="], ["2", "11"])
    torch.testing.assert_close(found.float(), expected)
    assert found[0] != found[1]


@pytest.mark.engine
def test_a_process_model_scores_completions_by_their_steps(tmp_path: Path, tiny_model_folder: Path) -> None:
    """At the last token of every step: what a plain forward pass says of the text that ends there."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    save_random_value(
        tmp_path / "prm", tiny_model_folder, ValueSpec(head=sections.HeadSection(type="bernoulli")), std=0.03
    )
    context = DecoderContext(tokenizer=tokenizer, device=torch.device("cpu"))

    def scores_by(aggregate: str, completions: list[str]) -> list[float]:
        text = f"{{use: process, model: {tmp_path / 'prm'}, aggregate: {aggregate}}}"
        return score_of(tmp_path, text)(context).score([prefix(tokenizer, "1+1=", one) for one in completions]).tolist()

    steps = ["1 + 1\n", "is\n\n", "2\n"]
    ends = ["".join(steps[: count + 1]) for count in range(3)]
    values = scores_by("last", ends)
    assert len(set(values)) == 3 and all(0 < value < 1 for value in values)
    whole = [ends[-1], ends[0], ends[0] + "is"]
    first, unfinished = values[0], scores_by("last", [ends[0] + "is"])[0]
    assert scores_by("last", whole) == pytest.approx([values[-1], first, unfinished], rel=1e-4)
    assert scores_by("product", whole) == pytest.approx([math.prod(values), first, first * unfinished], rel=1e-4)
    assert scores_by("min", whole) == pytest.approx([min(values), first, min(first, unfinished)], rel=1e-4)
    assert scores_by("mean", whole) == pytest.approx([sum(values) / 3, first, (first + unfinished) / 2], rel=1e-4)
    plain = scores_of_text(tmp_path / "prm", ["1+1=" + end for end in ends], tokenizer)
    assert values == pytest.approx(plain, rel=1e-4)


@torch.inference_mode()
def scores_of_text(folder: Path, texts: list[str], tokenizer) -> list[float]:
    """The probability at the last token, by transformers alone."""
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32)
    logits = [model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0, -1] for text in texts]
    return [float(one.sigmoid() if one.numel() == 1 else one.softmax(-1)[1]) for one in logits]
