"""Best-of-n, over-optimisation and RewardBench accuracy, against enumeration and numbers worked out by hand."""

from __future__ import annotations

import json
import math
from itertools import combinations
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import DataError
from posttrain.recipe import sections
from posttrain.reports.reward_accuracy import (
    SECTIONS,
    accuracy,
    compare_pairs,
    read_pairs,
    reward_statistics,
    score_pairs,
)
from posttrain.reports.reward_curves import (
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    draw_curve,
    moments,
    overoptimisation,
)

PROXY, GOLD = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.5]), torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0])


def enumerated(proxy: list[float], gold: list[float], n: int) -> float:
    """Gold reward of the proxy's best sample, averaged over all sets of n samples; ties share their gold rewards."""
    rewards = []
    for chosen in combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in chosen)
        rewards.append(mean(gold[i] for i in chosen if proxy[i] == top))
    return mean(rewards)


def test_best_of_n_worked_out_by_hand():
    rewards = best_of_n(PROXY, GOLD, [1, 2, 3, 5])
    assert [round(float(rewards[n]), 6) for n in (1, 2, 3, 5)] == [2.2, 2.3, 1.8, 0.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-5, 5)), min_size=1, max_size=7, unique_by=lambda pair: pair[0]))
def test_best_of_n_is_the_mean_over_all_sets(samples):
    proxy, gold = [float(p) for p, _ in samples], [g for _, g in samples]
    sizes = range(1, len(samples) + 1)
    rewards = best_of_n(torch.tensor(proxy), torch.tensor(gold, dtype=torch.float64), sizes)
    for n in sizes:
        assert float(rewards[n]) == pytest.approx(enumerated(proxy, gold, n), abs=1e-9)


def test_equal_proxy_rewards_do_not_depend_on_the_order():
    proxy, gold = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([4.0, 2.0, 9.0])
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        assert float(best_of_n(proxy[order], gold[order], [3])[3]) == 3.0
    assert float(best_of_n(proxy, gold, [2])[2]) == pytest.approx(enumerated(proxy.tolist(), gold.tolist(), 2))


def test_best_of_n_needs_n_samples():
    with pytest.raises(ValueError, match="best of 6 cannot be estimated from 5"):
        best_of_n(PROXY, GOLD, [1, 6])


def test_kl_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    # The best of n uniform ranks has density n u^(n - 1); its KL is the integral of the log density under itself.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = 8 * u**7
    assert best_of_n_kl(8) == pytest.approx(float((density * density.log()).mean()), abs=1e-6)


def test_curve_over_prompts():
    proxy, gold = torch.stack([PROXY, GOLD]), torch.stack([GOLD, GOLD])
    curve = best_of_n_curve(proxy, gold, [1, 2])
    assert curve["gold"] == pytest.approx([2.2, (2.3 + enumerated(GOLD.tolist(), GOLD.tolist(), 2)) / 2])
    assert curve["oracle"] == pytest.approx([2.2, enumerated(GOLD.tolist(), GOLD.tolist(), 2)])
    assert curve["gold_error"][0] == pytest.approx(0.0) and curve["kl"][0] == 0
    figure = draw_curve(curve, {"alpha": 1.0, "beta": 0.5})
    assert len(figure.axes[0].get_lines()) >= 3 and "KL" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("method", ["best_of_n", "rl"])
def test_the_parameters_of_overoptimisation_are_recovered(method: str):
    alpha, beta = 1.3, 0.4
    kl = [0.0, 0.3, 1.0, 2.0, 4.0, 9.0]
    gold = [2.0 + (d := math.sqrt(k)) * (alpha - beta * (d if method == "best_of_n" else math.log(d or 1))) for k in kl]
    fit = overoptimisation(kl, gold, method=method)
    assert fit["alpha"] == pytest.approx(alpha) and fit["beta"] == pytest.approx(beta)
    assert fit["residual"] == pytest.approx(0, abs=1e-9)
    grid = [k / 1000 for k in range(1, 200_000)]

    def gain(k: float) -> float:
        d = math.sqrt(k)
        return d * (alpha - beta * (d if method == "best_of_n" else math.log(d)))

    assert fit["peak_kl"] == pytest.approx(max(grid, key=gain), abs=2e-3)


def test_overoptimisation_without_a_peak_or_points():
    assert overoptimisation([0, 1, 4], [0, 1, 3])["peak_kl"] == math.inf
    with pytest.raises(ValueError, match="at KL = 0"):
        overoptimisation([1, 2, 4], [0, 1, 2])
    with pytest.raises(ValueError, match="best_of_n or rl"):
        overoptimisation([0, 1, 2], [0, 1, 2], method="ppo")


def test_moments_of_known_rewards():
    assert moments(torch.tensor([1.0, float("nan"), 3.0])) == {"shift": 2.0, "scale": pytest.approx(2**0.5)}
    with pytest.raises(ValueError, match="all the same"):
        moments(torch.ones(3))


def test_accuracy_by_subset_and_section():
    rows = [{"subset": s} for s in ("math-prm", "math-prm", "hep-cpp", "donotanswer", "mine")]
    results = [{"correct": c} for c in (1.0, 0.0, 1.0, 0.5, 0.0)]
    accuracies = accuracy(rows, results)
    assert accuracies["subsets"] == {"math-prm": 0.5, "hep-cpp": 1.0, "donotanswer": 0.5, "mine": 0.0}
    assert accuracies["sections"]["Reasoning"] == pytest.approx((984 * 0.5 + 164 * 1.0) / (984 + 164))
    assert set(accuracies["sections"]) == {"Reasoning", "Safety"} and accuracies["all"] == 0.5
    assert accuracies["score"] == pytest.approx((accuracies["sections"]["Reasoning"] + 0.5) / 2)
    assert accuracies["counts"]["math-prm"] == 2
    assert "score" not in accuracy(rows[-1:], results[-1:])


def test_sections_hold_all_of_rewardbench():
    sizes = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 6 * 164}
    assert sum(sizes.values()) - 984 + 447 == 2985  # number of pairs in the paper


def test_pairs_are_scored_and_compared(tmp_path):
    lines = [
        {"prompt": "p", "chosen": "long answer", "rejected": "short", "subset": "x"},
        {"prompt": "p", "chosen": "b", "rejected": "long answer", "subset": "x"},
        {"prompt": "p", "chosen": "same", "rejected": "emas", "subset": None},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_pairs(sections.DataSection(path=str(path)))
    assert [row["subset"] for row in rows] == ["x", "x", "all"]

    def by_length(prompts, completions):
        assert prompts == [[{"role": "user", "content": "p"}]] * 3
        return torch.tensor([float(len(text)) for text in completions])

    scored = score_pairs(rows, by_length)
    assert [result["correct"] for result in scored] == [1.0, 0.0, 0.5]
    compared = compare_pairs(rows, lambda pairs: torch.tensor([0.9, 0.2, 0.5]))
    assert [result["correct"] for result in compared] == [1.0, 0.0, 0.5]
    path.write_text(json.dumps({"prompt": "p", "chosen": 3, "rejected": "x"}) + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl:1: columns 'chosen' and 'rejected' are 3 \(a number\) and"):
        read_pairs(sections.DataSection(path=str(path)))
    path.write_text(json.dumps({"prompt": "p", "chosen_text": "x", "rejected": "x"}) + "\n")
    with pytest.raises(DataError, match="no column 'chosen'"):
        read_pairs(sections.DataSection(path=str(path)))


def test_pairs_may_be_messages_with_or_without_a_prompt(tmp_path):
    """All of TRL's forms of a preference read alike; a side of several messages is no single answer."""
    question, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "1+1="), ("assistant", "2"), ("assistant", "3"))
    )
    rows = [
        {"prompt": [question], "chosen": [good], "rejected": [bad]},
        {"chosen": [question, good], "rejected": [question, bad]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    explicit = read_pairs(sections.DataSection(path=str(path)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert read_pairs(sections.DataSection(path=str(path))) == explicit
    assert explicit == [{"prompt": [question], "chosen": "2", "rejected": "3", "subset": "all"}]
    path.write_text(json.dumps({"prompt": [question], "chosen": [good, question, good], "rejected": [bad]}) + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl:1: column 'chosen' is .* one message of the assistant"):
        read_pairs(sections.DataSection(path=str(path)))


def test_missing_rewards_are_counted_and_not_taken_for_wrong():
    rows = [{"prompt": "a", "chosen": "1", "rejected": "2", "subset": "all"}] * 3

    def scorer(prompts, completions):
        return torch.tensor([1.0, math.nan, 3.0] if completions[0] == "1" else [0.0, 0.0, 4.0])

    results = score_pairs(rows, scorer)
    assert accuracy(rows, results)["all"] == 0.5
    assert reward_statistics(results)["chosen"] == {"mean": 2.0, "std": 1.0, "missing": 1}
    assert reward_statistics(results)["rejected"]["missing"] == 0
    assert reward_statistics([{"probability": 0.5, "correct": 0.5}]) == {}
    with pytest.raises(DataError, match="no pair has a reward"):
        accuracy(rows[:1], results[1:2])
