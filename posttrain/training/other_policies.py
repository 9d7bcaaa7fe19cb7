"""The policies beside the one that learns, and how they move: reference, opponent, and the policy one step ahead.

Methods differ in which policies these are. RLHF and DPO have a reference that never moves. Iterative DPO, SPIN and DNO
set it to the policy after every so many steps. In TR-DPO it follows the policy slowly. The
opponent samples from a geometric mixture of the policy and the reference (Nash-MD), or of the policy and its own
running average (Nash-EMA). With ``extragradient`` steps come in pairs: the first one looks ahead, the second one starts
again from before it, on completions of the policy that the first one led to (EGPO, Nash mirror prox).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.models.adapters import adapter_parameters, add_adapter
from posttrain.models.policy import Policy
from posttrain.training.recipe import Recipe

REFERENCE_ADAPTER = "reference"


class AdaptedCopy(Policy):
    """A frozen snapshot of the policy's LoRA adapter on the policy's base weights.

    Used as a reference, its adapter stays switched on.
    """

    def switched(self, *, reference: bool) -> AbstractContextManager[None]:
        """Switches to the snapshot's adapter for the block, in every layer and the head, also for a reference."""
        return super().switched(reference=False)


def weights_of(policy: Policy) -> dict[str, nn.Parameter]:
    """The weights that distinguish a policy from others of the same model: its adapter, or else all weights."""
    if policy.has_adapters:
        return adapter_parameters(policy.model, policy.adapter)
    return dict(policy.named_parameters())


def adapted_copy(policy: Policy) -> AdaptedCopy:
    """Adds a frozen copy of the policy's adapter to its base weights, as a policy of its own."""
    model: Any = policy.model
    add_adapter(model, copy.deepcopy(model.peft_config[policy.adapter]), REFERENCE_ADAPTER)
    twin = AdaptedCopy(model, REFERENCE_ADAPTER)
    for parameter in weights_of(twin).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)
    move(twin, policy, rate=1.0)
    return twin


@torch.no_grad()
def move(other: Policy, policy: Policy, rate: float) -> None:
    """Moves another policy towards the policy, in place: w' <- w' + rate (w - w').

    Gorbatovski et al. 2024 (TR-DPO), eq. 5 and 6, arXiv:2404.09656: soft, or hard with a rate of 1.
    """
    source = weights_of(policy)
    for name, weight in weights_of(other).items():
        now = source[name].to(weight)
        weight.copy_(now) if rate == 1.0 else weight.lerp_(now, rate)


def check_twins(other: Policy, policy: Policy) -> None:
    """Checks that two policies have weights of the same names and shapes, so that one can move towards the other.

    Raises:
        UserError: if they have not.
    """
    theirs, ours = ({name: weight.shape for name, weight in weights_of(one).items()} for one in (other, policy))
    if theirs != ours:
        different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        raise UserError(
            f"reference.every: the reference cannot move towards the policy, whose weights have other shapes "
            f"({different[0]} and {len(different) - 1} more); leave `reference.model` out, or `reference.every`"
        )


@dataclass
class OtherPolicies:
    """The policies beside the one that learns."""

    policy: Policy
    reference: Policy | None  # None: not needed, or the policy without its adapters
    average: Policy | None  # running average of the policy's weights, if the opponent is made of it
    recipe: Recipe
    ahead: dict[str, Tensor] = field(
        default_factory=dict
    )  # weights of the policy one step ahead, between the steps of a pair

    def after(self, step: int) -> None:
        """Moves the reference and the average, after ``step`` steps are done."""
        reference, opponent = self.recipe.reference, self.recipe.opponent
        if self.reference is not None and reference.every is not None and step % reference.every == 0:
            move(self.reference, self.policy, reference.rate)
        if self.average is not None and opponent is not None and opponent.average is not None:
            move(self.average, self.policy, opponent.average)

    @property
    def moving(self) -> dict[str, Mapping[str, Tensor]]:
        """Weights that change from step to step but that no optimiser holds, by policy."""
        moving: dict[str, Mapping[str, Tensor]] = {}
        if self.reference is not None and self.recipe.reference.every is not None:
            moving["reference"] = weights_of(self.reference)
        if self.average is not None:
            moving["average"] = weights_of(self.average)
        return moving

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The weights that a checkpoint keeps."""
        moving = {policy: {name: w.detach() for name, w in weights.items()} for policy, weights in self.moving.items()}
        return moving | ({"ahead": self.ahead} if self.ahead else {})

    @torch.no_grad()
    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores all policies from a checkpoint.

        Raises:
            UserError: if the checkpoint lacks a policy that this run has.
        """
        for policy, weights in self.moving.items():
            if policy not in state:
                raise UserError(f"the checkpoint holds no moving {policy}: it was written by a recipe without one")
            for name, weight in weights.items():
                weight.copy_(state[policy][name])
        self.ahead = dict(state.get("ahead", {}))

    def remember(self) -> None:
        """Remembers the policy's current weights for :meth:`go_back`."""
        self.ahead = {name: w.detach().to("cpu", copy=True) for name, w in weights_of(self.policy).items()}

    @torch.no_grad()
    def go_back(self) -> None:
        """Swaps the policy's weights with the remembered ones. Calling it twice restores them."""
        for name, weight in weights_of(self.policy).items():
            now = weight.detach().to("cpu", copy=True)
            weight.copy_(self.ahead[name])
            self.ahead[name] = now

    @contextmanager
    def one_step_ahead(self) -> Iterator[None]:
        """Inside, the policy has the weights one step ahead, if it has looked ahead; else nothing changes."""
        if not self.ahead:
            yield
            return
        self.go_back()
        try:
            yield
        finally:
            self.go_back()
