"""A model and a batch that TRL's trainers and the parts of this package both take, and the loss of TRL's DPOTrainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from parts_cases import close
from preference_cases import answers
from torch import Tensor, nn

from posttrain.batch import Batch, Outputs

PROMPT, COLUMNS, VOCABULARY, PAIRS = 3, 9, 7, 5


class Table(nn.Module):
    """Language model that is a table of next-token logits, with the outputs that TRL's fused heads return."""

    is_gradient_checkpointing = False

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(scale * torch.randn(VOCABULARY, VOCABULARY, generator=g, dtype=torch.float64))

    def forward(self, input_ids: Tensor, *, labels: Tensor | None = None, **unused: Any) -> SimpleNamespace:
        logits = self.table[input_ids]
        if labels is None:
            return SimpleNamespace(logits=logits)
        wanted, chosen = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        every = logits[:, :-1].log_softmax(-1)
        logp = every.gather(-1, wanted[..., None])[..., 0]
        zeros = torch.zeros_like(logp).detach()
        return SimpleNamespace(
            log_probs=logp.where(chosen, 0.0),
            log_sum_sq_probs=(2 * every).logsumexp(-1).where(chosen, 0.0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def ours(model: Table, batch: Batch) -> Outputs:
    """Log-probs of the table, in the alignment of this package."""
    every = model(batch.tokens).logits[:, :-1].log_softmax(-1)
    logp = every.gather(-1, batch.tokens[:, 1:, None])[..., 0]
    pad = logp.new_zeros(len(batch), 1)
    collision = (2 * every).logsumexp(-1)
    return Outputs(
        logp=torch.cat([pad, logp], 1).where(batch.mask, 0.0), collision=torch.cat([pad, collision], 1).detach()
    )


def case(seed: int, *, same_length: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Batch, Table, Table]:
    """Pairs in TRL's order, all chosen completions before all rejected ones; policy and reference."""
    g = torch.Generator().manual_seed(seed)
    policy, reference = Table(seed).to(dtype), Table(seed + 1).to(dtype)
    batch = answers([[(0, 1.0), (0, 0.0)] for _ in range(PAIRS)], [1.0])
    batch = batch[[*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]]
    length = torch.randint(PROMPT + 1, COLUMNS + 1, (2 * PAIRS,), generator=g)
    length[0] = COLUMNS
    length = torch.full_like(length, COLUMNS) if same_length else length
    column = torch.arange(COLUMNS)
    mask = (column >= PROMPT) & (column < length[:, None])
    tokens = torch.randint(0, VOCABULARY, mask.shape, generator=g).where(column < length[:, None], 0)
    zeros = torch.zeros(mask.shape).double()
    shaped = {"logp_sampler": zeros, "step_reward": zeros, "logp_ref": zeros, "step_id": mask.long()}
    batch = batch.set(tokens=tokens, mask=mask, length=length, **shaped)
    with torch.no_grad():
        batch = batch.set(logp_ref=ours(reference, batch).logp, logp_old=ours(policy, batch).logp)
    return batch, policy, reference


def with_gradient(loss: Tensor, model: Table) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, model.table)
    return loss.detach(), gradient


def same(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    close(mine[0], theirs[0].double(), 1e-5)
    close(mine[1], theirs[1].double(), 1e-5)


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=lambda: None
)


def dpo_trainer(policy: Table, reference: Table, settings: dict[str, Any]) -> SimpleNamespace:
    values = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "aux_loss_enabled": False,
        **settings,
    }
    return SimpleNamespace(
        **values,
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        accelerator=ACCELERATOR,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def trl_dpo(batch: Batch, policy: Table, reference: Table, **settings: Any) -> Tensor:
    """The loss of TRL's DPOTrainer."""
    from trl import DPOTrainer

    attention = torch.arange(COLUMNS) < batch.length[:, None]
    inputs = {"input_ids": batch.tokens, "attention_mask": attention.long(), "completion_mask": batch.mask.long()}
    return DPOTrainer._compute_loss(dpo_trainer(policy, reference, settings), policy, inputs, False)  # type: ignore[arg-type]
