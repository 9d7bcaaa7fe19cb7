"""Value models: a decoder with a head that says how good a prefix is.

Column ``t`` belongs to token ``t``: the value at column ``t`` is of the prefix that ends with token ``t``. With a
per-token (Q or twist) head that is Q(tokens before t, token t), which the hidden state at column ``t - 1`` gives.
Values, targets and the support of a categorical head are in reward units everywhere outside the head.

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
"""Name of a value model's adapter, on weights of its own or the policy's."""


class ValueKind(NamedTuple):
    """Kind of the values that a recipe trains, which their checkpoint records."""

    backup: Backup  # how the value of a state follows from those of the next states
    beta: float | None = None  # temperature of a soft value, in reward units


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class ValueSpec:
    """What a value model's numbers mean; saved with it."""

    head: sections.HeadSection = field(default_factory=sections.HeadSection)
    kind: Backup = "mean"
    """How the value of a state follows from those of the next states: their mean, beta log E exp(./beta), ..."""
    beta: float | None = None
    """Temperature of a soft value, in reward units."""
    shift: float = 0.0
    scale: float = 1.0
    """value = shift + scale * what the head decodes to."""
    members: int = 1
    reduce: Reduction = "mean"
    deviations: float = 1.0
    base: str | None = None
    """The model that the training of this one started from; of an implicit value, the one that it is compared with."""
    base_revision: str | None = None
    """Of an implicit value's base."""
    step: int | None = None
    """Optimiser steps it was trained for."""


@dataclasses.dataclass
class Moments:
    """Running mean and mean square of targets, without the bias of their start at 0.

        m <- decay m + (1 - decay) mean(x),   q <- decay q + (1 - decay) mean(x^2),   w <- decay w + (1 - decay)
        mean = m / w,   deviation = sqrt(max(q / w - mean^2, 0.01))

    Yu et al. 2021, arXiv:2103.01955 (PopArt without the correction of the head); decay and floor of their code.
    """

    mean: float = 0.0
    mean_square: float = 0.0
    weight: float = 0.0
    decay: float = 0.99999

    def update(self, mean: float, mean_square: float) -> tuple[float, float]:
        """Counts one batch in; the mean and the deviation of all so far."""
        self.mean = self.decay * self.mean + (1 - self.decay) * mean
        self.mean_square = self.decay * self.mean_square + (1 - self.decay) * mean_square
        self.weight = self.decay * self.weight + (1 - self.decay)
        centre = self.mean / self.weight
        return centre, max(self.mean_square / self.weight - centre**2, 0.01) ** 0.5


class ValueModel(nn.Module):
    """A decoder and a head on it.

    It is a module of its own, as :class:`~posttrain.models.policy.Policy` is, so that Accelerate and DeepSpeed wrap all of the
    pass. Padding stands on the right, where causal attention cannot see it: there is no attention mask.

    Losses see values, targets and supports in reward units, normalised or not: the head's share is behind
    ``shift + scale * .``. To train members, call with ``members=True`` and take the loss of each:
    ``value[m]`` and ``logits[m]`` go into an ``Outputs`` as those of a model of one member do.

    Args:
        backbone: a Hugging Face decoder or language model, or PEFT's wrapper of one, which may be the policy's.
        head: on its hidden states.
        spec: what the values mean.
        adapter: the adapter of this model on the backbone; None: there is none, and all of the backbone is its own.
    """

    def __init__(self, backbone: nn.Module, head: Head, spec: ValueSpec, adapter: str | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.spec, self.adapter = backbone, head, spec, adapter
        self.moments = Moments()

    @property
    def decoder(self) -> PreTrainedModel:
        """The Hugging Face decoder, adapters inside it if there are any."""
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
        """What the head reads."""
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
            members: each member's own instead of their reduction, in a first dimension of the results: the loss of a
                model of several members is the sum of theirs.

        Returns:
            ``value [N, L]`` and, for categorical, quantile and bernoulli heads, ``logits [N, L, K]`` (of quantile heads
            in reward units). With ``members``: ``[M, N, L]`` and ``[M, N, L, K]``. Without, the logits are the only
            member's, and None where there are several. A per-token head's value at column 0, before which there is no
            state, is 0.
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
        if self.spec.head.type == "scalar":
            return None
        return self.spec.shift + self.spec.scale * outputs if self.spec.head.type == "quantile" else outputs

    def reduce(self, values: Float[Tensor, "M ..."]) -> Float[Tensor, " ..."]:
        """One value from the members'."""
        return reduce_members(values, how=self.spec.reduce, deviations=self.spec.deviations)

    def next_values(self, hidden: Float[Tensor, "m H"]) -> Float[Tensor, "m V"]:
        """A per-token head's value of every next token, in reward units, members reduced."""
        return self.reduce((self.spec.shift + self.spec.scale * self.head(hidden)).movedim(-2, 0))

    def update_statistics(self, targets: Tensor, all_sum: Callable[[Tensor], Tensor] = identity) -> None:
        """Counts a batch of targets in, so that the head from now on learns them standardised.

        Args:
            targets: in reward units, of any shape; NaN and infinities are left out.
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
        """What a checkpoint must hold beside the weights: the statistics of the targets."""
        return {**dataclasses.asdict(self.moments), "shift": self.spec.shift, "scale": self.spec.scale}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        state = dict(state)
        self.spec = dataclasses.replace(self.spec, shift=state.pop("shift"), scale=state.pop("scale"))
        self.moments = Moments(**state)

    def on(self, backbone: nn.Module, adapter: str | None = None) -> ValueModel:
        """The same value model, its head copied, on another backbone or adapter."""
        return ValueModel(backbone, copy.deepcopy(self.head), self.spec, adapter)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that make this value model: its head, and its adapter or else all of its backbone."""
        named = dict(self.backbone.named_parameters())
        own = named if self.adapter is None else adapter_parameters(self.backbone, self.adapter)
        return {f"backbone.{name}": p for name, p in own.items()} | {
            f"head.{name}": p for name, p in self.head.named_parameters()
        }


def _scatter(values: Float[Tensor, "M S ..."], states: Bool[Tensor, "N L"]) -> Float[Tensor, "M N L ..."]:
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

    In chunks: ``[N, L, V]`` never exists. Float32, 0 off the states.

    Args:
        policy: whose next tokens count: of a policy with adapters, the reference, which is the model without them.
        temperature: at which the policy samples.

    Raises:
        ValueError: for a soft value without a positive ``beta``.
    """
    if kind == "soft" and (beta is None or beta <= 0):
        raise ValueError(f"a soft value needs a positive beta, not {beta}")
    own = value.hidden_states(tokens)[states]
    of_policy = policy.hidden_states(tokens, reference=policy.has_adapters)[states]
    rows = chunk_rows(tokens.device, value.head.outputs)
    parts = [
        backup(
            value.next_values(mine),
            policy.next_logits(other, temperature).log_softmax(-1),
            kind=kind,
            beta=1.0 if beta is None else beta,
        )
        for mine, other in zip(own.split(rows), of_policy.split(rows), strict=True)
    ]
    return _scatter(torch.cat(parts)[None], states)[0]


def target_copy(value: ValueModel) -> ValueModel:
    """A copy of a value model to be a target network, frozen; of adapters and head alone where it has adapters."""
    if value.adapter is None:
        twin = value.on(copy.deepcopy(value.backbone))
        return twin.requires_grad_(False).eval()
    name = f"{value.adapter}_target"
    backbone: Any = value.backbone
    if name not in backbone.peft_config:
        add_adapter(backbone, copy.deepcopy(backbone.peft_config[value.adapter]), name)
    twin = value.on(backbone, name)  # not in evaluation mode, which would be the shared weights'
    for parameter in twin.own_parameters().values():
        parameter.requires_grad_(False)
    polyak(twin, value, rate=1.0)
    return twin


@torch.no_grad()
def polyak(target: ValueModel, online: ValueModel, rate: float) -> None:
    """Moves a target network a little towards the model in training, in place: w' <- w' + rate (w - w').

    Polyak and Juditsky 1992; as targets for a critic Lillicrap et al. 2015, arXiv:1509.02971, section 3. The statistics
    of normalised targets are taken over whole.
    """
    source = online.own_parameters()
    for name, parameter in target.own_parameters().items():
        parameter.lerp_(source[name].to(parameter), rate)
    target.state = online.state
