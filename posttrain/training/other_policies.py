"""Who stands beside the policy, and how it moves: the reference, the opponent, and the policy one step ahead.

Methods differ in which policies these are. A reference that stays is RLHF's and DPO's; one that becomes the policy
every so many steps is the previous iterate of iterative DPO, SPIN and DNO; one that follows it slowly is TR-DPO's. The
opponent samples from a geometric mixture of the policy and the reference (Nash-MD), or of the policy and its own
running average (Nash-EMA). With ``extragradient`` steps come in twos: the first one looks ahead, the second one starts
again from before it, on completions of the policy that it led to (EGPO, Nash mirror prox).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.models.adapters import adapter_parameters, add_adapter
from posttrain.models.policy import Policy
from posttrain.training.recipe import Recipe

REFERENCE_ADAPTER = "reference"


class AdaptedCopy(Policy):
    """An earlier state of a policy's adapter, on the policy's own weights; as a reference, it is what it is."""

    def hidden_states(self, tokens: Int[Tensor, "N L"], *, reference: bool = False) -> Float[Tensor, "N L H"]:
        """What the output layer reads, always with its own adapter."""
        return super().hidden_states(tokens)


def weights_of(policy: Policy) -> dict[str, nn.Parameter]:
    """What distinguishes a policy from others of the same model: its adapter, or else all weights."""
    if policy.has_adapters:
        return adapter_parameters(policy.model, policy.adapter)
    return dict(policy.named_parameters())


def adapted_copy(policy: Policy) -> AdaptedCopy:
    """A frozen copy of the policy's adapter beside it, on the same weights."""
    model: Any = policy.model
    add_adapter(model, copy.deepcopy(model.peft_config[policy.adapter]), REFERENCE_ADAPTER)
    twin = AdaptedCopy(model, REFERENCE_ADAPTER)
    for parameter in weights_of(twin).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)
    move(twin, policy, rate=1.0)
    return twin


@torch.no_grad()
def move(player: Policy, policy: Policy, rate: float) -> None:
    """Moves a player towards the policy in place: w' <- w' + rate (w - w').

    Gorbatovski et al. 2024 (TR-DPO), eq. 5 and 6, arXiv:2404.09656: soft, or hard with a rate of 1.
    """
    source = weights_of(policy)
    for name, weight in weights_of(player).items():
        now = source[name].to(weight)
        weight.copy_(now) if rate == 1.0 else weight.lerp_(now, rate)


def check_twins(player: Policy, policy: Policy) -> None:
    """
    Raises:
        UserError: where a player cannot move towards the policy because it is another kind of model.
    """
    theirs, ours = ({name: weight.shape for name, weight in weights_of(each).items()} for each in (player, policy))
    if theirs != ours:
        odd = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        raise UserError(
            f"reference.every: the reference cannot move towards the policy, whose weights have other shapes ({odd[0]} "
            f"and {len(odd) - 1} more); leave `reference.model` out, or `reference.every`"
        )


@dataclass
class OtherPolicies:
    """The policies beside the one that learns, which its steps move."""

    policy: Policy
    reference: Policy | None  # None: not needed, or the policy without its adapters
    average: Policy | None  # of the policy's weights, where the opponent is made of it
    recipe: Recipe
    ahead: dict[str, Tensor] = field(default_factory=dict)  # the policy one step ahead, between the two steps

    def after(self, step: int) -> None:
        """Moves those that move now that ``step`` steps are done."""
        of_reference, opponent = self.recipe.reference, self.recipe.opponent
        if self.reference is not None and of_reference.every is not None and step % of_reference.every == 0:
            move(self.reference, self.policy, of_reference.rate)
        if self.average is not None and opponent is not None and opponent.average is not None:
            move(self.average, self.policy, opponent.average)

    @property
    def moving(self) -> dict[str, Mapping[str, Tensor]]:
        """Weights that change from step to step and that no optimiser holds."""
        found: dict[str, Mapping[str, Tensor]] = {}
        if self.reference is not None and self.recipe.reference.every is not None:
            found["reference"] = weights_of(self.reference)
        if self.average is not None:
            found["average"] = weights_of(self.average)
        return found

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps."""
        held = {player: {name: w.detach() for name, w in weights.items()} for player, weights in self.moving.items()}
        return held | ({"ahead": self.ahead} if self.ahead else {})

    @torch.no_grad()
    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts everyone where a checkpoint left them.

        Raises:
            UserError: where it was written without a player that this run has.
        """
        for player, weights in self.moving.items():
            if player not in state:
                raise UserError(f"the checkpoint holds no moving {player}: it was written by a recipe without one")
            for name, weight in weights.items():
                weight.copy_(state[player][name])
        self.ahead = dict(state.get("ahead", {}))

    def remember(self) -> None:
        """Keeps the policy as it is, in place of the one ahead, for :meth:`go_back`."""
        self.ahead = {name: w.detach().to("cpu", copy=True) for name, w in weights_of(self.policy).items()}

    @torch.no_grad()
    def go_back(self) -> None:
        """Exchanges the policy with the one that is kept. After a step from there, the one ahead is kept then."""
        for name, weight in weights_of(self.policy).items():
            now = weight.detach().to("cpu", copy=True)
            weight.copy_(self.ahead[name])
            self.ahead[name] = now

    @contextmanager
    def one_step_ahead(self) -> Iterator[None]:
        """The policy has the weights one step ahead, where it has looked ahead; else nothing changes."""
        if not self.ahead:
            yield
            return
        self.go_back()
        try:
            yield
        finally:
            self.go_back()
