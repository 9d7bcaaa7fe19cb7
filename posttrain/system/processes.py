"""The processes of a run: ranks, devices, collective operations. Accelerate starts and joins them."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import Abandoned, DataError, Stopped, UserError
from posttrain.system.allocator import give_back_large_blocks
from posttrain.system.interrupts import interruptible, received


class Processes:
    """The processes of a run, as one of them sees them.

    Args:
        dtype: ``float32``, or ``bfloat16`` for a forward pass under autocast.

    Raises:
        UserError: if a launcher was asked for several processes and only one would train; it says what to type instead.
    """

    def __init__(self, *, dtype: str = "float32") -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        refuse_hidden_single_process(os.environ)
        refuse_plugins(os.environ)
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every process that imports DeepSpeed warns
        use_cpu, deepspeed = not torch.cuda.is_available(), _asked_for_deepspeed(os.environ)
        if use_cpu:
            give_back_large_blocks()
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
        self._before_end: list[Callable[[], None]] = []

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks; the sum is on the tensor's own device."""
        if self.world == 1:
            return tensor
        reduced = tensor.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(reduced)
        return reduced.to(tensor.device)

    def all_max(self, value: int) -> int:
        """Returns the largest value of an integer over all ranks."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Gathers a picklable object from every rank, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Calls ``make`` on the main process and returns its result on all ranks. An error is raised on all ranks."""
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
        """Calls ``make`` on every rank; an error on any rank is raised on all, so that all can act on it alike.

        On several ranks a signal may end ``make`` early, and is then raised on all of them too.
        """
        if self.world == 1:
            return make()
        result: Any = None
        error: Exception | Stopped | None = None
        try:
            with interruptible():
                result = make()
        except Abandoned:
            raise
        except (Exception, Stopped) as raised:
            error = raised
            received()
        errors = self.gather(None if error is None else _portable(error))
        first = next((rank for rank, raised in enumerate(errors) if raised is not None), None)
        if first is not None:
            raise error if error is not None and first == self.rank else errors[first]
        return result

    def share_of(self, index: Sequence[int]) -> list[int]:
        """This rank's part of a list: consecutive elements. The last ranks have fewer if it cannot be shared evenly."""
        size = -(-len(index) // self.world)
        return list(index[self.rank * size : (self.rank + 1) * size])

    def every_nth(self, size: int, setting: str) -> range:
        """This rank's share of the numbers below ``size``: every ``world``-th of them.

        Args:
            setting: name of the setting whose rows are shared, such as ``data``, for the message.

        Raises:
            DataError: on all ranks, if a rank would have none.
        """
        if size < self.world:
            raise DataError(f"{setting}: {size} prompts cannot be shared by {self.world} processes")
        return range(self.rank, size, self.world)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.accelerator.wait_for_everyone()

    def autocast(self) -> AbstractContextManager:
        """A context with the precision of the trained model's forward pass, for models that are not trained."""
        return self.accelerator.autocast()

    def before_end(self, release: Callable[[], None]) -> None:
        """Registers a function that is called before the processes end, to free models that ranks share."""
        self._before_end.append(release)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Ends the process group. Models are freed first, then all ranks meet: the other order can deadlock gloo.

        Args:
            failed: True if this rank stops on an error. Other ranks may then wait in a collective operation, and a
                barrier would never end. So this process exits at once, and the launcher ends the other ranks.
        """
        if failed and self.world > 1:
            return
        for release in self._before_end:
            release()
        self.accelerator.free_memory()
        gc.collect()
        if self.world > 1:
            self.barrier()
        self.accelerator.end_training()
        if self.world == 1:  # a further run in this process may want another precision
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _portable(error: Exception | Stopped) -> Exception | Stopped:
    """Returns the error if it can be pickled, otherwise an error with its type and message."""
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
    """Refuses ``accelerate launch --cpu --num_processes 2``, which starts one process without a word.

    Raises:
        UserError: if it was launched so; the message has the command that starts several processes.
    """
    use_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if use_cpu and "MASTER_ADDR" in environment and not any(name in environment for name in _RANK_VARIABLES):
        raise UserError(
            "accelerate was asked for several processes on CPU and started only this one (its `--cpu` and MULTI_CPU "
            "need MPI). For N processes on CPU:\n"
            "  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N RECIPE"
        )


PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP (`--use_fsdp`)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (`--use_megatron_lm`)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism (`--use_parallelism_config`)",
}
"""Plugins that Accelerate would switch on through the environment and that training here does not support."""


def refuse_plugins(environment: Mapping[str, str]) -> None:
    """Refuses what a launcher or an Accelerate config file asks for and would not get.

    Honoured are the number of processes, ``--multi_gpu``, ``--use_deepspeed`` with ZeRO up to stage 2, and the devices.

    Raises:
        UserError: for any plugin of ``PLUGINS``, for ``--dynamo_backend`` and for a precision other than the recipe's
            to set; DeepSpeed on CPU where ``ACCELERATE_USE_CPU`` is set, with which Accelerate fails.
    """
    asked = [name for variable, name in PLUGINS.items() if environment.get(variable, "false").lower() == "true"]
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        asked.append("torch.compile (`--dynamo_backend`)")
    problems = [f"the launcher asks for {name}, which posttrain does not support: leave it out" for name in asked]
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        problems.append(
            f"the launcher asks for `--mixed_precision {precision}`, but the recipe sets the precision: "
            "`--mixed_precision no`, and `policy.dtype` in the recipe"
        )
    if _asked_for_deepspeed(environment) and environment.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        problems.append("ACCELERATE_USE_CPU=true does not go with `--use_deepspeed`: leave the variable out")
    if problems:
        raise UserError(problems)


def refuse_lost_processes(environment: Mapping[str, str], world: int) -> None:
    """Refuses a launch in which every rank would train alone, because the launcher's world is not the trainer's.

    Raises:
        UserError: if the launcher's number of processes differs; the message has both numbers.
    """
    for name in _SIZE_VARIABLES:
        expected = int(environment.get(name, "1"))
        if expected > 1 and expected != world:
            raise UserError(
                f"the launcher started {expected} processes ({name}={expected}) but this one sees {world}: each would "
                "train alone. Launch with `accelerate launch --multi_gpu` or `--use_deepspeed`, or start one process."
            )
