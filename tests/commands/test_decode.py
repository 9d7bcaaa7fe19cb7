"""``posttrain decode``, its recipes, and training on guided rollouts."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from exact_world import PROMPT, distribution_of, make_world, table_score
from runs import write_run
from served import recipe_file, serving
from tiny_values import save_random_value
from transformers import AutoTokenizer

from posttrain.batch import Finish, Outputs
from posttrain.commands.cli import main
from posttrain.commands.decode import run_decode
from posttrain.data.rollout_files import read_rollouts
from posttrain.decoding import decoders, scores
from posttrain.decoding.answers import mathematics, vote
from posttrain.decoding.checks import named_models
from posttrain.decoding.context import DecoderContext
from posttrain.decoding.prefixes import Prefix
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.decoding.shaping import GuideWarning
from posttrain.engines import make_engine
from posttrain.engines.base import Completion, Sampling
from posttrain.errors import RecipeError
from posttrain.models.value import ValueSpec
from posttrain.parts.weighting import truncated_importance
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Part
from posttrain.rollout.rollouts import Context, Prompts, single_turn
from posttrain.rollout.session import to_row
from posttrain.training.recipe import Recipe, load_recipe
from posttrain.training.required_passes import find_required_passes

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "decode").glob("*.yaml"))
SCORE = "score: {use: path_logp}"


def write(folder: Path, decoder: str, **changes: str) -> Path:
    """Writes a small decode recipe with its data, and returns its path."""
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+1", "answer": str(a + 1)}) + "\n" for a in range(4)), encoding="utf-8"
    )
    sections = {
        "policy": "{model: tiny}",
        "data": "{path: data.jsonl}",
        "decoder": decoder,
        "engine": "{use: transformers}",
        "sampling": "{max_tokens: 6}",
        "output": str(folder / "out.jsonl"),
    } | changes
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in sections.items() if text), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------- reading recipes


def test_parts_of_a_decoder_are_resolved_with_their_options(tmp_path):
    inner = "{use: weighted_sum, terms: [{use: path_logp, alpha: 1.0}, {use: log_ratio, minus: runs/x}]}"
    path = write(tmp_path, f"{{use: tree, score: {inner}, select: {{use: best_first, key: {{use: path_key}}}}}}")
    decoder = load_as(DecodeRecipe, path).decoder
    assert decoder is not None and decoder.target is decoders.tree
    first, second = decoder.options["score"].options["terms"]
    assert (first.target, second.target) == (scores.path_logp, scores.log_ratio)
    assert decoder.options["select"].options["key"].name == "path_key"


def test_models_are_looked_for_beside_the_recipe(tmp_path):
    (tmp_path / "critic").mkdir()
    path = write(tmp_path, "{use: shaped, score: {use: logarithm, of: {use: value, model: critic}}}")
    decoder = load_as(DecodeRecipe, path).decoder
    assert decoder is not None
    assert decoder.options["score"].options["of"].options["model"] == str(tmp_path / "critic")


MISTAKES = {
    "{use: shapd, " + SCORE + "}": ("recipe.yaml:3:11: decoder.use", "did you mean 'shaped'?"),
    "{use: shaped}": ("recipe.yaml:3:1: decoder", "option 'score' is missing"),
    "{use: shaped, score: {use: valu, model: x}}": ("recipe.yaml:3:32: decoder.score.use", "did you mean 'value'?"),
    "{use: shaped, " + SCORE + ", strenght: 2}": ("recipe.yaml:3:49: decoder.strenght", "did you mean 'strength'?"),
    "{use: shaped, " + SCORE + ", k: 2, head: 0.1}": ("recipe.yaml:3:55: decoder.head", "not both"),
    "{use: population, " + SCORE + ", pick: {use: softmax}}": ("decoder.pick.use", "passes (families, choose)"),
    "{use: population, " + SCORE + ", branch: 2, pick: {use: keep}}": ("decoder.pick", "top, tilted or resample"),
    "{use: rejection, population: {use: population, " + SCORE + "}}": ("decoder.population.pick", "resample or keep"),
    "{use: rejection, population: {use: population, pick: {use: resample}, branch: 2, " + SCORE + "}}": (
        "recipe.yaml:3:80: decoder.population.branch",
        "has one continuation",
    ),
    "{use: rejection, population: {use: population, strength: 0.0, pick: {use: keep}, " + SCORE + "}}": (
        "decoder.population.strength",
        "must be above 0",
    ),
    "{use: rejection, population: {use: shaped, " + SCORE + "}}": ("decoder.population.use", "of a `population`"),
}


@pytest.mark.parametrize("decoder", MISTAKES)
def test_mistakes_are_reported_with_their_place(tmp_path, capsys, decoder):
    assert main(["decode", str(write(tmp_path, decoder))]) == 2
    place, message = MISTAKES[decoder]
    printed = capsys.readouterr().err
    assert place in printed and message in printed, printed


def test_a_missing_model_is_reported_before_anything_is_loaded(tmp_path, capsys):
    path = write(tmp_path, "{use: population, final_score: {use: value, model: ./none}, " + SCORE + "}")
    assert main(["decode", str(path)]) == 2
    message = capsys.readouterr().err
    assert "recipe.yaml:3:" in message and "there is no folder './none'" in message


def test_cutting_the_distribution_twice_is_refused(tmp_path, capsys):
    path = write(tmp_path, "{use: shaped, " + SCORE + "}", sampling="{top_p: 0.9}")
    assert main(["decode", str(path)]) == 2
    assert "recipe.yaml:5:12: sampling.top_p: cuts the distribution" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("text", "answer"),
    [(r"so \boxed{1,200}", 1200), ("it is ... #### 72", 72), ("The answer is Paris.", "Paris"), ("dunno", None)],
)
def test_answers_of_mathematics(text, answer):
    assert mathematics(text) == answer


def test_the_majority_wins_a_vote():
    from posttrain.decoding.particles import Particle

    texts = ["#### 3", "#### 2", "none", "#### 2.0"]
    particles = [
        Particle(prefix=Prefix(tokens=[i], start=0), version=0, potential=float(i == 1)) for i in range(len(texts))
    ]
    assert vote(particles, lambda probabilities: 0, lambda tokens: texts[tokens[0]]) == 1


def test_a_row_has_the_measurements_and_null_for_infinity():
    completion = Completion([1, 2], [-1.0, -0.5], Finish.LENGTH, 0, {"generated": 8.0, "log_z": -math.inf})
    assert to_row("ab", completion) == {
        "completion": "ab",
        "tokens": 2,
        "finish": "length",
        "logp": -1.5,
        "generated": 8.0,
        "log_z": None,
    }


# ------------------------------------------------------------------------------------------------- guided rollouts


def decoder_context() -> DecoderContext:
    return DecoderContext(tokenizer=None, device=torch.device("cpu"))  # type: ignore[arg-type]  # scores read tables


def guided_recipe() -> tuple[dict[str, Any], Part]:
    """Decoder options and importance weights of recipes/guided.yaml, with two candidates instead of twenty."""
    recipe = load_recipe(RECIPES[0].parent.parent / "guided.yaml")
    assert recipe.decoder is not None and recipe.decoder.target is decoders.shaped
    (weight,) = recipe.loss[0].weights
    return {**recipe.decoder.options, "k": 2}, weight


@pytest.mark.parametrize("options", [{"strength": 1.5}, guided_recipe()[0]], ids=["all tokens", "the recipe's"])
def test_importance_weights_of_guided_rollouts_turn_means_into_those_of_the_policy(options):
    """Σ_y π(y) Π_t w_t(y) f(y) = E_{p0}[f] over every string of the exact world, with the weights of the loss."""
    world = make_world(seed=3, vocabulary=3, length=3, eos=True)
    score = table_score(world.mean_values())
    decoder = Part.of(decoders.shaped, **{**options, "score": lambda context: score})
    importance = guided_recipe()[1]
    assert importance.target is truncated_importance
    means: dict[str, float] = {"one": 0.0, "reward": 0.0}
    context = Context(sampling=world.sampling, decode=str)
    prompts = Prompts(tokens=[list(PROMPT)], rows=[{}], places=["x"], group=[0], seeds=[0])

    def run(make_chooser):
        batch = single_turn(decoder(world.engine(make_chooser), decoder_context()), prompts, 1, context)
        string = tuple(batch.tokens[0][batch.mask[0]].tolist())
        prefixes = [[*PROMPT, *string[:t]] for t in range(len(string))]
        base = world.engine().next_logps(prefixes).gather(-1, torch.tensor(string)[:, None])[:, 0]
        logp_old = torch.zeros_like(batch.logp_sampler).masked_scatter(batch.mask, base.to(batch.logp_sampler))
        # without the recipe's cap, which trades a bias for less variance
        weight = importance.target(Outputs(logp=logp_old), batch.set(logp_old=logp_old), cap=1e6)
        return string, round(float(weight[batch.mask].double().prod()), 9)

    distribution = distribution_of(run)
    assert len({string for string, _ in distribution}) == len(world.strings)
    means["one"] = sum(share * weight for (_, weight), share in distribution.items())
    means["reward"] = sum(share * weight * world.reward[string] for (string, weight), share in distribution.items())
    assert means["one"] == pytest.approx(1.0, abs=1e-5)
    expected = sum(p * world.reward[s] for s, p in world.strings.items())
    unweighted = sum(share * world.reward[string] for (string, _), share in distribution.items())
    assert means["reward"] == pytest.approx(expected, abs=1e-5)
    assert abs(unweighted - expected) > 0.05


def with_decoder(tmp_path: Path, decoder: dict, **changes) -> Recipe:
    return load_recipe(write_run(tmp_path, Path("tiny"), decoder=decoder, **changes))


POPULATION = {"use": "population", "branch": 2, "score": {"use": "path_logp"}}
CORRECTED = [{"use": "clip", "weights": [{"use": "truncated_importance"}]}]


def test_a_decoder_without_log_probs_is_refused_if_a_part_reads_them(tmp_path):
    with pytest.raises(RecipeError, match=r"decoder: population samples from a distribution .* truncated_importance"):
        find_required_passes(with_decoder(tmp_path, POPULATION, loss=CORRECTED))
    find_required_passes(with_decoder(tmp_path, POPULATION))
    find_required_passes(with_decoder(tmp_path, {"use": "shaped", "score": {"use": "path_logp"}}, loss=CORRECTED))


def test_guided_evaluation_needs_a_guide(tmp_path):
    evaluate = {"data": {"path": "data.jsonl"}, "guided": True}
    with pytest.raises(RecipeError, match=r"evaluate\.guided: needs a `decoder`"):
        load_recipe(write_run(tmp_path, Path("tiny"), evaluate=evaluate))
    assert with_decoder(tmp_path, POPULATION, evaluate=evaluate).evaluate.guided


def test_a_training_recipe_with_a_decoder_is_written_and_read_again(tmp_path):
    recipe = with_decoder(tmp_path, POPULATION | {"pick": {"use": "tilted"}})
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.resolved), encoding="utf-8")
    assert load_recipe(again).resolved == recipe.resolved
    assert recipe.resolved["decoder"]["pick"] == {"use": "tilted"}
    assert "proposal" not in recipe.resolved["decoder"]


# ------------------------------------------------------------------------------------------------- on real engines

SPECS = {
    "scalar": ValueSpec(head=sections.HeadSection(type="scalar"), shift=2.0, scale=0.1),  # values above 0, for FUDGE
    "per_token": ValueSpec(head=sections.HeadSection(type="per_token"), kind="soft", beta=0.5),
}
SOFT = ("smc", "svdd", "twisted_smc", "sis")
PER_TOKEN = (*SOFT, "cd_token")
SMALL = {
    "fudge": ["--decoder.k=8"],
    "twisted_smc": ["--decoder.particles=3"],
    "sis": ["--decoder.particles=3"],
    "mcts_rollout": ["--decoder.tokens=60"],
    "tq_star": ["--decoder.k=3", "--decoder.score.engine=transformers", "--decoder.score.max_tokens=8"],
    "tq_star_indirect": [
        "--decoder.k=2",
        "--decoder.score.engine=transformers",
        "--decoder.score.completions=2",
        "--decoder.score.max_tokens=8",
    ],
    "smc_bounds": ["--decoder.highest=4", "--decoder.population.particles=3", "--decoder.population.strength=0.5"],
    "svdd_pm": ["--decoder.block=4", "--decoder.score.max_tokens=8"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model_folder: Path) -> dict[str, str]:
    """Folders of the tiny model, and of value models on it with one number for a prefix or one for every next token."""
    folder = tmp_path_factory.mktemp("values")
    folders = {"model": str(tiny_model_folder)}
    for name, spec in SPECS.items():
        folders[name] = str(save_random_value(folder / name, tiny_model_folder, spec))
    return folders


def model_overrides(part: Any, place: str, saved: dict[str, str], value: str) -> list[str]:
    """Overrides that replace the recipe's models by tiny ones."""
    return [
        f"--{'.'.join(map(str, at))}={saved[value] if at[-1] == 'model' else saved['model']}"
        for at, _ in named_models(part, (place,))
    ]


def overrides(path: Path, folder: Path, saved: dict[str, str]) -> list[str]:
    """Overrides that make a recipe run on the tiny model and four prompts."""
    decoder = load_as(DecodeRecipe, path).decoder
    assert decoder is not None
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+1", "answer": str(a + 1)}) + "\n" for a in range(4)), encoding="utf-8"
    )
    value = "per_token" if path.stem in PER_TOKEN else "scalar"
    return [
        f"--policy={{model: {saved['model']}}}",
        f"--data={{path: {folder / 'data.jsonl'}}}",
        "--engine={use: transformers}",
        "--verify=[{use: exact}]",  # in this process: workers take a second to start
        "--sampling.max_tokens=8",
        f"--output={folder / 'out.jsonl'}",
        *model_overrides(decoder, "decoder", saved, value),
        *SMALL.get(path.stem, []),
    ]


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tiny_model_folder: Path) -> Iterator[list[str]]:
    """Overrides for a judge that is the tiny model, served; the last digit of its answer is the rating."""
    server = {"port": 0, "name": "tiny", "requests": 64}
    with serving(recipe_file(tmp_path_factory.mktemp("judge"), tiny_model_folder, server=server)) as server_run:
        part = {
            "use": "judge",
            "url": server_run.url,
            "model": "tiny",
            "template": "{prompt}{completion}",
            "pattern": "([0-9])",
        }
        part |= {"low": 0, "high": 9, "temperature": 1.0, "max_tokens": 64, "retries": 9, "backoff": 0.0}
        yield [f"--decoder.score.of={json.dumps(part)}"]


@pytest.mark.engine
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_decodes(tmp_path, saved, capsys, request, path):
    judge = request.getfixturevalue("judge") if path.stem == "judge" else []
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuideWarning)  # soft values have the strength that they need
        assert main(["decode", str(path), *overrides(path, tmp_path, saved), *judge]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        assert row["finish"] in ("stopped", "length") and 1 <= row["tokens"] <= 8
        assert row["generated"] >= row["tokens"] and row["score"] in (0.0, 1.0)
        assert row["logp"] < 0
    printed = capsys.readouterr().out
    assert path.stem in printed and "seconds" in printed


@pytest.mark.engine
def test_completions_of_a_decoder_go_to_parquet(tmp_path, saved):
    path = write(tmp_path, f"{{use: shaped, k: 4, score: {{use: value, model: {saved['scalar']}}}}}")
    out = tmp_path / "deeper" / "out.parquet"
    run_decode(path, [f"--policy.model={saved['model']}", f"--output={out}", "--completions=2"])
    rows = datasets.Dataset.from_parquet(str(out)).to_list()
    assert len(rows) == 8 and all(row["kl"] > 0 and row["scored"] == 4 * row["tokens"] for row in rows)
    assert all(row["base_logp"] < 0 for row in rows)
    assert json.loads(rows[0]["prompt"])[0]["content"] == "0+1"
    assert "score" not in rows[0]


@pytest.mark.engine
@pytest.mark.parametrize("decoder", ["shaped, k: 4", "population, branch: 2, pick: {use: tilted}"])
def test_a_mean_value_gives_a_warning_if_the_tilted_distribution_is_promised(tmp_path, saved, decoder):
    path = write(tmp_path, f"{{use: {decoder}, tilted: true, score: {{use: value, model: {saved['scalar']}}}}}")
    with pytest.warns(GuideWarning, match="the score is a mean value; only a soft value"):
        run_decode(path, [f"--policy.model={saved['model']}", f"--output={tmp_path / 'out.jsonl'}"])


@pytest.fixture(scope="module")
def vllm_engine(tiny_model_folder: Path):
    pytest.importorskip("vllm")
    engine_options = sections.EngineSection(use="vllm", cache_mb=64, max_concurrent=64)
    engine = make_engine(tiny_model_folder, engine_options, dtype="float32", max_model_len=96)
    yield engine
    engine.close()


@pytest.mark.engine
@pytest.mark.parametrize("name", ["blockwise_cd", "ivo", "mcts_alpha", "twisted_smc"])
def test_recipes_decode_on_vllm(tmp_path, saved, vllm_engine, name):
    path = RECIPES[0].parent / f"{name}.yaml"
    recipe = load_as(DecodeRecipe, path, overrides(path, tmp_path, saved))
    assert recipe.decoder is not None
    context = DecoderContext(tokenizer=AutoTokenizer.from_pretrained(saved["model"]), device=torch.device("cpu"))
    decoder = recipe.decoder(vllm_engine, context)
    outputs = decoder.generate([[40 + i, 50] for i in range(4)], Sampling(max_tokens=8), seeds=range(4))
    for (completion,) in outputs:
        assert 1 <= len(completion.tokens) <= 8 and completion.measured["scored"] > 0


@pytest.mark.engine
def test_grpo_learns_from_shaped_rollouts(tmp_path, saved):
    """Training learns from the decoder's completions; evaluation samples from the policy alone."""
    digits = tmp_path / "digits.py"
    digits.write_text(DIGITS, encoding="utf-8")
    shaped = {"use": "shaped", "strength": 8.0, "score": {"use": "digits.py:next_digit"}}
    path = write_run(
        tmp_path,
        Path(saved["model"]),
        decoder=shaped,
        loss=CORRECTED,
        run={"folder": str(tmp_path / "run"), "save_every": 3, "rollouts_every": 1},
        evaluate={"data": {"path": "data.jsonl"}, "every": 3, "sampling": {"max_tokens": 12, "temperature": 1.0}},
    )
    assert main(["train", str(path)]) == 0
    batch = read_rollouts(next((tmp_path / "run" / "rollouts").glob("*1*.parquet")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    guided = float(batch.score.mean())
    plain = next(line["eval/score"] for line in lines if "eval/score" in line)
    assert guided > 0.9 and plain < 0.5
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


@pytest.mark.engine
def test_evaluation_with_the_decoder(tmp_path, saved):
    """Evaluation uses a decoder that draws blocks instead of the policy."""
    digits = tmp_path / "digits.py"
    digits.write_text(DIGITS, encoding="utf-8")
    blocks = {"use": "population", "branch": 48, "block": 1, "score": {"use": "digits.py:next_digit"}}
    evaluate = {"data": {"path": "data.jsonl", "limit": 8}, "sampling": {"max_tokens": 6, "temperature": 1.0}}
    evaluate["guided"] = True
    path = write_run(tmp_path, Path(saved["model"]), decoder=blocks, steps=1, evaluate=evaluate)
    assert main(["train", str(path), f"--run.folder={tmp_path / 'run'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["eval/score"] > 0.6  # share of digits; one token in twenty-six is a digit


DIGITS = '''
from posttrain.decoding.prefix_scores import TextScore


def next_digit(context):
    """Scores 1 for a prefix whose last character is a digit, else 0."""
    return TextScore(
        function=lambda prompts, texts: [float(text[-1:].isdigit()) for text in texts], decode=context.decode
    )
'''
