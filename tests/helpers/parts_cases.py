"""Batches with every special case that a part may meet, and ways to split them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import settings
from hypothesis import strategies as st
from random_batch import make_random_batch
from torch import Tensor

from posttrain.batch import Batch, Outputs

Result = TypeVar("Result")
seeds = st.integers(0, 2**31 - 1)
"""Strategy that draws seeds of random batches."""
PER_TOKEN = ("logp_sampler", "step_reward", "logp_old", "logp_ref", "entropy", "value", "advantage", "target")


def examples(n: int = 25) -> settings:
    """Sets the number of random cases of a test; they are the same in every run, so that a failure can be repeated."""
    return settings(max_examples=n, deadline=None, derandomize=True)


def rough_batch(seed: int, *, groups: int = 3, size: int = 4, columns: int = 10, plain: bool = False) -> Batch:
    """Random batch with every special case.

    It has unscored completions, greedy baselines, completions without a chosen token, groups in no order and NaN off
    the mask.

    Args:
        plain: without any of that.
    """
    batch = make_random_batch(seed, groups=groups, size=size, columns=columns)
    if plain:
        return batch
    g = torch.Generator().manual_seed(seed + 1)
    n = len(batch)
    unscored = torch.rand(n, generator=g) < 0.15
    mask = batch.mask & (torch.rand(n, generator=g) > 0.1)[:, None]
    batch = batch.set(
        mask=mask,
        baseline_only=(torch.arange(n) % size == size - 1) & (torch.rand(n, generator=g) < 0.8),
        score=batch.score.where(~unscored, torch.nan),
        reward=batch.reward.where(~unscored, torch.nan),
        group=batch.group * 7 + 3,
        **{name: getattr(batch, name).where(mask, torch.nan) for name in PER_TOKEN},
    )
    return batch[torch.randperm(n, generator=g)]


def with_greedy(batch: Batch) -> Batch:
    """Adds a greedy completion to a batch that has none."""
    greedy = batch.baseline_only.clone()
    greedy[0] |= ~greedy.any()
    return batch.set(baseline_only=greedy)


def moved_outputs(batch: Batch, seed: int, scale: float = 0.3) -> Outputs:
    """Log-probs of a policy that has moved away from the old one; a leaf that takes gradient.

    The log-ratios lie on a grid that misses the bounds of the clips, where a loss has no derivative.
    """
    g = torch.Generator().manual_seed(seed)
    shape = batch.mask.shape
    assert batch.logp_old is not None
    log_ratio = (scale * torch.randn(shape, generator=g) / 0.001).round() * 0.001 + 0.0005
    logp = batch.logp_old + log_ratio
    return Outputs(
        logp=logp.requires_grad_(),
        entropy=torch.rand(shape, generator=g).where(batch.mask, torch.nan).requires_grad_(),
    )


def pad(batch: Batch, columns: int, fill: float = 0.0) -> Batch:
    """The batch with further columns of padding, which hold ``fill`` where a number may stand."""

    def wider(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, columns), value=value)

    filled = [name for name in PER_TOKEN + ("loss_share",) if getattr(batch, name) is not None]
    changes: dict[str, Any] = {name: wider(getattr(batch, name), fill) for name in filled}
    return batch.set(
        tokens=wider(batch.tokens, 0), mask=wider(batch.mask, 0), step_id=wider(batch.step_id, -1), **changes
    )


def on_ranks(batches: Sequence[Batch], function: Callable[[Batch], Result]) -> list[Result]:
    """Applies ``function`` to each batch in its own thread, with sums over all batches, like ranks in lockstep."""
    world = len(batches)
    barrier = threading.Barrier(world, timeout=30)
    sent: list[Tensor | None] = [None] * world
    results: list[Any] = [None] * world

    def all_sum(rank: int) -> Callable[[Tensor], Tensor]:
        def summed(tensor: Tensor) -> Tensor:
            sent[rank] = tensor
            barrier.wait()
            total = torch.stack([each for each in sent if each is not None]).sum(0)
            barrier.wait()
            return total

        return summed

    def run(rank: int) -> None:
        try:
            results[rank] = function(batches[rank].set(all_sum=all_sum(rank)))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def halves(batch: Batch) -> tuple[Tensor, Tensor]:
    """Splits the rows for two ranks: whole groups, unequal in number."""
    first = batch.group.unique()[:1]
    mine = torch.isin(batch.group, first)
    return mine.nonzero().squeeze(-1), (~mine).nonzero().squeeze(-1)


def close(found: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    """Asserts that numbers are equal to ``tolerance``, relative and absolute."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=tolerance)
