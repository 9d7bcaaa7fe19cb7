"""vLLM in the training process, on CPU or CUDA, with weights that are replaced in memory."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from posttrain.batch import Finish
from posttrain.engines import vllm_cpu
from posttrain.engines.base import RefusedRequest, Request, Sampling
from posttrain.engines.ends import end_of_sequence_ids
from posttrain.engines.process_group import engine_world
from posttrain.engines.requests import stop_ids
from posttrain.engines.stepping import SteppingEngine
from posttrain.engines.weights import load_verified
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from vllm import SamplingParams

FINISH = {"stop": Finish.STOPPED, "length": Finish.LENGTH}
OWN_ARGUMENTS = frozenset(
    ["model", "dtype", "max_model_len", "max_num_seqs", "seed", "logprobs_mode", "distributed_executor_backend"]
    + ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "quantization"]
    + ["revision", "trust_remote_code"]
)
"""Arguments of ``vllm.LLM`` that the engine sets, so that recipes cannot."""


class VllmEngine(SteppingEngine):
    """Continuous batching with a cache of shared prefixes: vLLM (Kwon et al. 2023, arXiv:2309.06180).

    In a run of several processes each rank has its own engine, on the CUDA device that is current when the engine is
    made. At temperature 0 the log-probs are those of the model's own softmax.

    Args:
        model: hub name or local folder.
        dtype: dtype of weights and activations; log-probs are always float32.
        max_model_len: most tokens of a prompt and its completion together.
        cache_mb: memory of the key-value cache on CPU, in MiB.
        gpu_memory: share of a GPU's memory for weights and cache together.
        max_concurrent: number of completions generated at the same time.
        seed: seed of the random seeds for calls of ``generate`` without seeds.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run modelling code that comes with the model.
        ends: tokens that end a completion. Default: those of the model's configuration.
        options: further arguments of ``vllm.LLM``.

    Raises:
        RecipeError: if ``vllm.LLM`` does not have an option, if the engine sets it, or if vLLM cannot start.
    """

    library = "vllm"  # for model cards

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        max_model_len: int,
        cache_mb: int = 512,
        gpu_memory: float = 0.4,
        max_concurrent: int = 256,
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        ends: Sequence[int] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(max_model_len=max_model_len, seed=seed)
        if not torch.cuda.is_available():
            vllm_cpu.check_cache(cache_mb)
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._eos = end_of_sequence_ids(model, **source) if ends is None else tuple(ends)
        arguments: dict[str, Any] = {
            **source,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_concurrent,
            "seed": seed,
            "logprobs_mode": "processed_logprobs",  # after temperature and filters, as sampled
            "skip_tokenizer_init": True,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": sys.stderr.isatty(),
        }
        with _surroundings_kept(), engine_world():
            self._llm: Any = _start(str(model), arguments, options or {}, cache_mb=cache_mb, gpu_memory=gpu_memory)
        self.vocab_size = self._llm.llm_engine.model_config.get_vocab_size()
        self._model: Any = served_model(self._llm)

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`."""
        self._opened()
        with torch.no_grad():
            load_verified(tensors, parameter_places(self._model), self._model.load_weights)
            vllm_cpu.pack_weights(self._model)
        self.forget_prefixes()
        self.version = version

    def forget_prefixes(self) -> None:
        """See :meth:`posttrain.engines.stepping.SteppingEngine.forget_prefixes`."""
        if not self._opened().reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _opened(self) -> Any:
        if self._llm is None:
            raise RuntimeError("the engine has been closed")
        return self._llm

    def _add(self, number: int, request: Request) -> None:
        from vllm.exceptions import VLLMClientError

        try:
            self._submit(number, request)
        except VLLMClientError as error:
            raise RefusedRequest(str(error)) from error

    def _submit(self, number: int, request: Request) -> None:
        params = copy.copy(sampling_params(request.sampling, self._eos, request.stream))
        params.seed = request.seed
        if request.shaper is not None:
            params.extra_args = {vllm_shaping().KEY: number}
            vllm_shaping().shaped[number] = request
        self._opened().llm_engine.add_request(str(number), {"prompt_token_ids": list(request.prompt)}, params)

    def _drop(self, numbers: Sequence[int]) -> None:
        self._opened().llm_engine.abort_request([str(number) for number in numbers])

    def _advance(self) -> None:
        with torch.random.fork_rng(devices=[]):  # on CPU vLLM draws unused numbers from the global generator
            outputs = self._opened().llm_engine.step()
        failures = vllm_shaping().failures
        failed = [number for number in failures if number in self._in_flight]
        for number in failed:
            self._fail(number, failures.pop(number))
        if failed:
            self._drop(failed)
        for output in outputs:
            number, sampled = int(output.request_id), output.outputs[0]
            if number in self._in_flight:
                finish = FINISH.get(sampled.finish_reason, Finish.ABORTED) if output.finished else None
                self._grow(number, list(sampled.token_ids), list(sampled.logprobs.logprobs), finish)


def _start(model: str, arguments: dict[str, Any], options: dict[str, Any], *, cache_mb: int, gpu_memory: float) -> Any:
    """Makes a ``vllm.LLM`` in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # This sets vLLM's own switch, and the same level for messages before vLLM has read it.
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    # vLLM looks at every name of every module, and deprecated names warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    vllm_cpu.prepare()
    import vllm.v1.engine.core
    from vllm import LLM
    from vllm.platforms import current_platform

    from posttrain.engines.vllm_classes import classes_kept, use_twins
    from posttrain.engines.vllm_executor import LocalExecutor

    # vLLM's own clean-up would destroy the trainer's default process group, and the groups of other engines.
    vllm.v1.engine.core.cleanup_dist_env_and_memory = gc.collect  # pyright: ignore[reportPrivateImportUsage]
    if current_platform.is_cpu():
        device_arguments = vllm_cpu.arguments(max_model_len=arguments["max_model_len"], cache_mb=cache_mb)
    else:
        device_arguments = {"gpu_memory_utilization": gpu_memory}
    _check_options(options)
    processors = [vllm_shaping().ShapingProcessor, *options.get("logits_processors", ())]
    arguments = {**arguments, **device_arguments, **options, "logits_processors": processors}
    try:
        with classes_kept() as twins:
            llm = LLM(model, distributed_executor_backend=LocalExecutor, **arguments)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {' '.join(lines[:3])}"
        raise RecipeError(
            f"engine.use: vllm: vLLM cannot start {model!r}: {reason}. Look at the engine's settings, or set "
            "engine.use: transformers"
        ) from error
    use_twins(served_model(llm), twins)
    if current_platform.is_cpu():
        vllm_cpu.check_head_size(llm.llm_engine.model_config.get_head_size())
    return llm


def served_model(llm: Any) -> Any:
    """The model inside a ``vllm.LLM`` of this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.get_model()


def _check_options(options: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in options:
        if name in OWN_ARGUMENTS:
            raise RecipeError(f"engine.options.{name}: posttrain sets this argument of vllm.LLM; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known - OWN_ARGUMENTS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"engine.options.{name}: vllm.LLM has no such argument{hint}")


@functools.lru_cache(maxsize=64)
def sampling_params(sampling: Sampling, eos: tuple[int, ...], stream: bool = False) -> SamplingParams:
    """vLLM's sampling parameters, without a seed."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sorted(set(stop_ids(sampling, eos))),
        ignore_eos=True,  # the stop tokens include them
        logprobs=0,  # log-probs of the sampled tokens alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


def vllm_shaping() -> Any:
    """Imports the module of shapers, which needs vLLM's classes, after vLLM."""
    from posttrain.engines import vllm_shaping

    return vllm_shaping


def parameter_places(model: Any) -> dict[str, Tensor]:
    """Maps the Hugging Face name of each tensor to the part of vLLM's memory that holds it.

    vLLM packs several matrices into one (queries, keys and values; gate and up projections), one below the other, and
    pads vocabularies.
    """
    places: dict[str, Tensor] = {}
    packed = getattr(model, "packed_modules_mapping", {})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, kind = name.rpartition(".")
        prefix, _, leaf = path.rpartition(".")
        module, sources = model.get_submodule(path), packed.get(leaf, [])
        if len(sources) > 1:
            parts = parameter.data.split(module.output_sizes)
            places |= {f"{prefix}.{source}.{kind}": part for source, part in zip(sources, parts, strict=True)}
        else:
            places[name] = parameter.data[: getattr(module, "org_vocab_size", None)]
    return places


@contextmanager
def _surroundings_kept() -> Iterator[None]:
    """Keeps the state of the process, which vLLM changes while it starts, as it was for the trainer.

    It restores random states, filters of warnings, the default dtype, the number of threads, the function
    ``torch.set_num_threads`` (which vLLM replaces on CPU), and environment variables other than vLLM's own.
    """
    threads, set_threads, dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    states = random.getstate(), numpy.random.get_state()
    environment = dict(os.environ)
    device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(device), warnings.catch_warnings():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        for name in [name for name in os.environ if not name.startswith("VLLM_")]:
            if name not in environment:
                del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if not name.startswith("VLLM_")})
