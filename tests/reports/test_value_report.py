"""The value report: metrics against scalar loops and against numbers worked out by hand, branches, pictures, page."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import reference_value_report as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from posttrain.batch import Batch, Finish
from posttrain.data.steps import pieces, steps_by_text
from posttrain.reports.page import Example, write_page
from posttrain.reports.value_plots import draw_all, draw_branches, draw_steps
from posttrain.rollout.branches import choose_branch_points, value_at
from posttrain.training import value_metrics as values

# --------------------------------------------------------------------------------------------------- metrics, by hand


def test_explained_variance_by_hand():
    """Targets 0, 0, 1, 1 vary by 1/4. Values .1, .3, .6, 1 leave errors -.1, -.3, .4, 0 with mean 0 and variance
    (.01 + .09 + .16) / 4 = .065: the explained variance is 1 - .065 / .25 = .74. A constant added to all values changes
    nothing."""
    value, target = torch.tensor([0.1, 0.3, 0.6, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert values.explained_variance(value, target) == pytest.approx(0.74, abs=1e-7)
    assert values.explained_variance(value + 5, target) == pytest.approx(0.74, abs=1e-6)
    assert values.explained_variance(torch.full((4,), 0.3), target) == pytest.approx(0.0)
    assert math.isnan(values.explained_variance(value, torch.ones(4)))


def stored_batch() -> Batch:
    """Two completions of each of two prompts: 2, 2, 4 and 2 tokens after one prompt token; the last was cut off."""
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    length = mask.sum(-1) + 1
    zeros = torch.zeros(mask.shape)
    score = torch.tensor([1.0, 0.0, 1.0, 0.0])
    return Batch(
        tokens=torch.arange(20).view(4, 5),
        mask=mask,
        length=length,
        group=torch.tensor([0, 0, 1, 1]),
        finish=torch.tensor([Finish.STOPPED, Finish.STOPPED, Finish.STOPPED, Finish.LENGTH]),
        logp_sampler=zeros,
        version=torch.zeros(4, dtype=torch.long),
        step_id=torch.where(mask, (torch.arange(5) - 1) // 2, -1),
        baseline_only=torch.zeros(4, dtype=torch.bool),
        rows=({},) * 4,
        texts=("",) * 4,
        score=score,
        reward=score,
        step_reward=zeros,
        value=torch.tensor(
            [[0.5, 0.6, 0.9, 0, 0], [0.5, 0.4, 0.1, 0, 0], [0.5, 0.7, 0.8, 0.9, 0.9], [0.5, 0.4, 0.3, 0, 0]]
        ),
    )


def states_of(batch: Batch) -> values.States:
    assert batch.value is not None
    return values.states_of(batch, batch.value, batch.score, batch.states)


def test_summary_of_a_stored_batch_by_hand():
    """14 states. Outcomes: eight 1 (0.5 .6 .9 .5 .7 .8 .9 .9, sum 5.8), six 0 (.5 .4 .1 .5 .4 .3, sum 2.2).

    Squared errors: .25 .16 .01 .25 .09 .04 .01 .01 = .82 for outcome 1, .25 .16 .01 .25 .16 .09 = .92 for outcome 0,
    1.74 in all, which is 14 times the Brier score. The mean error is (8 - 8) / 14 = 0, so the explained variance is
    1 - (1.74 / 14) / (8 * 6 / 14^2) = .4925. Two bins of equal mass have the edge .5 (the 7th of 14). The lower bin has
    .1 .3 .4 .4 .5 .5 .5 .5, mean .4, with two outcomes of 1; the upper bin .6 .7 .8 .9 .9 .9, mean .8, all outcomes 1.
    The calibration error is (8 |.4 - .25| + 6 |.8 - 1|) / 14 = 2.4 / 14. At the end of the finished completions the
    values are .9 .1 .9 for outcomes 1 0 1: bias (-.1 + .1 - .1) / 3. At the end of the one that was cut off: .3 for 0.
    """
    states = states_of(stored_batch())
    curve = values.calibration(states, bins=2)
    metrics = values.summary(states, curve)
    expected = {
        "value/states": 14,
        "value/mean": 8 / 14,
        "value/outcome": 8 / 14,
        "value/bias": 0.0,
        "value/rmse": math.sqrt(1.74 / 14),
        "value/brier": 1.74 / 14,
        "value/explained_variance": 1 - 1.74 / 14 / (48 / 196),
        "value/calibration_error": 2.4 / 14,
        "value/truncated": 0.25,
        "value/bias_truncated": 0.3,
        "value/bias_finished": -0.1 / 3,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (curve.count, curve.value, curve.outcome) == ([8, 6], pytest.approx([0.4, 0.8]), [0.25, 1.0])
    assert curve.low == pytest.approx([0.1, 0.5]) and curve.high == pytest.approx([0.5, 0.9])


def test_positions_and_steps_by_hand():
    """The first half of positions, 0 to 1/2 without its end, has the four prompts and the first of four tokens. Steps
    have two tokens, so that only the third completion reaches step 1."""
    states = states_of(stored_batch())
    halves = values.by_position(states, bins=2)
    assert halves.count == [5, 9]
    assert halves.value == pytest.approx(
        [(4 * 0.5 + 0.7) / 5, (0.6 + 0.9 + 0.4 + 0.1 + 0.8 + 0.9 + 0.9 + 0.4 + 0.3) / 9]
    )
    steps = values.by_step(states)
    assert (steps.low, steps.count) == ([-1, 0, 1], [4, 8, 2])
    assert steps.value == pytest.approx([0.5, (0.6 + 0.9 + 0.4 + 0.1 + 0.7 + 0.8 + 0.4 + 0.3) / 8, 0.9])
    assert values.by_step(states, most=0).count == [4, 10]


def test_brier_score_is_for_outcomes_of_zero_and_one():
    assert values.brier_score(torch.tensor([0.8, 0.3]), torch.tensor([1.0, 0.0])) == pytest.approx((0.04 + 0.09) / 2)
    assert math.isnan(values.brier_score(torch.tensor([0.8, 0.3]), torch.tensor([1.0, 0.5])))


def test_soft_values_are_means_on_their_scale():
    """V = beta log E exp(r / beta) for r = 0, 1 with equal odds becomes the mean of both outcomes on the new scale."""
    beta, outcomes = 0.5, torch.tensor([0.0, 1.0], dtype=torch.float64)
    value = beta * (outcomes / beta).exp().mean().log()
    scaled = values.on_mean_scale(outcomes, "soft", beta, top=1.0)
    assert float(values.on_mean_scale(value, "soft", beta, top=1.0)) == pytest.approx(float(scaled.mean()))
    assert torch.equal(values.on_mean_scale(outcomes, "mean", beta, top=1.0), outcomes)


# -------------------------------------------------------------------------------------- metrics, against scalar loops


def random_states(batch: Batch) -> tuple[Batch, values.States, list[dict]]:
    value = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(len(batch))) * batch.states
    value = (value * 20).round() / 20  # ties
    batch = batch.set(value=value)
    return batch, states_of(batch), reference.states(batch, value, batch.score)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 4), bins=st.integers(2, 12))
def test_metrics_equal_scalar_loops(seed: int, groups: int, bins: int):
    from random_batch import make_random_batch

    _, states, loop_states = random_states(make_random_batch(seed, groups=groups))
    names = ("value", "outcome", "position", "step", "last", "truncated", "group")
    for name in names:
        assert getattr(states, name).tolist() == pytest.approx([state[name] for state in loop_states])
    curve, expected = values.calibration(states, bins), reference.calibration(loop_states, bins)
    for name in ("count", "value", "outcome", "standard_error"):
        assert getattr(curve, name) == pytest.approx([bin[name] for bin in expected], abs=1e-9)
    error = values.expected_calibration_error(curve)
    assert error == pytest.approx(reference.calibration_error(expected))
    targets = [state["outcome"] for state in loop_states]
    if len(set(targets)) > 1:
        explained = reference.explained_variance([state["value"] for state in loop_states], targets)
        assert values.explained_variance(states.value, states.outcome) == pytest.approx(explained)


@settings(max_examples=30, deadline=None)
@given(numbers=st.lists(st.floats(-(2.0**80), 2.0**80, width=32), min_size=1, max_size=30), level=st.floats(0, 1))
def test_quantiles_are_elements_found_by_counting(numbers: list[float], level: float):
    quantiles = values.global_quantiles(torch.tensor(numbers), [level])
    assert float(quantiles[0]) == reference.quantile(numbers, level)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_agreement_equals_scalar_loops(seed: int):
    generator = torch.Generator().manual_seed(seed)
    value, outcomes = torch.rand(9, generator=generator), (torch.rand(9, 6, generator=generator) > 0.4).float()
    outcomes[torch.rand(9, 6, generator=generator) > 0.8] = math.nan
    outcomes[0, 1:] = math.nan  # one continuation is not enough
    value[1] = math.nan
    metrics = values.agreement(value, outcomes)
    assert metrics == pytest.approx(reference.agreement(value.tolist(), outcomes.tolist()), abs=1e-6)


def test_the_noise_of_few_continuations_is_taken_out():
    """If values are the true probabilities of the outcomes, the error against means of 8 is all noise, and the
    correlation reaches its ceiling."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(4000, generator=generator, dtype=torch.float64)
    outcomes = (torch.rand(4000, 8, generator=generator, dtype=torch.float64) < truth[:, None]).double()
    metrics = values.agreement(truth, outcomes)
    plain = float((truth - outcomes.mean(-1)).square().mean().sqrt())
    assert plain > 0.13 and metrics["branches/rmse"] < 0.03
    assert metrics["branches/correlation"] == pytest.approx(metrics["branches/correlation_ceiling"], abs=0.01)


# ------------------------------------------------------------------------------------------------------- several ranks


def across(shares: list[values.States]):
    """Returns a function that runs ``measure`` on each share in a thread of its own, with sums over all shares, like
    ranks in lock-step."""
    import threading

    barrier, board = threading.Barrier(len(shares)), [torch.zeros(0)] * len(shares)

    def all_sum_of(rank: int):
        def all_sum(tensor: torch.Tensor) -> torch.Tensor:
            board[rank] = tensor
            barrier.wait(10)
            total = torch.stack(board).sum(0)
            barrier.wait(10)
            return total

        return all_sum

    def run(measure) -> list:
        results: list = [None] * len(shares)

        def run_rank(rank: int) -> None:
            results[rank] = measure(dataclasses.replace(shares[rank], all_sum=all_sum_of(rank)))

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(len(shares))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


def everything(states: values.States) -> dict:
    """Every metric and curve of the report."""
    calibration = values.calibration(states, 4)
    return {
        **values.summary(states, calibration),
        "calibration": dataclasses.asdict(calibration),
        "position": dataclasses.asdict(values.by_position(states, 5)),
        "step": dataclasses.asdict(values.by_step(states)),
        "bands": values.value_bands(states, 3),
        "errors": values.error_histogram(states, 7),
        **values.agreement(states.value, states.outcome[:, None] + torch.linspace(-0.1, 0.1, 3), states.all_sum),
    }


def flat(data: object) -> list[float]:
    if isinstance(data, dict):
        return [x for value in data.values() for x in flat(value)]
    if isinstance(data, list):
        return [x for value in data for x in flat(value)]
    assert isinstance(data, int | float)
    return [float(data)]


def test_two_ranks_equal_one(random_batch):
    """Two ranks with a share of the prompts each, and a third one without any, give the metrics of one process."""
    _, states, _ = random_states(random_batch(3, groups=5))
    expected = flat(everything(states))
    shares = [states.where(states.group % 3 == 0), states.where(states.group % 3 != 0), states.where(states.group < 0)]
    for metrics in across(shares)(everything):
        assert flat(metrics) == pytest.approx(expected, nan_ok=True, abs=1e-9)


# ---------------------------------------------------------------------------------------- metrics of a training step


def test_metrics_of_a_step_by_hand():
    """The targets are the rewards, except that the last token of the completion that was cut off has no target."""
    from posttrain.system.processes import Processes

    batch = stored_batch()
    target = torch.where(batch.states, batch.reward[:, None], torch.nan)
    target[3, 2] = torch.nan
    with Processes() as processes:
        assert values.value_metrics(batch, processes) == {}
        batch = batch.set(target=target)
        plain = values.value_metrics(batch, processes)
        clipped = values.value_metrics(batch, processes, support=torch.linspace(0.0, 0.5, 3))
    assert plain == pytest.approx(
        {
            "value/explained_variance": reference.explained_variance(
                [0.5, 0.6, 0.9, 0.5, 0.7, 0.8, 0.9, 0.9, 0.5, 0.4, 0.1, 0.5, 0.4], [1.0] * 8 + [0.0] * 5
            ),
            "value/mean": 7.7 / 13,
            "value/target": 8 / 13,
            "value/rmse": math.sqrt((1.74 - 0.09) / 13),
            "value/bias_truncated": 0.3,
        },
        abs=1e-6,
    )
    assert clipped == pytest.approx(plain | {"value/clipped": 8 / 13})


# ------------------------------------------------------------------------------------------------------ steps and text


def decode(ids) -> str:
    """Decodes tokens that are bytes; a character may have several."""
    return bytes(ids).decode(errors="replace")


def test_pieces_keep_characters_of_several_tokens_whole():
    text = "a\u00e9\u20acb"
    assert pieces(list(text.encode()), decode) == ["a", "", "\u00e9", "", "", "\u20ac", "b"]
    assert pieces([65, 0xFF, 66], decode)[0] == "A" and len(pieces([65, 0xFF, 66], decode)) == 3


def test_steps_end_with_their_separators():
    """Several separators in a row end one step; a separator at the very end does not begin a step."""
    text = b"ab\n\nc\nde\n"
    row = torch.tensor([list(b"??" + text)])
    mask, zeros = torch.tensor([[False] * 2 + [True] * len(text)]), torch.zeros(row.shape)
    batch = stored_batch()[[0]].set(
        value=None, logp_sampler=zeros, step_reward=zeros, mask=mask, tokens=row, step_id=torch.zeros_like(row)
    )
    assert steps_by_text(batch, decode, "\n").tolist() == [[-1, -1, 0, 0, 0, 0, 1, 1, 2, 2, 2]]


# ------------------------------------------------------------------------------------------------------------ branches


def test_prefixes_spread_over_completions_and_do_not_depend_on_other_prompts(random_batch):
    batch = random_batch(1, groups=4)
    prompt = torch.arange(batch.mask.shape[1]) < 3
    batch = batch.set(mask=(torch.arange(batch.mask.shape[1]) < batch.length[:, None]) & ~prompt)
    prefixes = choose_branch_points(batch, prompts=3, per_prompt=3, seed=5)
    assert len(prefixes) == 9
    for j, prefix in enumerate(prefixes):
        row, column = prefix.at
        length = int(batch.mask[row].sum())
        assert int(batch.group[row]) == j // 3
        assert batch.tokens[row, : column + 1].tolist() == prefix.prompt + prefix.chosen
        assert len(prefix.prompt) == 3 and j % 3 <= 3 * len(prefix.chosen) / length + 3 / length
        assert 3 * len(prefix.chosen) / length < j % 3 + 1
    alone = choose_branch_points(batch[batch.group == 1], prompts=3, per_prompt=3, seed=5)
    assert [prefix.chosen for prefix in alone] == [prefix.chosen for prefix in prefixes[3:6]]
    assert batch.value is not None
    assert value_at(batch.value, prefixes).tolist() == [float(batch.value[prefix.at]) for prefix in prefixes]
    assert value_at(batch.value, []).shape == (0,)


# --------------------------------------------------------------------------------------------------- pictures and page


def test_pictures_and_page_are_drawn_from_plain_numbers(tmp_path: Path):
    states = states_of(stored_batch())
    curve = values.calibration(states, 2)
    means = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    report = {
        "metrics": values.summary(states, curve) | values.agreement(torch.tensor([0.6, 0.4]), means),
        "unit": "reward",
        "notes": ["<a note>"],
        "calibration": dataclasses.asdict(curve),
        "by_position": dataclasses.asdict(values.by_position(states, 4)),
        "bands": values.value_bands(states, 4),
        "by_step": dataclasses.asdict(values.by_step(states)),
        "errors": values.error_histogram(states),
        "branches": {"value": [0.6, 0.4], "mean": [0.7, 0.3], "standard_error": [0.1, None], "completions": 3},
        "suite": "suite: value",
    }
    pictures = draw_all(report, tmp_path)
    assert set(pictures) == {f"{name}.png" for name in ("calibration", "position", "steps", "errors", "branches")}
    example = Example("1<2?", ["yes", "\n", "&"], 0.5, [0.6, 0.7, 0.9], 1.0, "stopped")
    text = write_page(tmp_path, "A <title>", report, pictures, [example]).read_text()
    assert text.count("data:image/png;base64,") == 5
    for shown in ("A &lt;title&gt;", "&lt;a note&gt;", "1&lt;2?", "&crarr;\n", ">&amp;<", 'title="0.7000"'):
        assert shown in text
    darkness = [
        255 - int(text.split(f'title="{v}"')[0].rsplit("rgb(", 1)[1].split(",")[0]) for v in ("0.6000", "0.9000")
    ]
    assert darkness[0] < darkness[1]
    axes = Figure().subplots()
    assert not draw_steps(axes, report | {"by_step": dataclasses.asdict(values.by_step(states, 0))}, "reward")
    assert not draw_branches(axes, report | {"branches": None}, "reward")
