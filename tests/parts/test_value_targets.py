"""Targets and value-based advantages: against scalar loops, golden numbers, identities, invariances."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import reference_values as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import close, examples, halves, on_ranks, seeds
from random_batch import make_random_batch
from torch import Tensor
from value_cases import pad_values, value_batch

from posttrain.batch import Batch, Finish
from posttrain.micro_batches import blank_row
from posttrain.parts import advantages, targets
from posttrain.parts.credit import row_lambda, step_ends, step_starts, weigh_worst

Part = Callable[[Batch], Tensor]
lambdas = st.sampled_from([0.0, 0.5, 0.95, 1.0])
gammas = st.sampled_from([1.0, 0.9, 0.0])
alphas = st.sampled_from([None, 0.05, 0.5, 1.5])
endings = st.sampled_from(["bootstrap", "end"])

ADVANTAGES: dict[str, Part] = {
    "gae": advantages.gae,
    "gae-adaptive": functools.partial(advantages.gae, alpha=0.5, gamma=0.9, truncated="bootstrap"),
    "gae-value": functools.partial(advantages.gae, last="value"),
    "value_change": advantages.value_change,
    "value_change-step": functools.partial(advantages.value_change, level="step", last="reward"),
    "static_q": advantages.static_q,
    "returns-token": functools.partial(advantages.returns, token_center=1024),
    "returns-process": functools.partial(advantages.returns, center="leave_one_out", step_center="leave_one_out"),
}
TARGETS: dict[str, Part] = {
    "monte_carlo": targets.lambda_return,
    "td": functools.partial(targets.lambda_return, lambda_=0.0),
    "td_lambda": functools.partial(targets.lambda_return, lambda_=0.9, truncated="bootstrap"),
    "soft_return": targets.soft_return,
    "outcome_label": targets.outcome_label,
    "outcome_label-end": functools.partial(targets.outcome_label, at="end"),
    "step_labels": targets.step_labels,
}
ALL = ADVANTAGES | TARGETS


def line(values: list[float], mask: list[int], reward: float, *, finish: Finish = Finish.STOPPED) -> Batch:
    """One completion with one of these values per column."""
    columns = len(mask)
    chosen = torch.tensor([mask]).bool()
    return make_random_batch(0, groups=1, size=2, columns=columns, prompt=1)[[0]].set(
        mask=chosen,
        length=torch.tensor([columns]),
        finish=torch.tensor([int(finish)]),
        step_id=torch.where(chosen, torch.arange(columns), -1),
        reward=torch.tensor([reward]),
        score=torch.tensor([reward]),
        step_reward=torch.zeros(1, columns),
        value=torch.tensor([values]),
        value_next=None,
    )


def alive(batch: Batch) -> Tensor:
    return (batch.scored & ~batch.baseline_only)[:, None]


def chosen(result: Tensor, batch: Batch) -> list[float]:
    return result[batch.mask].tolist()


# ---- against the scalar loops ---------------------------------------------------------------------------------------


@given(seed=seeds, gamma=gammas, lambda_=lambdas, alpha=alphas, truncated=endings)
@examples(12)
def test_gae_equals_the_scalar_loops(seed: int, gamma: float, lambda_: float, alpha, truncated) -> None:
    batch = value_batch(seed)
    found = advantages.gae(batch, gamma=gamma, lambda_=lambda_, alpha=alpha, truncated=truncated)
    assert found.dtype == torch.float32
    close(found, reference.gae(reference.read(batch), gamma, lambda_, alpha, truncated), 1e-5)


@given(seed=seeds, gamma=gammas, lambda_=lambdas, alpha=alphas, truncated=endings)
@examples(12)
def test_lambda_returns_equal_the_scalar_loops(seed: int, gamma: float, lambda_: float, alpha, truncated) -> None:
    batch = value_batch(seed).set(value_next=None)
    found = targets.lambda_return(batch, gamma=gamma, lambda_=lambda_, alpha=alpha, truncated=truncated)
    same(found, reference.lambda_return(reference.read(batch), gamma, lambda_, alpha, truncated))


@given(seed=seeds, lambda_=lambdas, truncated=endings)
@examples(12)
def test_lambda_returns_over_every_next_token_equal_the_scalar_loops(seed: int, lambda_: float, truncated) -> None:
    batch = value_batch(seed)
    found = targets.lambda_return(batch, lambda_=lambda_, truncated=truncated)
    same(found, reference.lambda_return(reference.read(batch), 1.0, lambda_, None, truncated))


@given(seed=seeds, beta=st.sampled_from([0.1, 2.0]), truncated=endings)
@examples(8)
def test_soft_returns_equal_the_scalar_loops(seed: int, beta: float, truncated) -> None:
    batch = value_batch(seed)
    expected = reference.soft_return(reference.read(batch), beta, truncated)
    same(targets.soft_return(batch, beta=beta, truncated=truncated), expected)


@given(seed=seeds)
@examples(4)
def test_a_sampler_that_is_the_reference_pays_nothing(seed: int) -> None:
    batch = value_batch(seed)
    batch = batch.set(logp_ref=batch.logp_sampler)
    same(targets.soft_return(batch), targets.lambda_return(batch, truncated="end").tolist())


@pytest.mark.parametrize("level", ["token", "step"])
@pytest.mark.parametrize("last", ["value", "reward"])
@given(seed=seeds)
@examples(6)
def test_value_changes_equal_the_scalar_loops(level, last, seed: int) -> None:
    batch = value_batch(seed)
    found = advantages.value_change(batch, level=level, last=last)
    close(found, reference.value_change(reference.read(batch), level, last))


@given(seed=seeds, length=st.sampled_from([4, 1024]))
@examples(10)
def test_the_other_advantages_equal_the_scalar_loops(seed: int, length: int) -> None:
    batch = value_batch(seed)
    rows = reference.read(batch)
    close(advantages.returns(batch, token_center=length), reference.token_centred(rows, length), 1e-5)
    close(advantages.static_q(batch), reference.static_q(rows))
    process = advantages.returns(batch, center="leave_one_out", step_center="leave_one_out")
    close(process, reference.implicit_returns(rows), 1e-5)


def same(found: Tensor, expected: list[list[float]]) -> None:
    """Asserts that NaN is in the same places, and that all other numbers are close."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(found.isnan(), wanted.isnan())
    close(found.nan_to_num(), wanted.nan_to_num(), 1e-5)


# ---- golden numbers -------------------------------------------------------------------------------------------------


def test_golden_numbers_of_gae() -> None:
    """r = [0, 0, 1], V = [.5, .6, .7]: λ = 0.95 by hand is .3, .1 + .95 · .3 = .385, .1 + .95 · .385 = .46575."""
    batch = line([0.5, 0.6, 0.7, 0.0], [0, 1, 1, 1], 1.0)
    assert chosen(advantages.gae(batch, lambda_=0.95), batch) == pytest.approx([0.46575, 0.385, 0.3])
    assert chosen(advantages.gae(batch, lambda_=1.0), batch) == pytest.approx([0.5, 0.4, 0.3])
    assert chosen(advantages.gae(batch, lambda_=0.0), batch) == pytest.approx([0.1, 0.1, 0.3])
    assert chosen(advantages.gae(batch, gamma=0.9, lambda_=0.8), batch) == pytest.approx([0.21712, 0.246, 0.3])


def test_tool_output_is_stepped_over() -> None:
    """V = [.5, 9, .7] with the second column a tool's: the states are 0 and 2, as if it were not there."""
    apart = line([0.5, 9.0, 0.7, 0.0], [0, 1, 0, 1], 1.0)
    assert chosen(advantages.gae(apart, lambda_=0.95), apart) == pytest.approx([0.485, 0.3])
    assert targets.lambda_return(apart, lambda_=0.95)[0].tolist() == pytest.approx([0.985, 1.0, 1.0, 1.0])


def test_truncation_bootstraps_and_an_ending_does_not() -> None:
    """γ = 0.9, V = .8 at the last token of a completion that was cut off with reward .1: G = .1 + .9 · .8 = .82."""
    cut = line([0.5, 0.6, 0.8], [0, 1, 1], 0.1, finish=Finish.LENGTH)
    bootstrapped = advantages.gae(cut, gamma=0.9, lambda_=0.0, truncated="bootstrap")
    assert chosen(bootstrapped, cut)[1] == pytest.approx(0.82 - 0.6)
    assert chosen(advantages.gae(cut, gamma=0.9, lambda_=0.0), cut)[1] == pytest.approx(0.1 - 0.6)
    returns = targets.lambda_return(cut, gamma=0.9, truncated="bootstrap")[0]
    assert returns[:2].tolist() == pytest.approx([0.738, 0.82]) and returns[2].isnan()
    ended = targets.lambda_return(cut, gamma=0.9)[0]
    assert ended.tolist() == pytest.approx([0.09, 0.1, 0.1])
    aborted = cut.set(finish=torch.tensor([int(Finish.ABORTED)]))
    identical(targets.lambda_return(aborted, gamma=0.9, truncated="bootstrap")[0], returns)


def test_golden_numbers_of_the_length_adaptive_weight() -> None:
    """VAPO's λ = 1 - 1 / (0.05 l) at 10, 20, 40, 100 and 1000 tokens."""
    batch = make_random_batch(0, groups=1, size=5, columns=1001, prompt=1)
    lengths = torch.tensor([10, 20, 40, 100, 1000])
    batch = batch.set(mask=(torch.arange(1001) >= 1) & (torch.arange(1001) <= lengths[:, None]))
    assert row_lambda(batch, 1.0, 0.05).tolist() == pytest.approx([0, 0, 0.5, 0.8, 0.98])


@given(seed=seeds, temperature=st.sampled_from([0.1, 1.0, 30.0]))
@examples(10)
def test_the_worst_step_weighs_most_as_in_the_scalar_loops(seed: int, temperature: float) -> None:
    batch = value_batch(seed)
    ends = step_ends(batch)
    found = weigh_worst(batch.step_reward, ends, temperature)
    assert not found[~ends].any()
    for row in range(len(batch)):
        steps = batch.step_reward[row][ends[row]].tolist()
        close(found[row][ends[row]], reference.worst_weighed(steps, temperature) if steps else [], 1e-5)


def test_golden_numbers_of_the_worst_step() -> None:
    """r = [.8, .2, -.5]: T = 0.1 leaves the worst step, T = 1 weighs softly, T -> ∞ is the mean form of the sum."""
    rewards, ends = torch.tensor([[0.8, 0.2, -0.5]]).double(), torch.ones(1, 3, dtype=torch.bool)

    def sums(temperature: float) -> list[float]:
        return weigh_worst(rewards, ends, temperature).flip(-1).cumsum(-1).flip(-1)[0].tolist()

    assert sums(0.1) == pytest.approx([-0.499359, -0.499361, -0.499543], abs=1e-6)
    assert sums(1.0) == pytest.approx([-0.103248, -0.226488, -0.282627], abs=1e-6)
    assert sums(1e9) == pytest.approx([0.5 / 3, -0.3 / 3, -0.5 / 3], abs=1e-6)


def test_golden_numbers_of_backups() -> None:
    """Two tokens of probability 1/4 and 3/4 with values 1 and 0; β = 1: log(e/4 + 3/4) = 0.357374."""
    values, logp = torch.tensor([[1.0, 0.0, torch.nan]]), torch.tensor([[0.25, 0.75, 0.0]]).log()

    def of(kind, beta=1.0):
        return targets.backup(values, logp, kind=kind, beta=beta).item()

    assert of("mean") == pytest.approx(0.25)
    assert of("soft") == pytest.approx(0.357374, abs=1e-6)
    assert of("max") == 1.0
    assert of("greedy") == 0.0
    assert of("soft", beta=100.0) == pytest.approx(of("mean"), abs=1e-2)
    assert of("soft", beta=0.01) == pytest.approx(of("max"), abs=2e-2)


def test_golden_numbers_of_ensembles() -> None:
    values = torch.tensor([[1.0, 4.0], [3.0, 8.0]])
    assert targets.reduce_members(values, how="mean").tolist() == [2, 6]
    assert targets.reduce_members(values, how="min").tolist() == [1, 4]
    assert targets.reduce_members(values, how="max").tolist() == [3, 8]
    assert targets.reduce_members(values, how="mean_minus_std", deviations=2.0).tolist() == [0, 2]
    assert targets.reduce_members(values[:1], how="mean_minus_std").tolist() == [1, 4]


def test_branches_estimate_values() -> None:
    rewards = torch.tensor([[1.0, 0.0, torch.nan], [0.0, 0.0, 0.0], [torch.nan] * 3])
    assert targets.branch_estimate(rewards)[:2].tolist() == [0.5, 0.0]
    assert targets.branch_estimate(rewards, how="any")[:2].tolist() == [1.0, 0.0]
    assert targets.branch_estimate(rewards)[2].isnan() and targets.branch_estimate(rewards, how="any")[2].isnan()


def test_steps_begin_and_end_where_the_step_changes() -> None:
    batch = line([0.0] * 7, [0, 1, 1, 0, 1, 1, 1], 0.0).set(step_id=torch.tensor([[-1, 0, 0, -1, 0, 1, 2]]))
    assert step_ends(batch).nonzero()[:, 1].tolist() == [4, 5, 6]
    assert step_starts(batch).nonzero()[:, 1].tolist() == [1, 5, 6]


# ---- identities -----------------------------------------------------------------------------------------------------


@given(seed=seeds)
@examples(8)
def test_gae_with_lambda_1_is_the_return_minus_the_value(seed: int) -> None:
    batch = value_batch(seed)
    batch = batch.set(finish=torch.zeros_like(batch.finish))
    value = torch.nn.functional.pad(batch.value[:, :-1], (1, 0))
    expected = (advantages.returns(batch) - value).where(batch.mask & alive(batch), 0.0)
    close(advantages.gae(batch, lambda_=1.0), expected, 1e-5)


@given(seed=seeds, lambda_=lambdas)
@examples(8)
def test_the_target_is_the_advantage_plus_the_value(seed: int, lambda_: float) -> None:
    """TD(λ) target - V = GAE(λ), at the state of each chosen token."""
    batch = value_batch(seed).set(value_next=None)
    goal = targets.lambda_return(batch, gamma=0.9, lambda_=lambda_)
    error = torch.nn.functional.pad((goal - batch.value)[:, :-1], (1, 0)).where(batch.mask & alive(batch), 0.0)
    close(advantages.gae(batch, gamma=0.9, lambda_=lambda_), error, 1e-5)


@given(seed=seeds)
@examples(8)
def test_changes_of_value_telescope(seed: int) -> None:
    batch = value_batch(seed)
    for level in ("token", "step"):
        total = advantages.value_change(batch, level=level)
        for i, row in enumerate(batch.mask):
            where = row.nonzero().squeeze(-1)
            if not len(where) or not alive(batch)[i]:
                assert not total[i].any()
                continue
            first, last = int(where[0]), int(where[-1])
            gained = total[i][step_starts(batch)[i]] if level == "step" else total[i]
            close(gained.sum(), batch.value[i, last] - batch.value[i, first - 1], 1e-5)


@given(seed=seeds)
@examples(8)
def test_a_critic_is_read_only_where_it_is_needed(seed: int) -> None:
    batch = value_batch(seed).set(value=None, value_next=None)
    ended = targets.lambda_return(batch, truncated="end")
    stopped = batch.set(finish=torch.zeros_like(batch.finish))
    assert torch.equal(targets.lambda_return(stopped).nan_to_num(), ended.nan_to_num())
    with pytest.raises(ValueError, match="value has not been filled"):
        targets.lambda_return(stopped, lambda_=0.9)


@pytest.mark.parametrize("kind", ["soft", "max", "greedy"])
def test_sampled_returns_are_refused_for_other_kinds_than_the_mean(kind) -> None:
    batch = value_batch(0)
    with pytest.raises(ValueError, match="set lambda_: 0"):
        targets.lambda_return(batch, backup=kind)
    with pytest.raises(ValueError, match="per_token"):
        targets.lambda_return(batch.set(value_next=None), backup=kind, lambda_=0.0)
    with pytest.raises(ValueError, match="undiscounted"):
        targets.lambda_return(batch, backup=kind, lambda_=0.0, gamma=0.9)


# ---- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@given(seed=seeds)
@examples(3)
def test_padding_row_order_and_ranks_change_nothing(name: str, seed: int) -> None:
    batch, part = value_batch(seed), ALL[name]
    expected = part(batch)
    nothing = torch.nan if name in TARGETS else 0.0
    wide = part(pad_values(batch, 3, torch.nan))
    identical(wide, torch.nn.functional.pad(expected, (0, 3), value=nothing))
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    identical(part(batch[order]), expected[order])
    parts = halves(batch)
    for rows, found in zip(parts, on_ranks([batch[rows] for rows in parts], part), strict=True):
        identical(found, expected[rows])


def identical(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    close(found.nan_to_num(), expected.nan_to_num().double())


@pytest.mark.parametrize("name", ALL)
@given(seed=seeds)
@examples(3)
def test_what_lies_off_the_states_and_unscored_rows_is_not_read(name: str, seed: int) -> None:
    batch, part = value_batch(seed), ALL[name]
    garbage = torch.full(batch.mask.shape, 7.5)
    dirty = batch.set(
        value=batch.value.where(batch.states, garbage),
        value_next=batch.value_next.where(batch.states, garbage),
        step_reward=batch.step_reward.where(batch.mask, garbage),
    )
    identical(part(dirty), part(batch))
    dead = ~alive(batch).expand_as(batch.mask)
    result = part(batch)
    assert (result[dead].isnan() if name in TARGETS else result[dead] == 0).all()
    assert (result[~batch.states].isnan() if name in TARGETS else result[~batch.mask] == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_rows_without_chosen_tokens_have_nothing(name: str) -> None:
    batch = value_batch(0)
    empty = blank_row(batch.set(value_share=None))
    result = ALL[name](empty)
    assert (result.isnan() if name in TARGETS else result == 0).all()
