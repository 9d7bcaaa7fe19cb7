"""Loss terms and their weights: values and gradients against scalar loops, golden numbers, identities, invariances."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import close, examples, moved_outputs, pad, rough_batch, seeds
from random_batch import make_random_batch
from torch import Tensor

from posttrain.batch import Batch, Outputs
from posttrain.parts import losses, normalisers, weighting

Term = Callable[[Outputs, Batch], Tensor]


def terms_of(rows: reference.Rows, a: reference.Matrix, logp: reference.Matrix, fixed: reference.Matrix) -> dict:
    """Scalar loops of each term below, by the term's name."""
    r = reference
    return {
        "reinforce": r.reinforce(a, logp),
        "clip": r.clip(rows, a, logp, 0.2, 0.2),
        "clip higher": r.clip(rows, a, logp, 0.2, 0.28),
        "clip dual": r.clip(rows, a, logp, 0.2, 0.2, dual=1.3),
        "clip two-sided": r.clip(rows, a, logp, 0.2, 0.2, cap=1.3),
        "cispo": r.cispo(rows, a, logp, fixed, 0.0, 1.2),
        "cispo with a floor": r.cispo(rows, a, logp, fixed, 0.8, 1.2),
        **{f"kl {k}": r.kl(rows, logp, fixed, k) for k in ("k1", "k2", "k3", "k3_k2")},
        **{f"kl {k} corrected": r.kl(rows, logp, fixed, k, importance=True) for k in ("k1", "k2", "k3", "k3_k2")},
        "nll_positive": r.nll_positive(rows, logp),
    }


TERMS: dict[str, Term] = {
    "reinforce": losses.reinforce,
    "clip": losses.clip,
    "clip higher": lambda o, b: losses.clip(o, b, high=0.28),
    "clip dual": lambda o, b: losses.clip(o, b, dual=1.3),
    "clip two-sided": lambda o, b: losses.clip(o, b, cap=1.3),
    "cispo": lambda o, b: losses.cispo(o, b, cap=1.2),
    "cispo with a floor": lambda o, b: losses.cispo(o, b, floor=0.8, cap=1.2),
    "kl k1": lambda o, b: losses.kl(o, b, estimator="k1"),
    "kl k2": lambda o, b: losses.kl(o, b, estimator="k2"),
    "kl k3": lambda o, b: losses.kl(o, b, estimator="k3"),
    "kl k3_k2": lambda o, b: losses.kl(o, b, estimator="k3_k2"),
    "kl k1 corrected": lambda o, b: losses.kl(o, b, estimator="k1", importance=True),
    "kl k2 corrected": lambda o, b: losses.kl(o, b, estimator="k2", importance=True),
    "kl k3 corrected": lambda o, b: losses.kl(o, b, estimator="k3", importance=True),
    "kl k3_k2 corrected": lambda o, b: losses.kl(o, b, estimator="k3_k2", importance=True),
    "nll_positive": losses.nll_positive,
}

SEQUENCE_TERMS: dict[str, Term] = {
    "clip sequence": lambda o, b: losses.clip(o, b, level="sequence"),
    "geometric": lambda o, b: losses.geometric(o, b, low=0.1, high=0.15),
}


def slope(term: Term, outputs: Outputs, batch: Batch, weight: Tensor | float = 1.0) -> Tensor:
    """Gradient of the weighted sum of a term with respect to the log-probs."""
    (term(outputs, batch) * weight).sum().backward()
    gradient, outputs.logp.grad = outputs.logp.grad, None
    assert gradient is not None
    return gradient


def chosen_places(rows: reference.Rows) -> list[tuple[int, int]]:
    return [(i, t) for i in range(len(rows.mask)) for t in rows.tokens(i)]


@pytest.mark.parametrize("name", TERMS)
@given(seed=seeds)
@examples(15)
def test_values_and_gradients_equal_the_scalar_loops(name: str, seed: int) -> None:
    batch = rough_batch(seed)
    outputs = moved_outputs(batch, seed)
    rows, logp = reference.read(batch), outputs.logp.tolist()
    assert batch.advantage is not None
    a, places = batch.advantage.tolist(), chosen_places(rows)
    expected = rows.zeros()
    for i, t in places:
        expected[i][t] = terms_of(rows, a, logp, logp)[name](i, t)
    found = TERMS[name](outputs, batch)
    assert found.dtype == torch.float32
    close(found, expected, 2e-6)

    def loss(moving: reference.Matrix, fixed: reference.Matrix, i: int, t: int) -> float:
        return terms_of(rows, a, moving, fixed)[name](i, t)

    slopes = rows.zeros()
    for i, t in places:
        slopes[i][t] = reference.gradient(lambda m, f, i=i, t=t: loss(m, f, i, t), logp, [(i, t)])[i][t]
    close(slope(TERMS[name], outputs, batch), slopes, 1e-5)


@pytest.mark.parametrize("name", SEQUENCE_TERMS)
@given(seed=seeds)
@examples(10)
def test_sequence_terms_equal_the_paper_under_a_mean_of_means(name: str, seed: int) -> None:
    """With one advantage per completion: value and gradient of mean_i of the paper's loss of completion i."""
    batch = rough_batch(seed)
    rows = reference.read(batch)
    a = reference.outcome(rows, "group")
    batch = batch.set(advantage=torch.tensor(a))
    outputs = moved_outputs(batch, seed)
    logp = outputs.logp.tolist()

    def paper(moving: reference.Matrix, _: reference.Matrix) -> float:
        term = {
            "clip sequence": reference.clip_sequence(rows, a, moving, 0.2, 0.2),
            "geometric": reference.geometric(rows, a, moving, 0.1, 0.15),
        }[name]
        return reference.seq_mean_of_token_mean(rows, term)

    weight = normalisers.seq_mean_of_token_mean(batch)
    close((SEQUENCE_TERMS[name](outputs, batch) * weight).sum(), paper(logp, logp), 2e-6)
    places = [(i, t) for i, t in chosen_places(rows) if not rows.baseline_only[i]]
    close(slope(SEQUENCE_TERMS[name], outputs, batch, weight), reference.gradient(paper, logp, places))


ALL_TERMS = TERMS | SEQUENCE_TERMS | {"entropy": losses.entropy}


@pytest.mark.parametrize("name", ALL_TERMS)
@given(seed=seeds)
@examples(8)
def test_nothing_off_the_mask_and_nothing_from_there(name: str, seed: int) -> None:
    """Off the mask value and gradient are exactly 0, and numbers there, NaN included, have no effect elsewhere."""
    batch = rough_batch(seed)
    outputs = moved_outputs(batch, seed)
    found = ALL_TERMS[name](outputs, batch)
    assert bool((found[~batch.mask] == 0).all()) and bool(found.isfinite().all())
    found.sum().backward()
    leaf = outputs.entropy if name == "entropy" else outputs.logp
    assert leaf is not None and leaf.grad is not None
    assert bool((leaf.grad[~batch.mask] == 0).all()) and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("name", ALL_TERMS)
@given(seed=seeds)
@examples(8)
def test_padding_order_and_company_do_not_matter(name: str, seed: int) -> None:
    """Each row's term is the same in a wider batch, in another order and alone in a micro-batch."""
    batch = rough_batch(seed)
    outputs = moved_outputs(batch, seed)
    assert outputs.entropy is not None
    whole = ALL_TERMS[name](outputs, batch)

    def wider(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 2), value=torch.nan)

    padded = ALL_TERMS[name](Outputs(logp=wider(outputs.logp), entropy=wider(outputs.entropy)), pad(batch, 2))
    close(padded[:, :-2], whole)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    for index in (order, order[:1], order[1:4]):
        part = Outputs(logp=outputs.logp[index], entropy=outputs.entropy[index])
        close(ALL_TERMS[name](part, batch[index]), whole[index])


ON_POLICY = {k: v for k, v in ALL_TERMS.items() if k.startswith(("clip", "cispo", "geometric"))}


@pytest.mark.parametrize("name", ON_POLICY)
@given(seed=seeds)
@examples(8)
def test_at_ratio_1_every_policy_gradient_is_reinforce(name: str, seed: int) -> None:
    batch = rough_batch(seed)
    assert batch.logp_old is not None
    here = Outputs(logp=batch.logp_old.clone().requires_grad_())
    close(slope(ON_POLICY[name], here, batch), slope(losses.reinforce, here, batch))


def single(log_ratios: list[float], advantage: float) -> tuple[Outputs, Batch]:
    """One completion with these log-ratios."""
    n = len(log_ratios)
    batch = make_random_batch(0, groups=1, size=1, columns=n, prompt=0)
    batch = batch.set(mask=torch.ones(1, n).bool(), advantage=torch.full((1, n), advantage))
    assert batch.logp_old is not None
    return Outputs(logp=(batch.logp_old + torch.tensor([log_ratios])).requires_grad_()), batch


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, -1.05127), (-1.0, 1.10517)])
def test_golden_geometric_mean(advantage: float, expected: float) -> None:
    """log ρ = [.3, -.1, 0, .2], ε = .15: mean of [.15, -.1, 0, .15] is .05, of [.3, -.1, 0, .2] is .1."""
    outputs, batch = single([0.3, -0.1, 0.0, 0.2], advantage)
    assert losses.geometric(outputs, batch, low=0.15, high=0.15)[0, 0].item() == pytest.approx(expected, abs=1e-5)


def weight_of(options: dict, ratio: float, advantage: float) -> float:
    """Weight w in grad = -w A ∇log π of the clipped surrogate."""
    outputs, batch = single([math.log(ratio)], advantage)
    return slope(lambda o, b: losses.clip(o, b, **options), outputs, batch).item() / -advantage


@pytest.mark.parametrize(
    ("options", "ratio", "advantage", "expected"),
    [
        ({}, 1.1, 1.0, 1.1),  # inside
        ({}, 1.3, 1.0, 0.0),  # gone too far up
        ({}, 1.3, -1.0, 1.3),  # moving back
        ({}, 0.7, 1.0, 0.7),  # moving back
        ({}, 0.7, -1.0, 0.0),  # gone too far down
        ({"high": 0.28}, 1.25, 1.0, 1.25),
        ({"low": 0.4}, 0.7, -1.0, 0.7),
        ({"dual": 3.0}, 2.9, -1.0, 2.9),
        ({"dual": 3.0}, 3.1, -1.0, 0.0),
        ({"dual": 3.0}, 1.1, 1.0, 1.1),
        ({"cap": 4.0}, 3.9, -1.0, 3.9),
        ({"cap": 4.0}, 4.1, -1.0, 0.0),
        ({"cap": 4.0}, 0.5, 1.0, 0.5),
    ],
)
def test_where_the_clipped_surrogate_has_gradient(options: dict, ratio: float, advantage: float, expected: float):
    assert weight_of(options, ratio, advantage) == pytest.approx(expected, abs=1e-6)


@given(seed=seeds)
@examples(8)
def test_dual_and_two_sided_clipping_are_one(seed: int) -> None:
    batch = rough_batch(seed)
    outputs = moved_outputs(batch, seed, scale=1.0)
    dual, cap = (lambda o, b: losses.clip(o, b, dual=1.3)), (lambda o, b: losses.clip(o, b, cap=1.3))
    assert torch.equal(dual(outputs, batch), cap(outputs, batch))
    assert torch.equal(slope(dual, outputs, batch), slope(cap, outputs, batch))


def test_a_ratio_beyond_every_float_stays_finite() -> None:
    outputs, batch = single([500.0, -500.0], -1.0)
    value = losses.clip(outputs, batch)
    assert value[0].tolist() == pytest.approx([math.exp(20), 0.8])
    assert torch.isfinite(slope(losses.clip, outputs, batch)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda o, b: losses.clip(o, b, low=1.5),
        lambda o, b: losses.clip(o, b, high=-0.1),
        lambda o, b: losses.clip(o, b, dual=0.9),
        lambda o, b: losses.clip(o, b, cap=1.1),
        lambda o, b: losses.cispo(o, b, floor=1.5),
        lambda o, b: losses.cispo(o, b, cap=0.5),
        lambda o, b: losses.geometric(o, b, low=-0.1),
        lambda o, b: weighting.truncated_importance(o, b, cap=0.0),
        lambda o, b: weighting.masked_importance(o, b, low=2.0),
        lambda o, b: weighting.masked_sequence(o, b, high=0.9),
    ],
)
def test_bounds_that_make_no_sense_are_refused(call: Term) -> None:
    outputs, batch = single([0.0], 1.0)
    with pytest.raises(ValueError, match="not|it is"):
        call(outputs, batch)


@pytest.mark.parametrize(
    ("call", "field"),
    [(losses.clip, "logp_old"), (losses.kl, "logp_ref"), (losses.reinforce, "advantage")],
)
def test_a_field_that_nobody_filled_is_named(call: Term, field: str) -> None:
    outputs, batch = single([0.0], 1.0)
    with pytest.raises(ValueError, match=f"batch.{field} has not been filled"):
        call(outputs, batch.set(**{field: None}))
    with pytest.raises(ValueError, match="entropy"):
        losses.entropy(outputs, batch)


# ---- estimators of the KL divergence, in a world of four tokens ----------------------------------------------------

POLICY = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.1, 0.3, 0.25, 0.35], dtype=torch.float64).log()
OLD = torch.tensor([0.25, 0.2, 0.3, 0.25], dtype=torch.float64).log()


def expected_term(estimator, sampled_from: Tensor, importance: bool = False) -> tuple[float, Tensor]:
    """Expectation of a KL term over the four tokens, and its loss's gradient with respect to the policy's logits."""
    logits = POLICY.clone().requires_grad_()
    n = len(logits)
    batch = make_random_batch(0, groups=1, size=n, columns=1, prompt=0)
    batch = batch.set(mask=torch.ones(n, 1).bool(), logp_ref=REFERENCE[:, None], logp_old=OLD[:, None])
    outputs = Outputs(logp=logits.log_softmax(-1)[:, None])
    value = losses.kl(outputs, batch, estimator=estimator, importance=importance)[:, 0]
    loss = (sampled_from.exp() * value).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient


def exact_gradients() -> tuple[float, Tensor, Tensor]:
    """KL(π ‖ ref), its gradient and that of KL(ref ‖ π) with respect to the policy's logits."""
    logits = POLICY.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    reverse = (logp.exp() * (logp - REFERENCE)).sum()
    forward = (REFERENCE.exp() * (REFERENCE - logp)).sum()
    (down,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    (up,) = torch.autograd.grad(forward, logits)
    return reverse.item(), down, up


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_k2"])
@pytest.mark.parametrize("importance", [False, True])
def test_k1_and_k3_are_unbiased_values(estimator: str, importance: bool) -> None:
    value, _ = expected_term(estimator, OLD if importance else POLICY, importance)
    assert value == pytest.approx(exact_gradients()[0], abs=1e-12)


def test_k2_is_a_biased_value() -> None:
    value, _ = expected_term("k2", POLICY)
    assert abs(value - exact_gradients()[0]) > 0.01


def test_gradients_of_the_estimators_as_losses() -> None:
    """The gradient of k1 is 0, k2 and k3_k2 have that of KL(π ‖ ref), k3 has that of KL(ref ‖ π)."""
    _, reverse, forward = exact_gradients()
    close(expected_term("k1", POLICY)[1], torch.zeros(4), 1e-12)
    close(expected_term("k2", POLICY)[1], reverse, 1e-12)
    close(expected_term("k3_k2", POLICY)[1], reverse, 1e-12)
    close(expected_term("k3", POLICY)[1], forward, 1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_k2"])
def test_importance_makes_every_gradient_that_of_the_reverse_kl(estimator: str) -> None:
    close(expected_term(estimator, OLD, importance=True)[1], exact_gradients()[1], 1e-12)


# ---- weights --------------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, tuple[Term, Callable[[reference.Rows], reference.Term]]] = {
    "truncated": (
        lambda o, b: weighting.truncated_importance(o, b, cap=1.02),
        lambda rows: reference.truncated_importance(rows, 1.02),
    ),
    "masked": (
        lambda o, b: weighting.masked_importance(o, b, low=0.97, high=1.04),
        lambda rows: reference.masked_importance(rows, 0.97, 1.04),
    ),
    "masked sequence": (
        lambda o, b: weighting.masked_sequence(o, b, low=0.98, high=1.01),
        lambda rows: reference.masked_sequence(rows, 0.98, 1.01),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
@given(seed=seeds)
@examples()
def test_weights_equal_the_scalar_loops_and_carry_no_gradient(name: str, seed: int) -> None:
    batch = rough_batch(seed)
    found = WEIGHTS[name][0](moved_outputs(batch, seed), batch)
    rows = reference.read(batch)
    expected = rows.zeros()
    for i, t in chosen_places(rows):
        expected[i][t] = WEIGHTS[name][1](rows)(i, t)
    close(found, expected)
    assert not found.requires_grad


@given(seed=seeds)
@examples(5)
def test_an_engine_that_agrees_with_the_trainer_changes_nothing(seed: int) -> None:
    batch = rough_batch(seed)
    same = batch.set(logp_sampler=batch.logp_old)
    outputs = moved_outputs(batch, seed)
    for weight in (weighting.truncated_importance, weighting.masked_importance, weighting.masked_sequence):
        assert torch.equal(weight(outputs, same), batch.mask.float())


@given(log=st.floats(-3, 3))
@examples()
def test_default_bands(log: float) -> None:
    outputs, batch = single([0.0], 1.0)
    assert batch.logp_old is not None
    ratio = math.exp(log)
    batch = batch.set(logp_sampler=batch.logp_old - log)
    assert weighting.truncated_importance(outputs, batch).item() == pytest.approx(min(ratio, 2.0), rel=1e-5)
    expected = ratio if 0.5 <= ratio <= 5 else 0.0
    assert weighting.masked_importance(outputs, batch).item() == pytest.approx(expected, rel=1e-5)
