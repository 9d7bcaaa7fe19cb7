"""Changes to vLLM's CPU backend for a sampler whose weights change after every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import psutil
import torch

from posttrain.errors import RecipeError

BLOCK_SIZE = 32  # tokens; the smallest size for vLLM's CPU attention, so that short prompts share their prefix
PREFILL_TOKENS = 4096  # prompt tokens computed in one step


def check_cache(cache_mb: int) -> None:
    """Checks that the key-value cache fits into the memory that is free.

    Raises:
        RecipeError: if not, with both numbers.
    """
    free = psutil.virtual_memory().available >> 20
    if cache_mb > free:
        raise RecipeError(
            f"engine.cache_mb: {cache_mb:,} MiB for vLLM's key-value cache, but only {free:,} MiB of memory are free; "
            "lower it (the default is 512), or set engine.use: transformers"
        )


def arguments(*, max_model_len: int, cache_mb: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` on CPU.

    Prompts are computed whole. If a prompt were cut into pieces, vLLM would rewind the generator of its seed after
    every piece but the last. Generators on CPU cannot do that, and the request would end in an error.
    """
    return {
        "kv_cache_memory_bytes": cache_mb << 20,
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(PREFILL_TOKENS, max_model_len),
    }


def prepare() -> None:
    """Patches vLLM's CPU backend; does nothing elsewhere. Must run before vLLM's sampler is imported.

    * Linear layers keep their weights. vLLM packs them for its own kernels and drops the originals, after which no
      weight could be loaded. See :func:`pack_weights`.
    * The process may use all memory that it could use before. vLLM would bind it, with the trainer, to one NUMA node.
    * Small functions of the sampler are not compiled, which would take 20 seconds at the first token. Only vLLM's own
      choice of a backend and one of its functions are changed: ``torch.compile`` stays as it is for all other code.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    torch.ops._C.init_cpu_memory_env = _leave_memory_unbound  # type: ignore[attr-defined]
    type(current_platform).simple_compile_backend = "eager"

    import vllm.model_executor.layers.utils as layers
    import vllm.v1.sample.sampler as sampler

    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)  # type: ignore
    if not hasattr(layers.dispatch_cpu_unquantized_gemm, "keeps_weight"):
        layers.dispatch_cpu_unquantized_gemm = _keeping_weight(layers.dispatch_cpu_unquantized_gemm)


def _leave_memory_unbound(nodes: list[int]) -> None:
    """Does nothing, in place of vLLM's function, which binds the whole process to cores."""


def _keeping_weight(pack: Callable[..., None]) -> Callable[..., None]:
    def pack_and_keep(layer: Any, remove_weight: bool) -> None:
        pack(layer, remove_weight=False)

    pack_and_keep.keeps_weight = True  # type: ignore[attr-defined]
    return pack_and_keep


def pack_weights(model: torch.nn.Module) -> None:
    """Packs the weights of linear layers again after a load; only needed on CPU.

    vLLM's kernels for packed weights are 1.1 to 2.2 times as fast as plain ones, for twice the memory of the weights.
    """
    import vllm.model_executor.layers.utils as layers

    for layer in model.modules():
        if hasattr(layer, "cpu_linear"):
            layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def check_head_size(size: int) -> None:
    """Raises ``RecipeError`` if vLLM's CPU attention has no kernel for heads of this size."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise RecipeError(
            f"engine.use: vllm: on CPU vLLM supports attention heads of {', '.join(map(str, sizes))} "
            f"dimensions; this model's have {size}. Set engine.use: transformers"
        )
