"""Value models: a decoder with a head that estimates how good a prefix is.

Column ``t`` belongs to token ``t``: the value at column ``t`` is that of the prefix that ends with token ``t``. With a
per-token (Q or twist) head it is Q(tokens before t, token t), which the hidden state at column ``t - 1`` gives.
Outside the head, values, targets and the support of a categorical head are always in reward units.

Sizes in the shape annotations: ``N`` completions, ``L`` columns, ``H`` hidden size, ``K`` outputs of a head, ``M``
members, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.batch import identity
from posttrain.models.adapters import active_adapter, adapter_parameters, add_adapter
from posttrain.models.heads import Head, bin_centres
from posttrain.models.policy import Policy, chunk_rows
from posttrain.parts.targets import Backup, Reduction, backup, reduce_members
from posttrain.recipe import sections

VALUE_ADAPTER = "value"
"""Name of a value model's adapter, on its own weights or on the policy's."""


class ValueKind(NamedTuple):
    """Kind of the values that a recipe trains, which their checkpoint records."""

    backup: Backup  # how the value of a state follows from those of the next states
    beta: float | None = None  # temperature of a soft value, in reward units


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class ValueSpec:
    """The meaning of a value model's outputs; saved with the model."""

    head: sections.HeadSection = field(default_factory=sections.HeadSection)
    kind: Backup = "mean"
    """Rule that gives the value of a state from those of the next states: their mean, beta log E exp(./beta), ..."""
    beta: float | None = None
    """Temperature of a soft value, in reward units."""
    shift: float = 0.0
    scale: float = 1.0
    """Scale of the values, and ``shift`` their offset: value = shift + scale * the head's decoded output."""
    members: int = 1
    reduce: Reduction = "mean"
    deviations: float = 1.0
    base: str | None = None
    """Model that training started from. An implicit value is the log-ratio to this model."""
    base_revision: str | None = None
    """Revision of an implicit value's base."""
    step: int | None = None
    """Number of optimiser steps that the model was trained for."""


@dataclasses.dataclass
class Moments:
    """Running mean and mean square of targets, corrected for the bias of starting at 0.

        m <- decay m + (1 - decay) mean(x),   q <- decay q + (1 - decay) mean(x^2),   w <- decay w + (1 - decay)
        mean = m / w,   deviation = sqrt(max(q / w - mean^2, 0.01))

    Yu et al. 2021, arXiv:2103.01955 (PopArt without the correction of the head); decay and floor are from their code.
    """

    mean: float = 0.0
    mean_square: float = 0.0
    weight: float = 0.0
    decay: float = 0.99999

    def update(self, mean: float, mean_square: float) -> tuple[float, float]:
        """Adds the moments of one batch and returns the mean and the standard deviation so far."""
        self.mean = self.decay * self.mean + (1 - self.decay) * mean
        self.mean_square = self.decay * self.mean_square + (1 - self.decay) * mean_square
        self.weight = self.decay * self.weight + (1 - self.decay)
        centre = self.mean / self.weight
        return centre, max(self.mean_square / self.weight - centre**2, 0.01) ** 0.5


class ValueModel(nn.Module):
    """A decoder and a head that reads its hidden states.

    Like :class:`~posttrain.models.policy.Policy` it is one module, so that Accelerate and DeepSpeed wrap the whole
    pass. Padding is on the right, where causal attention cannot see it, so there is no attention mask.

    Losses see values, targets and supports in reward units, normalised or not: ``shift + scale * .`` is applied to the
    head's output. To train members, call with ``members=True`` and compute the loss of each: ``value[m]`` and
    ``logits[m]`` go into an ``Outputs`` like those of a model with one member.

    Args:
        backbone: a Hugging Face decoder or language model, or PEFT's wrapper of one, which may be the policy's.
        head: the head that reads the backbone's hidden states.
        spec: the meaning of the values.
        adapter: name of this model's adapter on the backbone. Default: it has none, and owns the whole backbone.
    """

    def __init__(self, backbone: nn.Module, head: Head, spec: ValueSpec, adapter: str | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.spec, self.adapter = backbone, head, spec, adapter
        self.moments = Moments()

    @property
    def decoder(self) -> PreTrainedModel:
        """The Hugging Face decoder, with the adapters inside it if there are any."""
        model: Any = self.backbone
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        return model.get_decoder()

    @property
    def support(self) -> Float[Tensor, " K"] | None:
        """Centres of a categorical head's bins in reward units, ascending; None for other heads."""
        if self.spec.head.type != "categorical":
            return None
        centres = bin_centres(self.spec.head).to(self.head.linear.weight.device)
        return self.spec.shift + self.spec.scale * centres

    def hidden_states(self, tokens: Int[Tensor, "N L"]) -> Float[Tensor, "N L H"]:
        """The last hidden states, which the head reads."""
        adapter: AbstractContextManager[None] = nullcontext()
        if self.adapter is not None:
            adapter = active_adapter(self.backbone, self.adapter)
        with adapter:
            return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state

    def forward(
        self, tokens: Int[Tensor, "N L"], states: Bool[Tensor, "N L"], *, members: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Values of the prefixes that end at ``states``, in reward units, float32, 0 elsewhere.

        Args:
            members: return the results of each member in a first dimension, instead of one reduced value. The loss of a
                model with several members is the sum of their losses.

        Returns:
            ``value [N, L]`` and, for categorical, quantile and bernoulli heads, ``logits [N, L, K]`` (for quantile
            heads in reward units). With ``members``: ``[M, N, L]`` and ``[M, N, L, K]``. Without it, the logits are
            those of the only member, or None if there are several. A per-token head's value at column 0, which has no
            state before it, is 0.
        """
        hidden = self.hidden_states(tokens)
        if self.spec.head.type == "per_token":
            states = states & (torch.arange(states.shape[1], device=states.device) > 0)
            chosen = states[:, 1:]
            decoded = self.head.of_tokens(hidden[:, :-1][chosen], tokens[:, 1:][chosen])
            logits = None
        else:
            outputs = self.head(hidden[states])
            decoded, logits = self.head.decode(outputs), self._logits(outputs)
        values = (self.spec.shift + self.spec.scale * decoded).movedim(-1, 0)
        if members:
            return _scatter(values, states), None if logits is None else _scatter(logits.movedim(1, 0), states)
        only = logits[:, 0] if logits is not None and self.spec.members == 1 else None
        value = self.reduce(values)
        return _scatter(value[None], states)[0], None if only is None else _scatter(only[None], states)[0]

    def _logits(self, outputs: Float[Tensor, "S M K"]) -> Float[Tensor, "S M K"] | None:
        """The outputs that losses read, quantiles in reward units; None for a scalar head."""
        if self.spec.head.type == "scalar":
            return None
        return self.spec.shift + self.spec.scale * outputs if self.spec.head.type == "quantile" else outputs

    def reduce(self, values: Float[Tensor, "M ..."]) -> Float[Tensor, " ..."]:
        """Reduces the members' values to one value."""
        return reduce_members(values, how=self.spec.reduce, deviations=self.spec.deviations)

    def next_values(self, hidden: Float[Tensor, "m H"]) -> Float[Tensor, "m V"]:
        """A per-token head's value of every next token, in reward units, members reduced."""
        return self.reduce((self.spec.shift + self.spec.scale * self.head(hidden)).movedim(-2, 0))

    def update_statistics(self, targets: Tensor, all_sum: Callable[[Tensor], Tensor] = identity) -> None:
        """Adds a batch of targets to the statistics, by which the head's targets are standardised from now on.

        Args:
            targets: targets in reward units, of any shape; NaN and infinities are left out.
            all_sum: sum over all ranks (``batch.all_sum``).
        """
        finite = targets[targets.isfinite()].double()
        sums = torch.stack([finite.sum(), finite.square().sum(), torch.tensor(len(finite)).to(finite)])
        total, squares, count = all_sum(sums).tolist()
        if count:
            shift, scale = self.moments.update(total / count, squares / count)
            self.spec = dataclasses.replace(self.spec, shift=shift, scale=scale)

    @property
    def state(self) -> dict[str, float]:
        """State that a checkpoint must hold beside the weights: the statistics of the targets."""
        return {**dataclasses.asdict(self.moments), "shift": self.spec.shift, "scale": self.spec.scale}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        state = dict(state)
        self.spec = dataclasses.replace(self.spec, shift=state.pop("shift"), scale=state.pop("scale"))
        self.moments = Moments(**state)

    def on(self, backbone: nn.Module, adapter: str | None = None) -> ValueModel:
        """Copies the value model, with a copy of its head, onto another backbone or adapter."""
        return ValueModel(backbone, copy.deepcopy(self.head), self.spec, adapter)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that belong to this value model: its head, and its adapter or else its whole backbone."""
        if self.adapter is None:
            backbone = dict(self.backbone.named_parameters())
        else:
            backbone = adapter_parameters(self.backbone, self.adapter)
        return {f"backbone.{name}": p for name, p in backbone.items()} | {
            f"head.{name}": p for name, p in self.head.named_parameters()
        }


def _scatter(values: Float[Tensor, "M S ..."], states: Bool[Tensor, "N L"]) -> Float[Tensor, "M N L ..."]:
    """Writes values of states, in order, to their columns; 0 elsewhere."""
    padded = values.new_zeros(values.shape[0], *states.shape, *values.shape[2:])
    padded[:, states] = values
    return padded


@torch.no_grad()
def backed_up(
    value: ValueModel,
    policy: Policy,
    tokens: Int[Tensor, "N L"],
    states: Bool[Tensor, "N L"],
    kind: Backup,
    beta: float | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "N L"]:
    """Value of the state after each column of ``states``, from a per-token head's values of every next token.

    Computed in chunks, so that ``[N, L, V]`` never exists. Float32, 0 off the states.

    Args:
        policy: the policy whose distribution of next tokens is used. If it has adapters, they are switched off, which
            gives the reference.
        temperature: sampling temperature of the policy.

    Raises:
        ValueError: if a soft value has no positive ``beta``.
    """
    if kind == "soft" and (beta is None or beta <= 0):
        raise ValueError(f"a soft value needs a positive beta, not {beta}")
    value_hidden = value.hidden_states(tokens)[states]
    policy_hidden = policy.hidden_states(tokens, reference=policy.has_adapters)[states]
    rows = chunk_rows(tokens.device, value.head.outputs)
    chunks = [
        backup(
            value.next_values(value_chunk),
            policy.next_logits(policy_chunk, temperature, reference=policy.has_adapters).log_softmax(-1),
            kind=kind,
            beta=1.0 if beta is None else beta,
        )
        for value_chunk, policy_chunk in zip(value_hidden.split(rows), policy_hidden.split(rows), strict=True)
    ]
    return _scatter(torch.cat(chunks)[None], states)[0]


def target_copy(value: ValueModel) -> ValueModel:
    """Makes a frozen copy of a value model, to be its target network.

    If the value model has an adapter, only the adapter and the head are copied.
    """
    if value.adapter is None:
        target = value.on(copy.deepcopy(value.backbone))
        return target.requires_grad_(False).eval()
    name = f"{value.adapter}_target"
    backbone: Any = value.backbone
    if name not in backbone.peft_config:
        add_adapter(backbone, copy.deepcopy(backbone.peft_config[value.adapter]), name)
    target = value.on(backbone, name)  # not set to evaluation mode, which would also set the shared weights' mode
    for parameter in target.own_parameters().values():
        parameter.requires_grad_(False)
    polyak(target, value, rate=1.0)
    return target


@torch.no_grad()
def polyak(target: ValueModel, online: ValueModel, rate: float) -> None:
    """Moves a target network a little towards the model in training, in place: w' <- w' + rate (w - w').

    Polyak and Juditsky 1992; as targets for a critic Lillicrap et al. 2015, arXiv:1509.02971. The statistics of
    normalised targets are copied, not mixed.
    """
    source = online.own_parameters()
    for name, parameter in target.own_parameters().items():
        parameter.lerp_(source[name].to(parameter), rate)
    target.state = online.state
