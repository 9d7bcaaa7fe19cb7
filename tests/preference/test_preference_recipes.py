"""Recipes of preference optimisation: their required inputs, scores of 0 at the start, and messages about bad data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_cases import preferences
from random_batch import make_random_batch

from posttrain.batch import Batch, Outputs, seq_sum
from posttrain.commands import cli
from posttrain.data import examples
from posttrain.data.examples.dataset_examples import DatasetExamples
from posttrain.errors import DataError, RecipeError
from posttrain.micro_batches import micro_batches
from posttrain.models import policy as models
from posttrain.models.joint import forward
from posttrain.parts.preference import games, regularisers, scores
from posttrain.recipe import sections
from posttrain.recipe.resolve import import_file
from posttrain.recipe.sections import LoraSection
from posttrain.recipe.sections import PolicySection as PolicyOptions
from posttrain.system.processes import Processes
from posttrain.training.apply_parts import add_baselines
from posttrain.training.learner import score
from posttrain.training.recipe import Recipe, load_recipe
from posttrain.training.required_passes import find_required_passes
from posttrain.training.setup import build_learner

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in (RECIPES / "preference").glob("*.yaml"))


def recipe_of(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


# ---- What a recipe needs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_run_where_a_loss_reads_it_and_groups_stay_whole(name: str) -> None:
    needs = find_required_passes(load_recipe(RECIPES / "preference" / f"{name}.yaml"))
    without = {"alpha_po", "cpl", "cpo", "orpo", "pmpo", "rebel", "sft", "simpo", "slic", "spo", "sppo_online"}
    without.add("preference_model")
    assert needs.logp_ref == (name not in without)
    assert needs.kl_ref == (name in {"pmpo", "tdpo", "tdpo2"})
    assert needs.collision == (name == "wpo")
    assert needs.groups == (name not in {"apo_zero", "bco", "nash_ema", "nash_md", "spo", "sppo"})
    before = {"aot", "aot_unpaired", "bco", "kto", "mpo_mix", "rebel"}
    before |= {"comal", "inpo", "nash_ema", "nash_md", "nash_mp", "sppo_online"}
    assert needs.logp_old == (name in before)


LOSS = "policy: {model: m}\ndata: {path: d}\nexamples: {use: pairs}\n"


def test_columns_that_a_loss_reads_are_known_before_the_data_is(tmp_path: Path) -> None:
    margin = "margin: {use: given, name: gap}, target: {use: soft}"
    assert find_required_passes(recipe_of(tmp_path, f"{LOSS}loss: {{use: pairwise, {margin}}}")).columns == (
        "gap",
        "probability",
    )


def test_margin_of_a_baseline_that_nothing_fills_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, f"{LOSS}loss: {{use: pairwise, margin: {{use: baseline}}}}")
    with pytest.raises(RecipeError, match="slot `baseline` fills, and the recipe has none"):
        find_required_passes(recipe)


def test_mismatched_baseline_without_such_completions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:5.*baseline: needs completions of other prompts: `examples: "):
        recipe_of(tmp_path, f"{LOSS}loss: {{use: pointwise}}\nbaseline: {{use: mismatched}}")


def test_pairs_of_a_prompt_with_one_completion_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"loss.0: pairwise compares the completions of a prompt"):
        load_recipe(RECIPES / "preference" / "online_ipo.yaml", ["--completions=1"])


# ---- Scores at the start --------------------------------------------------------------------------------------------

PLAIN = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "no idea"},
    {"prompt": "9+1=?", "chosen": "ten", "rejected": "9"},
]


def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    said = [{"role": "user", "content": row["prompt"]}]
    return {side: [*said, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}


@pytest.mark.engine
@pytest.mark.parametrize("lora", [None, "{rank: 4}"])
@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_every_score_is_exactly_0_where_the_policy_is_the_reference(
    kind: str, lora: str | None, tmp_path: Path, tiny_model_folder: Path, tokenizer: Any
) -> None:
    rows: list[Any] = PLAIN if kind == "text" else [as_messages(row) for row in PLAIN]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    recipe = recipe_of(
        tmp_path,
        f"policy: {{model: {tiny_model_folder}, lora: {lora or 'null'}}}\ndata: {{path: data.jsonl}}\n"
        f"examples: {{use: pairs}}\nmicro_batch_tokens: 80\nloss: {{use: pairwise, margin: {{use: token_kl}}}}\n",
    )
    assert recipe.examples is not None
    with Processes() as processes:
        learner = build_learner(recipe, find_required_passes(recipe), processes)
        batch = score(learner, recipe.examples(recipe.data, tokenizer, tmp_path).batch(range(4)))
        micro = micro_batches(batch, recipe.micro_batch_tokens, processes.all_max, whole_groups=True)
        assert len(micro) > 1
        for part in micro:
            kl_from = learner.reference or learner.policy
            outputs = forward(learner.optimiser.model, part, temperature=1.0, kl_from=kl_from)[0]
            assert outputs.kl_ref is not None and not outputs.kl_ref.any()
            assert outputs.logp[part.mask].all()
            every_form: list[dict[str, Any]] = [{}, {"level": "mean"}, {"tail": 0.5}, {"discount": 0.9}]
            assert not any(scores.log_ratio(outputs, part, **form).any() for form in every_form)
            for divergence in ("forward_kl", "jensen_shannon", "alpha", "chi_squared"):
                assert scores.f_divergence(outputs, part, divergence=divergence).abs().max() < 1e-7


# ---- Divergences over the vocabulary --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSection(rank=4)])
def test_divergence_and_collision_are_those_of_the_full_softmax(
    lora: LoraSection | None, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are computed in chunks of 5 positions, at a temperature, with a gradient only in the policy."""
    monkeypatch.setitem(models.CHUNK_ELEMENTS, "cpu", 5 * 261)
    torch.manual_seed(0)
    policy = models.build_policy(PolicyOptions(model=str(tiny_model_folder), lora=lora))
    reference = policy if lora else models.build_policy(PolicyOptions(model=str(tiny_model_folder)))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = make_random_batch(1)

    def distribution(model: models.Policy, **which: bool) -> torch.Tensor:
        hidden = model.hidden_states(batch.tokens, **which)[:, :-1][batch.mask[:, 1:]]
        return model.next_logits(hidden, 0.7).log_softmax(-1)

    found = policy.statistics(batch.tokens, batch.mask, temperature=0.7, collision=True, kl_from=reference)
    assert found.kl_ref is not None and found.collision is not None and found.entropy is None
    pi, ref = distribution(policy), distribution(reference, reference=True).detach()
    kl = torch.nn.functional.kl_div(pi, ref, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.kl_ref[batch.mask], kl, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.collision[batch.mask], pi.exp().square().sum(-1).log(), atol=1e-6, rtol=1e-5)
    assert kl.min() > 1e-4 and not found.kl_ref[~batch.mask].any()
    gradients = [torch.autograd.grad(loss.sum(), trained, retain_graph=True) for loss in (found.kl_ref, kl)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    if not lora:
        assert all(parameter.grad is None for parameter in reference.parameters())


# ---- Parts that recipes need ----------------------------------------------------------------------------------------


def test_reference_may_be_a_mixture_with_the_policy_before_the_update() -> None:
    """(1 - a) log π_ref + a log π_old; at both ends the other policy need not have been run."""
    batch = make_random_batch(0)
    assert batch.logp_old is not None and batch.logp_ref is not None
    outputs = Outputs(logp=batch.logp_old + 0.3)
    for share in (0.0, 0.25, 1.0):
        mixture = share * batch.logp_old + (1 - share) * batch.logp_ref
        expected = [sum(row[mask].tolist()) for row, mask in zip(outputs.logp - mixture, batch.mask, strict=True)]
        assert scores.log_ratio(outputs, batch, previous=share).tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.log_ratio(outputs, batch.set(logp_ref=None), previous=1.0).min() > 0
    with pytest.raises(ValueError, match="logp_ref"):
        scores.log_ratio(outputs, batch.set(logp_ref=None), previous=0.5)


def test_win_rate_counts_wins_ties_and_losses_within_a_group() -> None:
    nan = math.nan
    batch = make_random_batch(0, groups=3, size=4)
    reward = torch.tensor([0.0, 1.0, 1.0, 5.0, 2.0, nan, 2.0, 3.0, nan, 1.0, nan, nan])
    batch = batch.set(reward=reward, baseline_only=torch.arange(12) == 7)
    assert games.win_rate(batch).tolist() == pytest.approx([-0.5, 0.0, 0.0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0])
    with_itself = games.win_rate(batch, itself=True)
    assert with_itself.tolist() == pytest.approx([-0.375, 0.0, 0.0, 0.375, 0, 0, 0, 0, 0, 0, 0, 0])
    against = games.win_rate(batch, against="baselines", center=0.0)  # completion 7, of 3.0, is the second group's
    assert against.tolist() == pytest.approx([0.5] * 4 + [0.0, 0.5, 0.0] + [0.5] * 5)
    logistic = games.win_rate(batch, temperature=2.0)[4:8]
    assert logistic.tolist() == pytest.approx([0.0] * 4)
    higher, lower = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(2.0))
    first = games.win_rate(batch.set(reward=torch.arange(12).float() % 4 * 4), temperature=2.0)[:2].tolist()
    sixth, fourth = 1 / (1 + math.exp(6.0)), 1 / (1 + math.exp(4.0))
    assert first == pytest.approx([(lower + fourth + sixth) / 3 - 0.5, (higher + lower + fourth) / 3 - 0.5])


@pytest.mark.parametrize("against", ["group", "baselines"])
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_win_rate_in_scalar_loops(against: Any, itself: bool, temperature: float | None) -> None:
    for seed in range(4):
        batch = preferences(seed, groups=4, size=5)
        rewards, groups = batch.reward.tolist(), batch.group.tolist()
        there = [bool(m.any()) and not math.isnan(r) for m, r in zip(batch.mask, rewards, strict=True)]
        ours = [t and not g for t, g in zip(there, batch.baseline_only.tolist(), strict=True)]
        theirs = (
            ours if against == "group" else [t and g for t, g in zip(there, batch.baseline_only.tolist(), strict=True)]
        )
        for i, found in enumerate(games.win_rate(batch, against=against, itself=itself, temperature=temperature)):
            wins = []
            for j in range(len(batch)):
                if ours[i] and theirs[j] and i != j and groups[i] == groups[j]:
                    gap = rewards[i] - rewards[j]
                    wins.append(
                        (gap > 0) + 0.5 * (gap == 0) if temperature is None else 1 / (1 + math.exp(-gap / temperature))
                    )
            if wins and itself:
                wins.append(0.5)
            assert float(found) == pytest.approx(sum(wins) / len(wins) - 0.5 if wins else 0.0, abs=1e-9)


def test_the_given_completion_comes_first() -> None:
    batch = make_random_batch(0, groups=2, size=3)
    assert not games.given_first(batch).any()
    author = torch.tensor([0, 3, 0, 3, 0, 0])
    assert games.given_first(batch.set(author=author)).tolist() == [0, 1, 0, 1, 0, 0]
    assert regularisers.optimism(
        Outputs(logp=batch.logp_old),
        batch.set(author=author - 2),
        rows="opponent",  # type: ignore[arg-type]
    ).any(-1).tolist() == [False, True, False, True, False, False]


def rated(folder: Path, tokenizer: Any, prompts: str, **chosen: Any) -> DatasetExamples:
    rows = [{"prompt": p, "completion": f"{p}{i}" * (i + 1), "label": i % 2 == 0} for i, p in enumerate(prompts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = sections.DataSection(path=str(folder / "rows.jsonl"))
    found = examples.rated(data, tokenizer, None, mismatched=True, **chosen)
    assert isinstance(found, DatasetExamples)
    return found


def test_mismatched_completions_are_the_next_ones_of_another_prompt(tmp_path: Path, tokenizer: Any) -> None:
    """They follow the group's own prompt, have no reward and are never trained on."""
    batch = rated(tmp_path, tokenizer, "aabba").batch(range(5))
    extra = batch.baseline_only
    assert extra.tolist() == [False, True] * 5
    assert [batch.texts[i] for i in extra.nonzero().squeeze(-1)] == ["b2" * 3, "b2" * 3, "a4" * 5, "a4" * 5, "b2" * 3]
    assert batch.reward[extra].isnan().all() and not batch.reward[~extra].isnan().any()
    before = [
        tokenizer.decode(row[: int(mask.int().argmax())]) for row, mask in zip(batch.tokens, batch.mask, strict=True)
    ]
    assert before[::2] == before[1::2] == [f"<|user|>{p}<|end|><|assistant|>" for p in "aabba"]
    assert batch.group.tolist() == [i // 2 for i in range(10)]


def test_mismatched_completions_that_would_be_too_long_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    found = rated(tmp_path, tokenizer, "abc", max_tokens=9)  # prompt 4, completions 3, 5 and 7 tokens
    assert [len(group) for group in found.groups] == [2, 2] and [entry.count for entry in found.dropped] == [1]
    assert max(len(completion) for group in found.groups for completion in group) == 9
    with pytest.raises(DataError, match="all rows have the same prompt"):
        rated(tmp_path, tokenizer, "aaa")


@pytest.mark.parametrize("name", ["kto", "aot", "aot_unpaired"])
def test_slots_fill_baseline_and_group(name: str) -> None:
    recipe = load_recipe(RECIPES / "preference" / f"{name}.yaml")
    batch = make_random_batch(0, groups=4, size=2)
    batch = batch.set(
        reward=(torch.arange(8) % 2).float(),
        baseline_only=torch.arange(8) >= 6 if name == "kto" else batch.baseline_only,
    )
    assert batch.logp_old is not None and batch.logp_ref is not None
    ratio = seq_sum(batch.logp_old - batch.logp_ref, batch.mask)
    filled = add_baselines(recipe, batch)
    if name == "kto":
        assert filled.baseline is not None
        assert filled.baseline.tolist() == pytest.approx([max(0.0, float(ratio[6:].mean()))] * 8)
    elif name == "aot":
        assert (
            filled.baseline is not None and filled.baseline[::2].eq(0).all() and torch.equal(filled.group, batch.group)
        )
    else:
        assert filled.baseline is None
        order = (
            [int(ratio[::2].argsort()[k]) * 2 for k in range(4)],
            [int(ratio[1::2].argsort()[k]) * 2 + 1 for k in range(4)],
        )
        for k in range(4):
            assert filled.group[order[0][k]] == filled.group[order[1][k]] == k


def test_a_step_is_a_pair_behind_the_steps_before_it(tmp_path: Path, tokenizer: Any) -> None:
    module = import_file(RECIPES / "data" / "step_pairs.py")
    row = {"prompt": "1+1+1?", "initial_reason_steps": "Step 1: 1+1=2.\nStep 2: ", "chosen": "2+1=3.", "rejected": "4."}
    found = module.pair(row)
    assert found["prompt"].endswith("<|im_start|>assistant\nStep 1: 1+1=2.\nStep 2: ") and "{}" in found["prompt"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(found) + "\n")
    data = sections.DataSection(path=str(tmp_path / "rows.jsonl"), chat=False)
    batch = examples.pairs(data, tokenizer, None).batch([0])
    chosen = batch.tokens[0][batch.mask[0]].tolist()
    assert tokenizer.decode(chosen) == "2+1=3." and tokenizer.eos_token_id not in chosen


def test_ratings_may_be_the_rewards_of_a_pair(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(PLAIN[0] | {"good": 4, "bad": 2.5}) + "\n")
    data = sections.DataSection(path=str(tmp_path / "rows.jsonl"))
    batch: Batch = examples.pairs(data, tokenizer, None, scores=("good", "bad")).batch([0])
    assert batch.reward.tolist() == batch.score.tolist() == [4.0, 2.5]


# ---- Malformed files ------------------------------------------------------------------------------------------------

GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3", "gap": 1.0}
MALFORMED = {
    "no_rejected": ({"prompt": "a", "chosen": "b"}, "data.jsonl:2: "),
    "empty_text": (GOOD | {"chosen": ""}, "data.jsonl:2: column 'chosen' is empty text"),
    "null": (GOOD | {"rejected": None}, "data.jsonl:2: columns 'chosen' and 'rejected' are"),
    "text_and_messages": (GOOD | {"chosen": [{"role": "assistant", "content": "2"}]}, "data.jsonl:2: "),
    "message_without_content": (
        {side: [{"role": "user", "content": "a"}, {"role": "assistant"}] for side in ("chosen", "rejected")},
        "data.jsonl:2: ",
    ),
    "ends_with_the_user": (
        {"prompt": [{"role": "user", "content": "a"}]}
        | {
            side: [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
            for side in ("chosen", "rejected")
        },
        "data.jsonl:2: ",
    ),
    "no_margin": ({k: v for k, v in GOOD.items() if k != "gap"}, "data.jsonl:2: column 'gap', in which the loss reads"),
    "margin_is_text": (GOOD | {"gap": "wide"}, "data.jsonl:2: "),
    "margin_is_infinite": (
        GOOD | {"gap": math.inf},
        "data.jsonl:2: column 'gap', in which the loss reads a number, is inf",
    ),
    "unknown_finish": (
        GOOD | {"finish": "stop"},
        "data.jsonl:2: column 'finish' is 'stop' (text); did you mean 'stopped'?",
    ),
    "not_json": ('{"prompt": "a", ', "data.jsonl:2: not JSON at column"),
    "not_an_object": ('["a"]', "data.jsonl:2: "),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_ends_with_file_and_row_and_nothing_written(
    name: str, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, expected = MALFORMED[name]
    first = GOOD | {"finish": "stopped"} if name == "unknown_finish" else GOOD
    text = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(first)}\n{text}\n{json.dumps(first)}\n", encoding="utf-8")
    overrides = {
        "policy.model": tiny_model_folder,
        "data.path": tmp_path / "data.jsonl",
        "loss.0.margin": "{use: given, name: gap}",
        "run.folder": tmp_path / "run",
    }
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    assert cli.main([str(RECIPES / "dpo.yaml"), *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()
