"""Value losses, and the policy losses that read values: scalar loops, golden numbers, identities, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import reference
import reference_values
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import close, examples, seeds
from torch import Tensor
from value_cases import decode, on_outputs, pad_values, value_batch, value_outputs, widened

from posttrain.batch import Batch, Outputs
from posttrain.parts import categorical, losses, value_losses

Loss = Callable[[Outputs, Batch], Tensor]
Rows = reference_values.Rows

ALONE: dict[str, tuple[Loss, Callable[[Rows, Outputs, int, int], float]]] = {
    "mse": (value_losses.mse, lambda rows, out, i, c: reference_values.mse(at(out, i, c), goal(rows, i, c), 0, None)),
    "mse-clip": (
        functools.partial(value_losses.mse, clip=0.2),
        lambda rows, out, i, c: reference_values.mse(at(out, i, c), goal(rows, i, c), rows.value[i][c], 0.2),
    ),
    "huber": (
        functools.partial(value_losses.huber, delta=0.5),
        lambda rows, out, i, c: reference_values.huber(at(out, i, c), goal(rows, i, c), 0.5),
    ),
    "expectile": (
        value_losses.expectile,
        lambda rows, out, i, c: reference_values.expectile(at(out, i, c), goal(rows, i, c), 0.7),
    ),
    "soft_path": (
        value_losses.soft_path,
        lambda rows, out, i, c: reference_values.soft_path_value(
            rows, out.value.tolist(), out.logp.tolist(), i, c, 0.03
        ),
    ),
    "hl_gauss": (
        value_losses.hl_gauss,
        lambda rows, out, i, c: reference_values.cross_entropy(
            reference_values.hl_gauss_target(goal(rows, i, c), out.support.tolist()), logits(out, i, c)
        ),
    ),
    "two_hot": (
        value_losses.two_hot,
        lambda rows, out, i, c: reference_values.cross_entropy(
            reference_values.two_hot_target(goal(rows, i, c), out.support.tolist()), logits(out, i, c)
        ),
    ),
    "c51": (
        functools.partial(value_losses.c51, gamma=0.9),
        lambda rows, out, i, c: reference_values.c51(
            rows, out.value_logits.tolist(), out.support.tolist(), i, c, 0.9, "end"
        ),
    ),
    "quantile": (
        value_losses.quantile,
        lambda rows, out, i, c: reference_values.quantile(logits(out, i, c), [goal(rows, i, c)], 1.0),
    ),
    "bce": (value_losses.bce, lambda rows, out, i, c: reference_values.bce(logits(out, i, c)[0], goal(rows, i, c))),
}
TOGETHER: dict[str, Loss] = {
    "q_ranking": value_losses.q_ranking,
    "bradley_terry": functools.partial(value_losses.bradley_terry, margin="margin", label_smoothing=0.1),
    "centred": value_losses.centred,
    "contrastive_twist": functools.partial(value_losses.contrastive_twist, beta=0.5, importance=True),
    "noise_contrastive": functools.partial(value_losses.noise_contrastive, beta=0.5),
}
VALUE_LOSSES = {name: loss for name, (loss, _) in ALONE.items()} | TOGETHER
POLICY_LOSSES: dict[str, Loss] = {
    "banded": functools.partial(losses.banded, low=0.2, high=0.2),
    "soft_path-token": losses.soft_path,
    "soft_path-step": functools.partial(losses.soft_path, level="step"),
    "soft_path-response": functools.partial(losses.soft_path, level="response"),
}
EVERY = VALUE_LOSSES | {f"policy {name}": loss for name, loss in POLICY_LOSSES.items()}


def at(outputs: Outputs, i: int, c: int) -> float:
    return outputs.value[i, c].item()


def logits(outputs: Outputs, i: int, c: int) -> list[float]:
    return outputs.value_logits[i, c].tolist()


def goal(rows: Rows, i: int, c: int) -> float:
    return rows.target[i][c]


def case(seed: int, **options) -> tuple[Batch, Outputs]:
    batch = value_batch(seed, labels=True, **options)
    batch = batch.set(score=batch.score.clamp(0, 1))
    return batch, value_outputs(batch, seed)


# ---- against the scalar loops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALONE)
@given(seed=seeds)
@examples(5)
def test_losses_of_a_state_equal_the_scalar_loops(name: str, seed: int) -> None:
    batch = value_batch(seed, labels=name == "bce")
    outputs = value_outputs(batch, seed)
    loss, scalar = ALONE[name]
    rows = reference_values.read(batch)
    expected = rows.zeros()
    for i in range(len(batch)):
        # c51 makes its targets of rewards: completions without one have none
        for c in rows.learned(i) if name != "c51" or rows.trained(i) or not rows.tokens(i) else []:
            expected[i][c] = scalar(rows, outputs, i, c)
    found = loss(outputs, batch)
    assert found.dtype == torch.float32
    kept = batch.scored[:, None] & ~batch.baseline_only[:, None] if name == "c51" else torch.tensor(True)
    close(found.where(kept, 0.0), expected, 2e-4)


@given(seed=seeds, margin=st.sampled_from([0.0, 2.0, 4.0]))
@examples(6)
def test_step_ranking_equals_the_scalar_loop(seed: int, margin: float) -> None:
    batch, outputs = case(seed)
    rows = reference_values.read(batch)
    found = value_losses.q_ranking(outputs, batch, margin=margin).sum(-1)
    for i in range(len(batch)):
        steps = rows.learned(i)
        scores, correct = [at(outputs, i, c) for c in steps], [goal(rows, i, c) > 0.5 for c in steps]
        close(found[i], len(steps) * reference_values.q_ranking(scores, correct, margin), 1e-4)


@given(seed=seeds)
@examples(6)
def test_losses_of_pairs_equal_the_scalar_loops(seed: int) -> None:
    batch, outputs = case(seed)
    rows, v = reference_values.read(batch), outputs.value.tolist()
    compared = TOGETHER["bradley_terry"](outputs, batch), value_losses.centred(outputs, batch)
    for group in set(rows.group):
        members = {i for pair in reference_values.pairs(rows, group) for i in pair}
        usable = [
            i for i in range(len(batch))
            if rows.group[i] == group and rows.trained(i) and rows.tokens(i) and rows.tokens(i)[-1] in rows.learned(i)
        ]  # fmt: skip
        assert members <= set(usable)
        mine = batch.group == group
        expected = (
            reference_values.bradley_terry(rows, v, group, "margin", 0.1),
            reference_values.centred(rows, v, group),
        )
        for found, wanted in zip(compared, expected, strict=True):
            close(found[mine].sum(), len(usable) * wanted, 1e-4)


@pytest.mark.parametrize("name", ["contrastive_twist", "noise_contrastive"])
@pytest.mark.parametrize("importance", [False, True])
@given(seed=seeds)
@examples(2)
def test_twist_losses_equal_the_scalar_loops(name: str, importance: bool, seed: int) -> None:
    batch, outputs = case(seed)
    found = getattr(value_losses, name)(outputs, batch, beta=0.5, importance=importance).sum()
    rows, v = reference_values.read(batch), outputs.value.tolist()
    close(found, reference_values.twist_sums(rows, v, v, 0.5, importance, name == "contrastive_twist"), 1e-4)


@given(seed=seeds)
@examples(5)
def test_losses_of_the_policy_equal_the_scalar_loops(seed: int) -> None:
    batch, outputs = case(seed)
    rows, logp = reference_values.read(batch), outputs.logp.tolist()
    banded = rows.zeros()
    for i in range(len(batch)):
        for t in rows.tokens(i):
            banded[i][t] = reference_values.banded(rows, logp, logp, i, t, 0.2, 0.2)
    close(POLICY_LOSSES["banded"](outputs, batch), banded, 1e-5)
    for i in range(len(batch)):
        tokens = len(rows.tokens(i))
        for level in ("token", "step", "response"):
            found = losses.soft_path(outputs, batch, beta=0.5, level=level)[i].sum()
            close(found, tokens * reference_values.soft_path_policy(rows, logp, logp, i, 0.5, level), 1e-4)


@pytest.mark.parametrize("level", ["token", "step", "response"])
def test_gradients_of_soft_path_are_those_of_its_moving_part(level) -> None:
    """Compared with differences of the scalar loop, in which detached numbers stay constant."""
    batch, outputs = case(3)
    rows, fixed = reference_values.read(batch), outputs.logp.tolist()

    def loss(logp: list[list[float]], _: list[list[float]]) -> float:
        terms = (reference_values.soft_path_policy(rows, logp, fixed, i, 0.5, level) for i in range(len(batch)))
        return sum(len(rows.tokens(i)) * term for i, term in enumerate(terms))

    losses.soft_path(outputs, batch, beta=0.5, level=level).sum().backward()
    places = [(i, t) for i in range(len(batch)) for t in rows.tokens(i)]
    close(outputs.logp.grad, reference.gradient(loss, fixed, places), 1e-3)


# ---- golden numbers -------------------------------------------------------------------------------------------------


def ranked(scores: list[float], labels: list[float], margin: float) -> float:
    """Loss of one completion in which every token is a step."""
    batch, outputs = case(0, plain=True)
    columns, steps = batch.mask.shape[1], len(scores)
    where = torch.arange(columns).expand_as(batch.mask)
    batch = batch.set(
        mask=(where >= 3) & (where < 3 + steps),
        target=torch.full(batch.mask.shape, torch.nan).index_copy(1, torch.arange(3, 3 + steps), spread(batch, labels)),
    )
    value = torch.zeros(batch.mask.shape).index_copy(1, torch.arange(3, 3 + steps), spread(batch, scores))
    loss = value_losses.q_ranking(replace(outputs, value=value), batch, margin=margin)
    return loss[0].sum().item() / steps


def spread(batch: Batch, values: list[float]) -> Tensor:
    return torch.tensor(values).expand(len(batch), -1)


def test_golden_numbers_of_step_ranking() -> None:
    """Q = [1, 2, -1] with the last step wrong, and [1, 2] all correct."""
    for margin, expected in {4.0: 2.219541, 2.0: 0.933927, 0.0: 0.387019}.items():
        assert ranked([1.0, 2.0, -1.0], [1.0, 1.0, 0.0], margin) == pytest.approx(expected, abs=1e-5)
    assert ranked([1.0, 2.0], [1.0, 1.0], 4.0) == pytest.approx(0.360434, abs=1e-5)
    assert ranked([100.0, -90.0], [0.0, 0.0], 4.0) == pytest.approx(104.0)  # no overflow


def test_golden_numbers_of_distributions() -> None:
    """Five bins on edges 0 to 1 (centres .1 to .9); six atoms on [0, 1]; two quantiles."""
    support = torch.linspace(0.1, 0.9, 5)
    middle = categorical.hl_gauss_target(torch.tensor(0.5), support)
    assert middle.tolist() == pytest.approx([0.02234, 0.22994, 0.49544, 0.22994, 0.02234], abs=1e-5)
    aside = categorical.hl_gauss_target(torch.tensor(0.7), support)
    assert (aside * support).sum().item() == pytest.approx(0.6906, abs=1e-4)
    atoms = torch.linspace(0, 1, 6)
    assert categorical.two_hot_target(torch.tensor(0.5), atoms).tolist() == pytest.approx([0, 0, 0.5, 0.5, 0, 0])
    moved = categorical.project(torch.full((6,), 1 / 6), 0.1 + 0.9 * atoms, atoms)
    assert moved.tolist() == pytest.approx([1 / 12] + [0.18333] * 5, abs=1e-5)
    assert (moved * atoms).sum().item() == pytest.approx(0.55)
    quantiles, targets = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5, 2.0])
    assert value_losses.quantile_huber(quantiles, targets, kappa=0.0).item() == pytest.approx(0.583333, abs=1e-6)


def test_golden_numbers_of_pairs() -> None:
    """V = 1 and 0: -log σ(1) = 0.313262, -log σ(1 - ½) = 0.474077, (1 + 0)² = 1."""
    pair = case(0, plain=True)[0][[0, 1]]
    pair = pair.set(
        group=torch.zeros(2, dtype=torch.long),
        reward=torch.tensor([1.0, 0.0]),
        mask=(torch.arange(10) > 2).expand(2, 10),
        target=torch.zeros(2, 10),
        rows=({"margin": 0.5}, {"margin": 9.0}),
    )
    apart = Outputs(logp=torch.zeros(2, 10), value=torch.tensor([[1.0], [0.0]]).expand(2, 10))
    loss = functools.partial(value_losses.bradley_terry, apart, pair)
    assert loss().sum().item() / 2 == pytest.approx(0.313262, abs=1e-6)
    assert loss(margin="margin").sum().item() / 2 == pytest.approx(0.474077, abs=1e-6)
    assert loss(label_smoothing=0.1).sum().item() / 2 == pytest.approx(0.313262 + 0.1, abs=1e-6)
    assert value_losses.centred(apart, pair).sum().item() / 2 == pytest.approx(1.0)
    assert loss()[0, -1] > 0 and not loss()[0, :-1].any() and not loss()[1].any()


# ---- distributions --------------------------------------------------------------------------------------------------


@given(bins=st.integers(9, 255), low=st.floats(-5, 5), span=st.floats(0.1, 10), share=st.floats(0, 1))
@examples(25)
def test_a_widened_support_decodes_what_it_encodes(bins: int, low: float, span: float, share: float) -> None:
    """The error is at most a thousandth of the range, at its edges too."""
    ends = widened(low, low + span, bins)
    support = torch.linspace(*ends, bins, dtype=torch.float64)
    for value in (low, low + share * span, low + span):
        target = categorical.hl_gauss_target(torch.tensor(value, dtype=torch.float64), support)
        assert target.sum().item() == pytest.approx(1.0)
        assert (target * support).sum().item() == pytest.approx(value, abs=1e-3 * span)


def test_bins_must_reach_further_than_the_rewards() -> None:
    low, high = widened(0.0, 1.0, 101)
    assert (low, high) == pytest.approx((-0.018135, 1.018135), abs=1e-6)
    at_edge = categorical.hl_gauss_target(torch.tensor(0.0), torch.linspace(0, 1, 101))
    assert (at_edge * torch.linspace(0, 1, 101)).sum().item() > 1e-3  # why it is needed


@given(value=st.floats(-0.5, 1.5), bins=st.integers(2, 101))
@examples(25)
def test_two_hot_decodes_what_it_encodes(value: float, bins: int) -> None:
    support = torch.linspace(-0.5, 1.5, bins, dtype=torch.float64)
    target = categorical.two_hot_target(torch.tensor(value, dtype=torch.float64), support)
    assert (target * support).sum().item() == pytest.approx(value, abs=1e-9)
    assert decode(target.log(), support).item() == pytest.approx(value, abs=1e-9)
    assert (target > 1e-12).sum() <= 2  # rounding can leave a trace at a third bin


@given(seed=seeds)
@examples(6)
def test_cross_entropy_of_a_probability_is_two_hot_on_two_atoms(seed: int) -> None:
    batch, outputs = case(seed)
    logit = outputs.value_logits[..., :1].detach()
    two = replace(outputs, value_logits=torch.cat([torch.zeros_like(logit), logit], -1), support=torch.tensor([0.0, 1]))
    one = replace(outputs, value_logits=logit, support=None)
    close(value_losses.two_hot(two, batch), value_losses.bce(one, batch).double(), 1e-5)


@given(seed=seeds)
@examples(6)
def test_the_mean_of_c51s_target_is_the_one_step_target(seed: int) -> None:
    """The gradient of a cross-entropy is softmax minus target, so it holds the target; all on a support wide enough."""
    from posttrain.parts.targets import lambda_return

    batch = value_batch(seed, plain=True)
    outputs = value_outputs(batch, seed)
    support = torch.linspace(-20, 20, 7)
    values = decode(outputs.value_logits.detach(), support)
    batch = batch.set(value=values, value_next=None)
    batch = batch.set(target=lambda_return(batch, gamma=0.9, lambda_=0.0))
    value_losses.c51(replace(outputs, support=support), batch, gamma=0.9).sum().backward()
    target = outputs.value_logits.detach().softmax(-1) - outputs.value_logits.grad
    learned = batch.states & ~batch.target.isnan()
    close((target * support).sum(-1)[learned], batch.target[learned].double(), 1e-4)


# ---- invariances and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@given(seed=seeds)
@examples(3)
def test_losses_are_zero_without_gradient_where_nothing_is_learned(name: str, seed: int) -> None:
    batch, outputs = case(seed)
    found = EVERY[name](outputs, batch)
    assert found.shape == batch.mask.shape and bool(found.isfinite().all())
    found.sum().backward()
    policy = name.startswith("policy")
    learned = batch.mask if policy else batch.states & ~batch.target.isnan()
    assert not found[~learned].any()
    for tensor in [outputs.logp] if policy else [outputs.value, outputs.value_logits]:
        if tensor.grad is not None:
            assert bool(tensor.grad.isfinite().all()) and not tensor.grad[~learned].any()
    if not policy:
        assert outputs.logp.grad is None


@pytest.mark.parametrize("name", EVERY)
@given(seed=seeds)
@examples(3)
def test_padding_row_order_and_micro_batches_change_nothing(name: str, seed: int) -> None:
    batch, outputs = case(seed)
    loss = EVERY[name]
    expected = loss(outputs, batch).detach()
    wide = on_outputs(outputs, lambda t: widen(t.detach()))
    close(loss(wide, pad_values(batch, 3, torch.nan)), torch.nn.functional.pad(expected, (0, 3)).double(), 1e-5)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    close(loss(on_outputs(outputs, lambda t: t[order]), batch[order]), expected[order].double(), 1e-5)
    for group in batch.group.unique():
        mine = (batch.group == group).nonzero().squeeze(-1)
        part = on_outputs(outputs, lambda t, mine=mine: t[mine])
        close(loss(part, batch[mine]), expected[mine].double(), 1e-5)


def widen(tensor: Tensor, columns: int = 3) -> Tensor:
    """Adds columns of NaN in dimension 1."""
    rest = torch.full((tensor.shape[0], columns, *tensor.shape[2:]), torch.nan)
    return torch.cat([tensor, rest], 1)


def test_signs_of_the_gradient_of_step_ranking() -> None:
    """Wrong steps go down, the last correct one goes up."""
    batch, outputs = case(0, plain=True)
    batch = batch.set(mask=(torch.arange(10) > 2).expand(len(batch), 10))
    labels = torch.full(batch.mask.shape, torch.nan)
    labels[:, 4], labels[:, 6], labels[:, 8] = 1.0, 1.0, 0.0
    batch = batch.set(target=labels)
    value_losses.q_ranking(value := value_outputs(batch, 1), batch).sum().backward()
    assert (value.value.grad[:, 8] > 0).all() and (value.value.grad[:, 6] < 0).all()


@pytest.mark.parametrize("name", [name for name in ALONE if name not in ("soft_path", "c51")])
def test_each_head_overfits_one_return(name: str) -> None:
    """The error is at most 0.001. c51, which learns from its own next state, is tested in exact worlds."""
    batch = value_batch(0, plain=True)[[0]]
    goal = 0.731
    batch = batch.set(target=torch.full(batch.mask.shape, goal), value=torch.full(batch.mask.shape, goal))
    low, high = widened(0.0, 1.0, 21)
    support = torch.linspace(low, high, 21)
    raw = torch.zeros(21 if name in ("hl_gauss", "two_hot", "quantile") else 1, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        value = raw.mean() if name == "quantile" else raw[0]
        outputs = Outputs(
            logp=torch.zeros(batch.mask.shape),
            value=value.expand(batch.mask.shape),
            value_logits=raw.expand(*batch.mask.shape, -1),
            support=support if len(raw) == 21 else None,
        )
        optimizer.zero_grad()
        ALONE[name][0](outputs, batch).sum().backward()
        optimizer.step()
        schedule.step()
    decoded = {
        "hl_gauss": lambda: decode(raw, support),
        "two_hot": lambda: decode(raw, support),
    }
    decoded |= {"quantile": raw.mean, "bce": lambda: raw[0].sigmoid()}
    assert decoded.get(name, lambda: raw[0])().item() == pytest.approx(goal, abs=1e-3)


# ---- what a person reads --------------------------------------------------------------------------------------------


def test_losses_say_which_head_they_need() -> None:
    batch, outputs = case(0)
    bare = replace(outputs, value=None, value_logits=None, support=None)
    for name, message in {
        "mse": "no value model",
        "hl_gauss": "value.head.type: categorical",
        "quantile": "quantile",
        "bce": "bernoulli",
    }.items():
        with pytest.raises(ValueError, match=message):
            VALUE_LOSSES[name](bare, batch)
    wild = batch.set(target=torch.full(batch.mask.shape, 1.5))
    with pytest.raises(ValueError, match="reach from 0 to 1.5"):
        value_losses.bce(outputs, wild)
