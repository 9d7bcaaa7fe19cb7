"""What vLLM needs on CPU to serve as a sampler whose weights change after every step."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def prepare() -> None:
    """Fits vLLM's CPU backend; does nothing elsewhere. Must run before vLLM's sampler is imported.

    * Linear weights stay as they are. vLLM would pack them for its own kernels and drop the originals, after which no
      weight can be loaded; for the sizes that CPUs train, the packed kernels are no faster.
    * Small functions of the sampler are not compiled by Inductor, which would take 20 seconds at the first token. Only
      vLLM's own choice of a backend is changed: ``torch.compile`` is untouched for everyone else.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    type(current_platform).simple_compile_backend = "eager"

    import vllm.model_executor.layers.utils as layers
    import vllm.v1.sample.sampler as sampler

    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)
    layers.dispatch_cpu_unquantized_gemm = _keep_weight


def _keep_weight(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
