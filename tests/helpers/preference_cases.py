"""Preference data in random batches, and policies that are a table: a softmax over a handful of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from parts_cases import rough_batch
from torch import Tensor

from posttrain.batch import Batch, Finish, Outputs
from posttrain.parts.normalisers import group_mean_of_token_sum

Term = Callable[[Outputs, Batch], Tensor]
Weighted = Sequence[tuple[float, Term]]
"""Loss terms with their coefficients."""


def double(batch: Batch) -> Batch:
    """The batch in float64, so that a comparison with Python's floats can be close."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    floats = {k: v.double() for k, v in fields.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return batch.set(**floats)


def preferences(seed: int, *, groups: int = 4, size: int = 2, plain: bool = False) -> Batch:
    """Groups of completions with labels, columns of numbers, and rows in no order.

    Args:
        size: 2: a chosen (1) and a rejected (0) completion; more: graded labels, some of them equal.
        plain: without completions that hold no token, have no label, or are baselines; nothing is NaN off the mask.
    """
    batch = double(rough_batch(seed, groups=groups, size=size, plain=True))
    g = torch.Generator().manual_seed(seed)
    n = len(batch)
    label = torch.arange(n) % 2 if size == 2 else torch.randint(0, 4, (n,), generator=g)
    columns = torch.rand(n, 3, generator=g, dtype=torch.float64).tolist()
    names = ("probability", "margin", "weight")
    rows = tuple({**dict(zip(names, row, strict=True)), "calibration": i % 2} for i, row in enumerate(columns))
    batch = batch.set(reward=label.double(), rows=rows, baseline=torch.randn(n, generator=g, dtype=torch.float64))
    if not plain:
        out = torch.rand(n, generator=g)
        batch = batch.set(
            mask=batch.mask & (out > 0.1)[:, None],
            reward=batch.reward.where(out < 0.85, torch.nan),
            baseline_only=(out > 0.7) & (out < 0.8),
            group=batch.group * 7 + 3,
        )
        off = {name: getattr(batch, name).where(batch.mask, torch.nan) for name in ("logp_old", "logp_ref")}
        batch = batch.set(**off)
    return batch[torch.randperm(n, generator=g)]


def moved(batch: Batch, seed: int, scale: float = 0.3) -> Outputs:
    """Outputs of a policy that has moved away from the old one, with all optional fields; leaves of a graph."""
    g = torch.Generator().manual_seed(seed + 7)

    def noise() -> Tensor:
        return torch.randn(batch.mask.shape, generator=g, dtype=torch.float64)

    assert batch.logp_old is not None
    logp = (batch.logp_old - scale * noise().abs()).where(batch.mask, torch.nan)
    return Outputs(
        logp=logp.requires_grad_(),
        kl_ref=noise().abs().where(batch.mask, torch.nan).requires_grad_(),
        collision=(-noise().abs()).where(batch.mask, torch.nan),
    )


def whole_loss(terms: Weighted, outputs: Outputs, batch: Batch) -> Tensor:
    """Mean over the groups of the weighted sum of terms."""
    weight = group_mean_of_token_sum(batch)
    total = outputs.logp.new_zeros(())
    for coef, term in terms:
        total = total + coef * (term(outputs, batch).where(batch.mask, 0.0) * weight).sum()
    return total


# ---- A policy over K answers of one token each


def answers(
    groups: Sequence[Sequence[tuple[int, float]]], reference: Sequence[float], **columns: Sequence[Any]
) -> Batch:
    """One prompt, and groups of (answer, label); ``columns`` hold a value a group."""
    flat = [(g, answer, label) for g, group in enumerate(groups) for answer, label in group]
    group, answer, label = (torch.tensor(values) for values in zip(*flat, strict=True))
    n = len(flat)
    zeros = torch.zeros(n, 2, dtype=torch.float64)
    mask = torch.tensor([False, True]).expand(n, 2)
    rows = tuple({name: values[g] for name, values in columns.items()} for g in group.tolist())
    logp_ref = zeros.clone()
    logp_ref[:, 1] = torch.tensor(reference, dtype=torch.float64).log()[answer]
    return Batch(
        tokens=torch.stack([torch.zeros_like(answer), answer], 1),
        mask=mask,
        length=torch.full((n,), 2),
        group=group,
        finish=torch.full((n,), int(Finish.STOPPED)),
        logp_sampler=zeros,
        version=torch.zeros(n, dtype=torch.long),
        step_id=torch.where(mask, 0, -1),
        baseline_only=torch.zeros(n, dtype=torch.bool),
        rows=rows,
        texts=("",) * n,
        score=label.double(),
        reward=label.double(),
        step_reward=zeros,
        logp_ref=logp_ref,
    )


def every_pair(size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(size) for j in range(i + 1, size)]


def forward(logits: Tensor, batch: Batch, reference: Sequence[float]) -> Outputs:
    """Forward pass of the table."""
    logp = torch.zeros_like(batch.logp_sampler)
    policy, ref = logits.log_softmax(-1), torch.tensor(reference, dtype=torch.float64)
    kl = (ref * (ref.log() - policy)).sum()
    answer = batch.tokens[:, 1]
    return Outputs(
        logp=torch.cat([logp[:, :1], policy[answer][:, None]], 1),
        kl_ref=kl * batch.mask,
    )


def train(
    terms: Weighted,
    batch: Batch,
    reference: Sequence[float],
    *,
    start: Sequence[float] | None = None,
    limit: float | None = None,
    steps: int = 200,
) -> list[float]:
    """The policy at the minimum of a loss, found with L-BFGS.

    Args:
        start: logits; by default the reference's.
        limit: bounds the logits to ±limit.
    """
    logits = torch.tensor(reference, dtype=torch.float64).log() if start is None else torch.tensor(start).double()
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def bounded() -> Tensor:
        return logits if limit is None else limit * torch.tanh(logits)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = whole_loss(terms, forward(bounded(), batch, reference), batch)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return bounded().detach().softmax(-1).tolist()
