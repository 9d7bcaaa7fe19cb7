"""Processes, devices and optimiser steps: the one place that knows of Accelerate and DeepSpeed.

A loss here is the whole batch's: every micro-batch contributes a share, and shares are *summed* over micro-batches and
ranks. Data-parallel wrappers average gradients over ranks, so each share is multiplied by the number of ranks first.
"""

from __future__ import annotations

import gc
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Batch
from posttrain.errors import UserError
from posttrain.recipe.sections import Optimizer

STATE_FILE = "trainer.pt"
DEEPSPEED_TAG = "deepspeed"


@dataclass(frozen=True)
class Update:
    """One optimiser step."""

    grad_norms: tuple[float, ...]  # of each group of parameters, before clipping
    skipped: bool  # the loss or a gradient was not finite: nothing was changed


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike, such as those of the policy."""

    parameters: Sequence[torch.nn.Parameter]
    options: Optimizer


class Runtime:
    """The processes of a run.

    Args:
        dtype: ``float32``, or ``bfloat16`` for a forward pass under autocast.

    Raises:
        UserError: where a launcher was asked for several processes and only one would train, with what to type instead.
    """

    def __init__(self, *, dtype: str = "float32") -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        refuse_hidden_single_process(os.environ)
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every process that imports DeepSpeed warns of it
        use_cpu, deepspeed = not torch.cuda.is_available(), _asked_for_deepspeed(os.environ)
        handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo")] if use_cpu and deepspeed else []
        self.accelerator = Accelerator(
            mixed_precision="bf16" if dtype == "bfloat16" else "no",
            cpu=use_cpu and not deepspeed,
            kwargs_handlers=handlers,
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        refuse_lost_processes(os.environ, self.world)
        self.is_main = self.rank == 0
        self.uses_deepspeed = deepspeed
        self.model: Any = None
        self.optimizer: Any = None
        self._groups: list[Group] = []

    # ------------------------------------------------------------------------------------------------ several processes

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, on the tensor's own device."""
        if self.world == 1:
            return tensor
        reduced = tensor.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(reduced)
        return reduced.to(tensor.device)

    def all_max(self, value: int) -> int:
        """Largest of an integer over all ranks."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """A picklable object from every rank, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on the main process, on every process. Its error, if any, is raised on all."""
        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = make()
            except Exception as raised:
                error = raised
        if self.world > 1:
            shared = [result, None if error is None else _portable(error)]
            torch.distributed.broadcast_object_list(shared)
            result, error = shared[0], error or shared[1]
        if error is not None:
            raise error
        return result

    def together(self, make: Callable[[], Any]) -> Any:
        """Calls ``make`` on every rank; an error on any of them is raised on all, so that all can act on it alike."""
        if self.world == 1:
            return make()
        result: Any = None
        error: Exception | None = None
        try:
            result = make()
        except Exception as raised:
            error = raised
        errors = self.gather(None if error is None else _portable(error))
        first = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if first is not None:
            raise error if error is not None and first == self.rank else errors[first]
        return result

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.accelerator.wait_for_everyone()

    # --------------------------------------------------------------------------------------------------------- training

    def prepare(self, model: torch.nn.Module, groups: Sequence[Group]) -> None:
        """Moves a model to the device, wraps it, and makes an AdamW optimiser with a rate of its own for each group.

        Each group's gradient is clipped by itself; DeepSpeed, which knows one norm, clips all of them together by the
        first group's ``max_grad_norm``.
        """
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
            fused=not self.uses_deepspeed,  # one pass over the weights, without temporaries of their size
        )
        if self.uses_deepspeed:
            self._configure_deepspeed(groups[0].options)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def _configure_deepspeed(self, options: Optimizer) -> None:
        plugin: Any = self.accelerator.state.deepspeed_plugin
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

    def autocast(self) -> AbstractContextManager:
        """The precision of the prepared policy's forward pass, for models that are not prepared."""
        return self.accelerator.autocast()

    def update(
        self, micro_batches: Sequence[Batch], loss_of: Callable[[Batch], Tensor], learning_rates: Sequence[float]
    ) -> Update:
        """One optimiser step on the sum of the losses of all micro-batches of all ranks.

        Every rank must bring the same number of micro-batches. A loss or gradient that is not finite on any rank leaves
        weights and optimiser as they were on all of them.
        """
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self.model.train()
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with nullcontext() if last or self.uses_deepspeed else self.accelerator.no_sync(self.model):
                loss = loss_of(batch)
                self._backward(loss * self.world, last)
            losses.append(loss.detach())
        finite = int(self.all_sum((~torch.stack(losses).isfinite()).sum())) == 0
        return self._deepspeed_step() if self.uses_deepspeed else self._step(finite)

    def _backward(self, loss: Tensor, last: bool) -> None:
        if self.uses_deepspeed:
            self.model.set_gradient_accumulation_boundary(is_boundary=last)
            self.model.backward(loss)
        else:
            self.accelerator.backward(loss)

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

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """Trained weights and optimiser state, exactly. Called on all ranks."""
        if self.uses_deepspeed:
            self.model.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, exclude_frozen_parameters=True)
        elif self.is_main:
            torch.save({"weights": self._weights(), "optimizer": self.optimizer.state_dict()}, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """What :meth:`save` wrote. Called on all ranks.

        Raises:
            UserError: if it was written with DeepSpeed and this run is without, or the other way round, or if it holds
                other weights than this recipe trains.
        """
        with_deepspeed = (folder / DEEPSPEED_TAG).is_dir()
        if with_deepspeed != self.uses_deepspeed:
            which = "with" if with_deepspeed else "without"
            raise UserError(f"{folder} was written {which} DeepSpeed: resume {which} it")
        if self.uses_deepspeed:
            self.model.load_checkpoint(str(folder), tag=DEEPSPEED_TAG, load_module_strict=False)
            return
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        mine = self._weights()
        if mine.keys() != state["weights"].keys():
            raise UserError(f"{folder} holds other trained weights than this recipe trains; was policy.lora changed?")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _weights(self) -> dict[str, Tensor]:
        module: Any = self.accelerator.unwrap_model(self.model)
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Ends the process group. Models are freed first, then all ranks meet: the other order can deadlock gloo.

        Args:
            failed: this rank stops on an error. The others may not know of it and wait in a collective operation, where
                meeting them would take forever: this process just goes, and then the launcher ends the others.
        """
        if failed and self.world > 1:
            return
        self.model = self.optimizer = None
        self._groups = []
        self.accelerator.free_memory()
        gc.collect()
        if self.world > 1:
            self.barrier()
        self.accelerator.end_training()
        if self.world == 1:  # a further run in this process may want another precision
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _portable(error: Exception) -> Exception:
    """The error if other processes can be told of it as it is, else its type and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _asked_for_deepspeed(environment: Mapping[str, str]) -> bool:
    return environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_hidden_single_process(environment: Mapping[str, str]) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process and says nothing; this does.

    Raises:
        UserError: with the command that starts several.
    """
    use_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if use_cpu and "MASTER_ADDR" in environment and not any(name in environment for name in _RANK_VARIABLES):
        raise UserError(
            "accelerate was asked for several processes on CPU and started only this one (its `--cpu` and MULTI_CPU "
            "need MPI). For N processes on CPU:\n"
            "  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N RECIPE"
        )


def refuse_lost_processes(environment: Mapping[str, str], world: int) -> None:
    """Every rank would train alone if the launcher's world were not the trainer's.

    Raises:
        UserError: with both numbers.
    """
    for name in _SIZE_VARIABLES:
        expected = int(environment.get(name, "1"))
        if expected > 1 and expected != world:
            raise UserError(
                f"the launcher started {expected} processes ({name}={expected}) but this one sees {world}: each would "
                "train alone. Launch with `accelerate launch --multi_gpu` or `--use_deepspeed`, or start one process."
            )


def learning_rate(options: Optimizer, step: int, steps: int) -> float:
    """Rate of the optimiser step number ``step`` (from 0) of ``steps``: linear warm-up, then the schedule down to 0.

    A function of the step alone, so that a resumed run has nothing to restore.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    done = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    if options.schedule == "linear":
        return options.learning_rate * (1 - done)
    return options.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())
