"""Optimiser steps: the one place that knows how Accelerate and DeepSpeed update weights.

A loss here is the whole batch's: every micro-batch contributes a share, and shares are *summed* over micro-batches and
ranks. Data-parallel wrappers average gradients over ranks, so each share is multiplied by the number of ranks first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Batch
from posttrain.errors import UserError
from posttrain.recipe.sections import OptimizerSection
from posttrain.system.extension_builds import watched_builds
from posttrain.system.processes import Processes

STATE_FILE = "trainer.pt"
DEEPSPEED_TAG = "deepspeed"


@dataclass(frozen=True)
class Update:
    """The result of one optimiser step."""

    grad_norms: tuple[float, ...]  # gradient norm of each group of parameters, before clipping
    skipped: bool  # True if the loss or a gradient was not finite; then nothing was changed


@dataclass(frozen=True)
class Group:
    """Parameters with the same optimiser settings, such as those of the policy."""

    parameters: Sequence[torch.nn.Parameter]
    options: OptimizerSection


class Optimiser:
    """A model under training, with an AdamW optimiser that has a learning rate of its own for each group of parameters.

    The model is moved to the device and wrapped for the processes. Each group's gradient is clipped by itself;
    DeepSpeed, which knows one norm, clips all of them together by the first group's ``max_grad_norm``.

    Raises:
        UserError: under ZeRO stage 3.
    """

    def __init__(self, processes: Processes, model: torch.nn.Module, groups: Sequence[Group]) -> None:
        self._processes = processes
        self._groups = list(groups)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": list(group.parameters),
                    "lr": group.options.learning_rate,
                    "betas": group.options.betas,
                    "eps": group.options.eps,
                    "weight_decay": group.options.weight_decay,
                }
                for group in groups
            ],
            fused=not processes.uses_deepspeed,  # one pass over the weights, without temporaries of their size
        )
        if processes.uses_deepspeed:
            self._configure_deepspeed(groups[0].options)
        self.model: Any
        self.optimizer: Any
        with watched_builds(active=processes.uses_deepspeed and processes.is_main):
            self.model, self.optimizer = processes.accelerator.prepare(model, optimizer)
        processes.before_end(self.release)

    def release(self) -> None:
        """Lets go of the model and the optimiser's state."""
        self.model = self.optimizer = None
        self._groups = []

    def _configure_deepspeed(self, options: OptimizerSection) -> None:
        plugin: Any = self._processes.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise UserError(
                "ZeRO stage 3 is not supported yet: its sharded weights cannot be handed to an engine in the same "
                "process. Use `--zero_stage 2`, or `policy.lora` where memory is short."
            )
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,  # micro-batches are counted here, not there
            gradient_clipping=options.max_grad_norm,
            zero_allow_untested_optimizer=True,
        )

    def update(
        self, micro_batches: Sequence[Batch], loss_of: Callable[[Batch], Tensor], learning_rates: Sequence[float]
    ) -> Update:
        """Takes one optimiser step on the sum of the losses of all micro-batches of all ranks.

        Every rank must pass the same number of micro-batches. A loss or gradient that is not finite on any rank leaves
        weights and optimiser as they were on all of them.
        """
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self.model.train()
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with (
                nullcontext()
                if last or self._processes.uses_deepspeed
                else self._processes.accelerator.no_sync(self.model)
            ):
                loss = loss_of(batch)
                self._backward(loss * self._processes.world, last)
            losses.append(loss.detach())
        finite = int(self._processes.all_sum((~torch.stack(losses).isfinite()).sum())) == 0
        return self._deepspeed_step() if self._processes.uses_deepspeed else self._step(finite)

    def _backward(self, loss: Tensor, last: bool) -> None:
        if self._processes.uses_deepspeed:
            self.model.set_gradient_accumulation_boundary(is_boundary=last)
            self.model.backward(loss)
        else:
            self._processes.accelerator.backward(loss)

    def _step(self, finite: bool) -> Update:
        norms = tuple(
            float(torch.nn.utils.clip_grad_norm_(group.parameters, group.options.max_grad_norm))
            for group in self._groups
        )
        skipped = not finite or not all(map(math.isfinite, norms))
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norms, skipped)

    def _deepspeed_step(self) -> Update:
        # ZeRO looks for gradients that are not finite itself, and then drops them and leaves weights and moments alone
        self.model.step()
        norm = self.model.get_global_grad_norm()
        whole = float(norm) if norm is not None else float("nan")
        return Update((whole,) * len(self._groups), bool(self.model.optimizer.overflow))

    def save(self, folder: Path) -> None:
        """Saves trained weights and optimiser state exactly. Called on all ranks."""
        if self._processes.uses_deepspeed:
            self.model.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, exclude_frozen_parameters=True)
        elif self._processes.is_main:
            torch.save({"weights": self._weights(), "optimizer": self.optimizer.state_dict()}, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Loads what :meth:`save` wrote. Called on all ranks.

        Raises:
            UserError: if one of the runs uses DeepSpeed and the other does not, or if the file holds other weights than
                this recipe trains.
        """
        with_deepspeed = (folder / DEEPSPEED_TAG).is_dir()
        if with_deepspeed != self._processes.uses_deepspeed:
            which = "with" if with_deepspeed else "without"
            raise UserError(f"{folder} was written {which} DeepSpeed: resume {which} it")
        if self._processes.uses_deepspeed:
            self.model.load_checkpoint(str(folder), tag=DEEPSPEED_TAG, load_module_strict=False)
            return
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        weights = self._weights()
        if weights.keys() != state["weights"].keys():
            raise UserError(f"{folder} holds other trained weights than this recipe trains; was policy.lora changed?")
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _weights(self) -> dict[str, Tensor]:
        module: Any = self._processes.accelerator.unwrap_model(self.model)
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def learning_rate(options: OptimizerSection, step: int, steps: int) -> float:
    """Learning rate of step number ``step`` (from 0) of ``steps``: linear warm-up, then the schedule down to 0.

    It is a function of the step alone, so a resumed run has nothing to restore.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    done = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    if options.schedule == "linear":
        return options.learning_rate * (1 - done)
    return options.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())
