"""Engines: token ids in, sampled token ids with log-probs out. Read ``base.py`` first.

Other rooms take ``make_engine``, the protocols of ``base`` and the functions of ``for_policy`` from here. May import
from verify, models, parts, recipe, system and the modules to their left.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from posttrain.engines.base import Engine
from posttrain.errors import RecipeError
from posttrain.recipe.sections import EngineSection


def make_engine(
    model: str | Path,
    options: EngineSection,
    *,
    dtype: str,
    max_model_len: int,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    ends: Sequence[int] | None = None,
) -> Engine:
    """Makes the engine that ``options`` ask for, with the weights of ``model``.

    Args:
        model: hub name or local folder.
        options: the recipe's ``engine`` section.
        dtype: dtype of the policy, used if ``options.dtype`` is ``auto``.
        max_model_len: most tokens of a prompt and its completion, used if ``options.max_model_len`` is not set.
        seed: seed of the random seeds for calls of ``generate`` without seeds.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run modelling code that comes with the model.
        ends: tokens that end a completion. Default: those of the model's configuration.

    Raises:
        RecipeError: if vLLM is asked for but not installed, or if an option is unknown to the engine.
    """
    dtype = dtype if options.dtype == "auto" else options.dtype
    max_model_len = options.max_model_len or max_model_len
    if uses_vllm(options):
        from posttrain.engines.vllm import VllmEngine

        return VllmEngine(
            model,
            dtype=dtype,
            max_model_len=max_model_len,
            cache_mb=options.cache_mb,
            gpu_memory=options.gpu_memory,
            max_concurrent=options.max_concurrent,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            ends=ends,
            options=options.options,
        )
    if options.options:
        raise RecipeError(
            f"engine.options: {', '.join(options.options)}: these are arguments of vllm.LLM; the transformers engine "
            "has no options. Leave them out, or set engine.use: vllm"
        )
    from posttrain.engines.transformers import TransformersEngine

    return TransformersEngine(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_concurrent=options.max_concurrent,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        ends=ends,
    )


def uses_vllm(options: EngineSection) -> bool:
    """True if the engine is vLLM's.

    Raises:
        RecipeError: if vLLM is asked for but not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if options.use == "vllm" and not installed:
        raise RecipeError(
            "engine.use: vllm: vLLM is not installed in this Python. For an NVIDIA GPU: pip install 'posttrain[vllm]'; "
            "for CPU: see Install in README.md; or set engine.use: transformers"
        )
    return installed and options.use in ("auto", "vllm")
