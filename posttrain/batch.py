"""The data that flows through a run: a batch of completions, and the outputs of one forward pass over it.

Alignment rule of the whole package: column ``t`` belongs to token ``t``. Log-probs at column ``t`` are
log p(token_t | tokens before t); the value at column ``t`` is the value of the prefix that *ends with* token ``t``.
Shifts between logits and tokens happen once, in :mod:`posttrain.models.policy`. Log-probs, advantages and losses are
float32.

Sizes in the shape annotations: ``N`` completions, ``L`` columns (longest prompt + completion), ``K`` outputs of a
value head (bins, quantiles).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Finish(IntEnum):
    """The way a completion ended. Truncation (``LENGTH``) is not an ending: the rest of the completion is unknown."""

    STOPPED = 0
    LENGTH = 1
    ABORTED = 2


class Author(IntEnum):
    """Who wrote a completion."""

    POLICY = 0
    OPPONENT = 1  # the recipe's opponent
    CALIBRATION = 2  # the opponent, for a regulariser: trained on, but compared with no other completion
    GIVEN = 3  # the dataset


OPTIONAL_FIELDS = (
    "logp_old",
    "logp_ref",
    "entropy",
    "value",
    "value_next",
    "advantage",
    "loss_share",
    "target",
    "value_share",
)
"""Names of the fields ``[N, L]`` that are ``None`` until a stage of the loop fills them."""


@dataclass(frozen=True, slots=True)
class RewardColumns:
    """Names and weights of the columns of ``Batch.rewards``: the verifiers, then the rewards of whole completions."""

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    verifiers: int = 0  # number of columns that are verifiers'

    def index(self, name: str) -> int:
        """Column of a name.

        Raises:
            ValueError: if there is none; the message lists the names.
        """
        if name not in self.names:
            raise ValueError(f"there is no reward {name!r}; this recipe has {', '.join(self.names) or 'none'}")
        return self.names.index(name)


def identity(tensor: Tensor) -> Tensor:
    """Returns the tensor unchanged: the all-reduce of a run of one process."""
    return tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """N completions, right-padded to L columns. A batch is never mutated: ``batch.set(advantage=...)`` makes a new one.

    Fields that are ``None`` have not been filled yet; "by ..." in the comment is the stage of the loop that fills them.
    """

    tokens: Int[Tensor, "N L"]  # prompt and completion, then padding
    mask: Bool[Tensor, "N L"]  # True where the policy chose the token (tool output, environment text: False)
    length: Int[Tensor, " N"]  # number of columns that hold a token; the rest is padding
    group: Int[Tensor, " N"]  # index of the prompt; for preference data, of the pair
    finish: Int[Tensor, " N"]  # a Finish
    logp_sampler: Float[Tensor, "N L"]  # the engine's log-prob of the sampled token, 0 off the mask    by rollout
    version: Int[Tensor, " N"]  # version of the policy that sampled the completion                     by rollout
    step_id: Int[Tensor, "N L"]  # reasoning step or turn of each token, -1 off the mask                by rollout
    baseline_only: Bool[Tensor, " N"]  # completion serves as a baseline and is never trained on        by rollout
    rows: tuple[dict[str, Any], ...]  # dataset row of each completion, by column                       by rollout
    texts: tuple[str, ...]  # text of each completion as it was written                                  by rollout

    score: Float[Tensor, " N"]  # weighted sum of the verifiers; NaN = unscored                         by verify
    reward: Float[Tensor, " N"]  # what `combine` makes of all rewards; NaN = unscored                  by reward
    step_reward: Float[Tensor, "N L"]  # token-level rewards: process rewards, KL in the reward         by reward

    logp_old: Float[Tensor, "N L"] | None = None  # the trainer's log-prob before the update            by score
    logp_ref: Float[Tensor, "N L"] | None = None  # the reference policy's log-prob                     by score
    entropy: Float[Tensor, "N L"] | None = None  # entropy of the policy before the update, in nats     by score
    value: Float[Tensor, "N L"] | None = None  # the critic's value before the update, at ``states``    by score
    value_next: Float[Tensor, "N L"] | None = None  # Q heads: backup over every next token             by score

    rewards: Float[Tensor, "N K"] | None = (
        None  # each reward alone; NaN = does not apply              by verify, reward
    )
    reward_columns: RewardColumns = (
        RewardColumns()
    )  # what the K columns of `rewards` are              by verify, reward
    author: Int[Tensor, " N"] | None = None  # an Author; None: all are the policy's                    by rollout
    advantage: Float[Tensor, "N L"] | None = None  # advantage of each token                            by credit
    loss_share: Float[Tensor, "N L"] | None = None  # each token's share of the loss                    by credit
    term_share: Float[Tensor, "N L T"] | None = None  # shares of loss terms with own normalisers       by credit
    baseline: Float[Tensor, " N"] | None = None  # number subtracted from preference scores             by credit
    target: Float[Tensor, "N L"] | None = None  # the critic's target at ``states``; NaN: no target     by credit
    value_share: Float[Tensor, "N L"] | None = None  # each state's share of the value loss             by credit

    step: int = 0  # number of the optimiser step, for scheduled hyper-parameters
    all_sum: Callable[[Tensor], Tensor] = identity  # function that sums a tensor over all ranks

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def by(self, author: Author) -> Bool[Tensor, " N"]:
        """Mask of the completions that an author wrote."""
        if self.author is None:
            return torch.full_like(self.baseline_only, author == Author.POLICY)
        return self.author == author

    def set(self, **fields: Any) -> Batch:
        """Returns a copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def __getitem__(self, index: Tensor | Sequence[int]) -> Batch:
        """Selects completions by a boolean mask ``[N]``, or by indices in their order; all columns are kept."""
        index = torch.as_tensor(index, device=self.tokens.device)
        index = index.nonzero().squeeze(-1) if index.dtype == torch.bool else index.long()  # [] is float
        picked = index.tolist()
        return self._map(lambda tensor: tensor[index], lambda column: tuple(column[i] for i in picked))

    def trim(self) -> Batch:
        """Returns a copy without the columns that are padding in every row."""
        columns = int(self.length.max()) if len(self) else 0
        trimmed = self._map(lambda tensor: tensor[:, :columns] if tensor.dim() > 1 else tensor, lambda column: column)
        return trimmed.set(rewards=self.rewards)

    def to(self, device: torch.device | str) -> Batch:
        """Returns a copy on another device."""
        return self._map(lambda tensor: tensor.to(device), lambda column: column)

    def _map(self, tensor: Callable[[Tensor], Tensor], column: Callable[[tuple], tuple]) -> Batch:
        """Returns a copy with one function applied to all tensors and another one to all tuples."""
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = tensor(value)
            elif isinstance(value, tuple):
                changes[field.name] = column(value)
        return dataclasses.replace(self, **changes)

    @property
    def scored(self) -> Bool[Tensor, " N"]:
        """Completions that have a reward: only these count in statistics of rewards."""
        return ~torch.isnan(self.reward)

    @property
    def trained(self) -> Bool[Tensor, " N"]:
        """Completions that count in statistics and are trained on: scored, and not only a baseline."""
        return self.scored & ~self.baseline_only

    @property
    def prompt_length(self) -> Int[Tensor, " N"]:
        """Number of tokens before the first chosen one in each row; 0 for a row without chosen tokens."""
        return self.mask.int().argmax(-1)

    @property
    def states(self) -> Bool[Tensor, "N L"]:
        """Columns whose prefix has a value: each chosen token, and the column right before one, like the prompt's last.

        The state in which token ``t`` was chosen ends with column ``t - 1``; the last chosen token's column is the
        whole completion.
        """
        before = torch.nn.functional.pad(self.mask[:, 1:], (0, 1))
        return self.mask | before

    @property
    def tokens_chosen(self) -> Int[Tensor, " N"]:
        """Number of tokens that the policy chose in each completion."""
        return self.mask.sum(-1)

    def total(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all entries on all ranks: the only reduction that a normaliser may use."""
        return self.all_sum(values.sum())

    def largest(self, values: Tensor) -> float:
        """Largest of non-negative ``values`` on all ranks, as float32; 0 if there are none.

        Ranks share sums alone. So the number is found a byte at a time, from the first to the last, in counts of the
        values whose leading bytes are those found so far: the order of non-negative floats is that of their bits.
        """
        bits = values.float().flatten().view(torch.int32).long()
        top = 0
        for shift in (24, 16, 8, 0):
            leading = bits[bits >> (shift + 8) == top >> (shift + 8)]
            counts = self.all_sum(torch.bincount(leading >> shift & 255, minlength=256).double())
            top |= int(counts.nonzero().max()) << shift if bool(counts.any()) else 0
        return float(torch.tensor(top, dtype=torch.int32).view(torch.float32))

    @staticmethod
    def concatenate(batches: Iterable[Batch]) -> Batch:
        """Joins batches into one, padded to the longest row. A field must be filled in all of them or in none.

        ``rewards`` of recipes with other rewards are left out: their columns do not mean the same.

        Raises:
            ValueError: if there are no batches, or a field is filled in some of them only.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("there is nothing to concatenate: the list of batches is empty")
        if len({batch.reward_columns for batch in batches}) > 1:
            batches = [batch.set(rewards=None, reward_columns=RewardColumns()) for batch in batches]
        columns = max(batch.tokens.shape[1] for batch in batches)
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(Batch):
            values = [getattr(batch, field.name) for batch in batches]
            tensors = [value for value in values if isinstance(value, Tensor)]
            if tensors and len(tensors) != len(values):
                raise ValueError(f"field {field.name!r} is filled in {len(tensors)} of {len(values)} batches")
            if tensors and field.name == "rewards":
                changes[field.name] = torch.cat(tensors)
            elif tensors:
                fill = -1 if field.name == "step_id" else 0
                changes[field.name] = torch.cat([_widen(value, columns, fill) for value in tensors])
            elif isinstance(values[0], tuple):
                changes[field.name] = tuple(item for value in values for item in value)
        return dataclasses.replace(batches[0], **changes)


def _widen(tensor: Tensor, columns: int, fill: int) -> Tensor:
    """Pads a tensor ``[N, L]`` on the right to some number of columns; tensors ``[N]`` stay."""
    if tensor.dim() < 2:
        return tensor
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1]), value=fill)


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """Results of one forward pass over a batch: the only source of gradient. Zero off the mask (values: the states)."""

    logp: Float[Tensor, "N L"]  # log-prob of the token at the sampling temperature
    entropy: Float[Tensor, "N L"] | None = None  # entropy in nats; None if no part reads it
    value: Float[Tensor, "N L"] | None = None  # value by the value model, at ``batch.states``
    value_logits: Float[Tensor, "N L K"] | None = None  # outputs of the value head, if they are not the value itself
    support: Float[Tensor, " K"] | None = None  # centres of a categorical head's bins, ascending, equally spaced
    kl_ref: Float[Tensor, "N L"] | None = None  # KL(π_ref ‖ π) of the next token, over the vocabulary, in nats
    collision: Float[Tensor, "N L"] | None = None  # log Σ_v π(v)²: log-prob that two draws of the token are equal


def pad(rows: Sequence[Any], fill: int | float = 0, *, dtype: torch.dtype | None = None) -> Tensor:
    """Joins rows of unequal lengths (lists, arrays or tensors) to one tensor ``[N, L]``, filled up on the right."""
    tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def broadcast(values: Float[Tensor, " N"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """Puts each completion's number at all of its chosen tokens, and 0 elsewhere."""
    return values[:, None] * mask


def seq_sum(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, " N"]:
    """Sum over each completion's chosen tokens. Values off the mask are ignored, NaN included."""
    return values.where(mask, 0.0).sum(-1)


def seq_mean(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, " N"]:
    """Mean over each completion's chosen tokens; 0 for a completion without any."""
    return seq_sum(values, mask) / mask.sum(-1).clamp(min=1)


def group_sum(values: Float[Tensor, " N"], group: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Sum over the group of each completion. Groups never straddle ranks."""
    _, index = group.unique(return_inverse=True)
    sums = values.new_zeros(int(index.max()) + 1 if len(index) else 0).index_add(0, index, values)
    return sums[index]


def group_mean(values: Float[Tensor, " N"], group: Int[Tensor, " N"], valid: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Mean over the valid completions of each completion's group; 0 if the group has none."""
    count = group_sum(valid.to(values.dtype), group)
    return group_sum(values.where(valid, 0.0), group) / count.clamp(min=1)


def group_max(values: Float[Tensor, " N"], group: Int[Tensor, " N"], valid: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Largest value of the valid completions of each completion's group; -inf if the group has none."""
    _, index = group.unique(return_inverse=True)
    filled = values.where(valid, -torch.inf)
    return torch.full_like(filled, -torch.inf).scatter_reduce(0, index, filled, "amax")[index]


def group_min(values: Float[Tensor, " N"], group: Int[Tensor, " N"], valid: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Smallest value of the valid completions of each completion's group; inf if the group has none."""
    return -group_max(-values, group, valid)


def group_std(
    values: Float[Tensor, " N"], group: Int[Tensor, " N"], valid: Bool[Tensor, " N"], ddof: int = 1
) -> Float[Tensor, " N"]:
    """Standard deviation over the valid completions of each completion's group; 0 if there are at most ``ddof``."""
    deviation = (values - group_mean(values, group, valid)).where(valid, 0.0)
    count = group_sum(valid.to(values.dtype), group)
    return (group_sum(deviation.square(), group) / (count - ddof).clamp(min=1)).sqrt()
