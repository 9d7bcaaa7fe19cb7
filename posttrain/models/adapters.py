"""LoRA adapters on a language model: adding, switching and merging them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from posttrain.errors import RecipeError
from posttrain.recipe.sections import LoraSection

POLICY_ADAPTER = "default"
"""Name of the policy's own adapter. A value model on the same weights has another one."""


def with_adapter(model: Any, lora: LoraSection, name: str) -> Any:
    """Adds an adapter in float32, to be trained, and returns the model.

    A model without adapters is wrapped for PEFT first.

    Raises:
        RecipeError: if the targets name no layer, a layer that cannot have an adapter, or a layer with tied weights.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION",
    )
    try:
        if hasattr(model, "peft_config"):
            add_adapter(model, config, name)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    except ValueError as error:
        raise RecipeError(f"lora.targets: {targets}: {str(error).strip()}") from error
    refuse_tied_layers(model)
    for parameter in adapter_parameters(model, name).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def add_adapter(model: Any, config: Any, name: str) -> None:
    """Adds an adapter to a PEFT model. Parameters that require a gradient keep doing so, which PEFT would change."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.add_adapter(name, config)
    _LAYERS_OF.pop(model, None)
    for parameter in trained:
        parameter.requires_grad_(True)


def refuse_tied_layers(model: nn.Module) -> None:
    """Checks that no layer with an adapter shares its weights with another layer.

    An adapter changes one of the two layers. Merged into the shared weights, as for an engine or on disk, it would
    change both: the policy that samples and the one that is saved would not be the one that is trained.

    Raises:
        RecipeError: if one does; names both layers.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            layer = name.removeprefix("base_model.model.").replace(".base_layer.", ".").rpartition(".")[0]
            names.setdefault(id(parameter), []).append(layer)
    for adapted in _adapted_layers(model):
        weight = getattr(adapted.get_base_layer(), "weight", None)
        tied = names.get(id(weight), [])
        if len(tied) > 1:
            raise RecipeError(
                f"lora.targets: {' and '.join(tied)} are tied: they share one matrix of weights. An adapter on one of "
                "them would train another policy than the one that is sampled and saved. Name other layers; "
                "`targets: all-linear` takes every linear layer but the output layer"
            )


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter. The adapter's name is left out of their names."""
    mark = f".{name}."  # between dots in the name of a linear layer's adapter, at the end in that of an embedding's
    of_adapters = ((f"{key}.", p) for key, p in model.named_parameters() if ".lora_" in key)
    return {key.replace(mark, ".").rstrip("."): p for key, p in of_adapters if mark in key}


def enable_checkpointing(model: Any) -> None:
    """Trades time for memory: the backward pass recomputes each layer's activations.

    It recomputes them with the adapter of the forward pass. Otherwise one backward pass through two forward passes
    with two adapters on the same weights would silently give wrong gradients.
    """
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if hasattr(model, "peft_config"):
        kwargs["context_fn"] = lambda: (nullcontext(), active_adapter(model, selected_adapter(model)))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def selected_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that a forward pass would use; None if it would use none."""
    layer = _adapted_layers(model)[0]
    return None if layer.disable_adapters else layer.active_adapters[0]


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Selects one adapter, or none, for the block. Does not change which parameters require a gradient."""
    before = selected_adapter(model)
    _select(model, name, before)
    try:
        yield
    finally:
        _select(model, before, name)


def _select(model: nn.Module, name: str | None, now: str | None) -> None:
    if name == now:
        return
    for layer in _adapted_layers(model):
        # PEFT's set_adapter and enable_adapters do this too, but they also turn off training of the adapter that they
        # leave. Undoing that would take 50 times as long, and checkpointing switches at every layer.
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


_LAYERS_OF: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # a walk over all modules takes milliseconds


def _adapted_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model not in _LAYERS_OF:
        _LAYERS_OF[model] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return _LAYERS_OF[model]


def merged(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight of a model under its Hugging Face name, with one adapter merged in."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            yield name, parameter.detach()
            continue
        owner = name.rsplit(".", 2)[0]
        delta = modules[owner].get_delta_weight(adapter) if name.endswith(".weight") else None
        weight = parameter if delta is None else parameter.float() + delta.float()
        yield name.replace(".base_layer.", "."), weight.detach().to(parameter.dtype)
