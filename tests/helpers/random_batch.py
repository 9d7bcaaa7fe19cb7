"""Batches of random numbers, for tests of everything that reads a batch."""

from __future__ import annotations

import torch

from posttrain.batch import Batch, Finish, RewardColumns


def make_random_batch(seed: int = 0, *, groups: int = 3, size: int = 4, columns: int = 12, prompt: int = 3) -> Batch:
    """A batch with every field filled by random numbers: lengths differ, and some tokens are not chosen."""
    g = torch.Generator().manual_seed(seed)
    n = groups * size
    length = torch.randint(prompt + 1, columns + 1, (n,), generator=g)
    length[0] = columns
    column = torch.arange(columns)
    mask = (column >= prompt) & (column < length[:, None])
    mask &= (torch.rand(n, columns, generator=g) > 0.15) | (column == prompt)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(n, columns, generator=g) * scale * mask

    logp_old = -noise(1.0).abs()
    return Batch(
        tokens=torch.randint(5, 200, (n, columns), generator=g).where(column < length[:, None], 0),
        mask=mask,
        length=length,
        group=torch.arange(groups).repeat_interleave(size),
        finish=torch.where(torch.rand(n, generator=g) < 0.3, int(Finish.LENGTH), int(Finish.STOPPED)),
        logp_sampler=logp_old + noise(0.05),
        version=torch.zeros(n, dtype=torch.long),
        step_id=torch.where(mask, column[None] // 4, -1),
        baseline_only=torch.zeros(n, dtype=torch.bool),
        rows=tuple({"answer": str(i)} for i in range(n)),
        texts=tuple(f"text {i}" for i in range(n)),
        score=(reward := torch.randint(0, 2, (n,), generator=g).float()),
        reward=reward + 0.1 * torch.randn(n, generator=g),
        step_reward=noise(0.1),
        rewards=torch.stack([reward, torch.rand(n, generator=torch.Generator().manual_seed(seed + 1))], -1),
        reward_columns=RewardColumns(("right", "brief"), (1.0, 0.5), verifiers=2),
        logp_old=logp_old,
        logp_ref=logp_old + noise(0.2),
        entropy=noise(1.0).abs(),
        value=noise(0.3),
        advantage=noise(1.0),
        target=noise(1.0),
        loss_share=mask / mask.sum(),
    )
