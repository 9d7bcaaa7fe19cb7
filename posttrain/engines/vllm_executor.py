"""The executor that runs vLLM's one worker in this process, on this rank's device."""

from __future__ import annotations

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class LocalExecutor(UniProcExecutor):
    """vLLM's executor of one worker in this process, on the current CUDA device instead of the first one.

    Each rank of a training job has such an engine beside its model.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        init_method, rank, local_rank = super()._distributed_args()
        return init_method, rank, torch.cuda.current_device() if torch.cuda.is_available() else local_rank
