"""``posttrain eval eval/frontier.yaml``: mistakes in a suite, the numbers of a report, and a whole report."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from exact_world import PROMPT, distribution_of, kl, make_world, table_score

from posttrain.commands.cli import main
from posttrain.decoding import decoders
from posttrain.decoding.context import DecoderContext
from posttrain.recipe.part import Part
from posttrain.reports.decoding import cells, grouped_mean, to_point
from posttrain.reports.decoding_suite import PLAIN, Variant, read_suite
from posttrain.rollout.session import to_row

ROOT = Path(__file__).parents[2]
LOGP = {"use": "path_logp", "alpha": 1.0}
BEST = {"decoder": {"use": "population", "score": LOGP}, "sweep": {"branch": [2, 3]}}
SUITE = {
    "suite": "decode",
    "policy": {"model": "tiny"},
    "data": {"path": "data.jsonl"},
    "verify": [{"use": "exact"}],
    "sampling": {"max_tokens": 6},
    "engine": {"use": "transformers"},
    "decode": [BEST],
}
RECIPE = "policy: {model: tiny}\ndata: {path: data.jsonl}\ndecoder: {use: shaped, k: 3, score: {use: path_logp}}\n"


def write_suite(folder: Path, **changes) -> Path:
    """Writes a small decode suite with its data and a decode recipe, and returns its path."""
    rows = [{"prompt": f"{a}+1", "answer": str(a + 1)} for a in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "shaped.yaml").write_text(RECIPE, encoding="utf-8")
    suite = SUITE | {"report": {"folder": str(folder / "report")}} | changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False, default_flow_style=None), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------- reading a suite


def test_a_sweep_makes_a_decoder_of_each_value(tmp_path):
    shaped = {"recipe": "shaped.yaml", "sweep": {"strength": [0, 2.5]}}
    inner = {**BEST, "name": "by length", "sweep": {"score.alpha": [0.0, 1.0]}}
    _, variants = read_suite(write_suite(tmp_path, decode=[BEST, shaped, inner]))
    assert [(variant.method, variant.knob, variant.value) for variant in variants] == [
        (PLAIN, None, None),
        ("population", "branch", 2),
        ("population", "branch", 3),
        ("shaped", "strength", 0),
        ("shaped", "strength", 2.5),
        ("by length", "score.alpha", 0.0),
        ("by length", "score.alpha", 1.0),
    ]
    parts = [variant.decoder for variant in variants if variant.decoder is not None]
    assert [part.options.get("branch") for part in parts[:2]] == [2, 3]
    assert [(part.options["strength"], part.options["k"]) for part in parts[2:4]] == [(0.0, 3), (2.5, 3)]
    assert [part.options["score"].options["alpha"] for part in parts[4:]] == [0.0, 1.0]
    assert variants[1].label == "population, branch 2"


SHAPED = {"use": "shaped", "score": LOGP}
MISTAKES = [
    ({"decode": [{**BEST, "sweep": {"brnch": [2]}}]}, r"suite.yaml:\d+:\d+: decode.0.decoder.brnch:", "'branch'"),
    ({"decode": [{**BEST, "sweep": {"branch": [0]}}]}, "decode.0.decoder.branch:", "greater than or equal to 1"),
    ({"decode": [{**BEST, "sweep": {"branch": []}}]}, "decode.0.sweep.branch:", "is empty"),
    ({"decode": [{**BEST, "sweep": {"branch": [2], "block": [3]}}]}, "decode.0.sweep:", "2 options"),
    ({"decode": [{"sweep": {"branch": [2]}}]}, "decode.0:", "give one of them"),
    ({"decode": [{"recipe": "shapd.yaml"}]}, "decode.0.recipe:", "no file 'shapd.yaml'"),
    ({"decode": [{"recipe": "shaped.yaml", "sweep": {"strenght": [1]}}]}, "decoder.strenght", "'strength'"),
    ({"decode": [BEST, BEST]}, r"suite.yaml:\d+:\d+: decode.1:", "give this one a `name`"),
    ({"decode": [{"decodr": {}}]}, "decode.0.decodr:", "unknown key"),
    ({"decode": [{"decoder": {**SHAPED, "k": 2, "head": 0.1}}]}, "decode.0.decoder.head:", "not both"),
    (
        {"decode": [{"decoder": SHAPED}], "sampling": {"top_p": 0.5}},
        "suite.yaml:[0-9]+:[0-9]+: sampling.top_p:",
        "cuts",
    ),
    ({"verify": []}, "verify:", "is empty"),
    ({"sampling": {"temperature": 0.0}, "completions": 2}, "completions:", "are equal"),
]


@pytest.mark.parametrize(("changes", "place", "words"), MISTAKES)
def test_mistakes_are_reported_with_their_place(tmp_path, capsys, changes, place, words):
    assert main(["eval", str(write_suite(tmp_path, **changes))]) == 2
    message = capsys.readouterr().err
    assert re.search(place, message) and words in message, message


@pytest.mark.parametrize("name", ["frontier", "accuracy"])
def test_shipped_suites_are_read(name):
    suite, variants = read_suite(ROOT / "eval" / f"{name}.yaml")
    assert suite.suite == "decode" and len(variants) > 1
    assert all(variant.decoder is not None for variant in variants[1:])


# --------------------------------------------------------------------------------------------------------- figures


def test_the_kl_in_the_table_is_the_enumerated_one():
    """Averaged over all completions by their probability, KL and reward of a shaped decoder are the exact ones."""
    world = make_world(1, vocabulary=3, length=3, eos=True)
    score = table_score(world.mean_values())
    part = Part.of(decoders.shaped, score=lambda context: score, strength=1.5)
    context = DecoderContext(tokenizer=None, device=torch.device("cpu"))  # type: ignore[arg-type]

    def run(choosers):
        (completion,) = part(world.engine(choosers), context).generate([PROMPT], world.sampling)[0]
        row = to_row("", completion) | {"score": world.reward[tuple(completion.tokens)]}
        return tuple(completion.tokens), json.dumps(row)

    outcomes = distribution_of(run)
    distribution = {tokens: p for (tokens, _), p in outcomes.items()}
    rows = [(json.loads(row), p) for (_, row), p in outcomes.items()]
    points = [to_point(Variant("shaped", "strength", 1.5, part), [[row]], 1.0) for row, _ in rows]
    assert {point.kl_kind for point in points} == {"exact"}
    divergence = sum(p * (point.kl or 0.0) for point, (_, p) in zip(points, rows, strict=True))
    assert divergence == pytest.approx(kl(distribution, world.strings), abs=1e-12) and divergence > 0.05
    reward = sum(p * point.reward for point, (_, p) in zip(points, rows, strict=True))
    assert reward == pytest.approx(sum(p * world.reward[y] for y, p in distribution.items()), abs=1e-12)


def test_standard_errors_are_over_prompts():
    """Four equal completions of a prompt give the same standard error as one."""
    mean, error = grouped_mean([[1.0] * 4, [0.0] * 4])
    assert (mean, error) == pytest.approx((0.5, 0.5))
    singles = [0.2, 0.9, 0.4, 0.7, 0.1]
    mean, error = grouped_mean([[value] for value in singles])
    spread = math.sqrt(sum((value - mean) ** 2 for value in singles) / 4 / 5)
    assert (mean, error) == pytest.approx((sum(singles) / 5, spread))
    assert all(map(math.isnan, grouped_mean([[], []])))
    assert math.isnan(grouped_mean([[1.0, 0.0]])[1])


def test_bounds_and_unknown_divergences_are_marked():
    row = {"score": 1.0, "tokens": 4, "generated": 8.0, "scored": 2.0}
    decoder = Part.of(decoders.population, score=None)

    def point(rows):
        return to_point(Variant("x", None, None, decoder), [[row] for row in rows], 2.0)

    bound = point([{**row, "kl_bound": 0.2}, {**row, "kl_bound": 0.4, "score": None}])
    assert (bound.kl_kind, bound.unscored) == ("bound", 1)
    assert (bound.kl, bound.kl_per_token) == pytest.approx((0.3, 0.075))
    assert cells(bound)["kl"].startswith("≤ 0.300")
    unknown = point([{**row, "kl_bound": 0.2}, {**row, "kl_bound": None}])  # one of the completions has no bound
    assert (unknown.kl_kind, unknown.kl) == ("unknown", None) and cells(unknown)["kl"] == "-"


# ----------------------------------------------------------------------------------------------------- whole reports


@pytest.mark.engine
def test_a_whole_report(tmp_path, tiny_model_folder, capsys):
    tree = {"use": "tree", "score": LOGP, "select": {"use": "beam", "width": 2}, "propose": {"use": "sampled_steps"}}
    decode = [BEST, {"recipe": "shaped.yaml", "sweep": {"strength": [0, 1]}}, {"decoder": tree}]
    path = write_suite(tmp_path, policy={"model": str(tiny_model_folder)}, decode=decode)
    squared = f"{{use: log_ratio, plus: {tiny_model_folder}}}"  # at strength 1 the policy's distribution is squared
    (tmp_path / "shaped.yaml").write_text(RECIPE.replace("{use: path_logp}", squared), encoding="utf-8")
    assert main(["eval", str(path), "--completions=2"]) == 0
    report = tmp_path / "report"
    points = json.loads((report / "metrics.json").read_text(encoding="utf-8"))["points"]
    assert [point["kl_kind"] for point in points] == ["exact", "bound", "bound", "exact", "exact", "unknown"]
    plain, two, three, zero, one, beam = points
    assert plain["kl"] == 0 and plain["scored"] == 0 and plain["generated"] == plain["tokens"]
    assert two["kl"] == pytest.approx(math.log(2) - 1 / 2) and three["scored"] == 3
    assert 0 < zero["kl"] < one["kl"]  # also at strength 0 the candidates are cut to the k best
    assert beam["generated"] > beam["tokens"] and all(point["completions"] == 8 for point in points)
    with (report / "table.csv").open(encoding="utf-8") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [point["method"] for point in points]
    page = (report / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == len(list(report.glob("*.png"))) == 3
    assert "≤ 0.193" in page and "≤ 0.193" in capsys.readouterr().out
