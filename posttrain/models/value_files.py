"""Builds value models for a run, loads and saves them.

On disk a value model is a Hugging Face ``...ForTokenClassification`` checkpoint whose labels are the outputs of the
head, or, with a per-token head, a ``...ForCausalLM`` whose output layer is Q. Plain transformers loads both. An
implicit value is an ordinary ``...ForCausalLM``. The entry ``posttrain`` of its ``config.json`` holds the
:class:`~posttrain.models.value.ValueSpec`.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)

from posttrain.errors import RecipeError, UserError
from posttrain.models.adapters import enable_checkpointing, merged, with_adapter
from posttrain.models.dropout import restore
from posttrain.models.heads import Head
from posttrain.models.implicit_value import ImplicitValue
from posttrain.models.load import DTYPES, check_tokens, configuration_of, load_model, pretrained
from posttrain.models.policy import Policy
from posttrain.models.value import VALUE_ADAPTER, ValueKind, ValueModel, ValueSpec
from posttrain.recipe import sections
from posttrain.system.places import expanded

PLAIN_LOGITS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0}
"""Entries of configurations that scale or cap logits, and the values with which they do nothing."""

PLACE = "value.model"
"""Key of the recipe that names the value model, for messages."""


def build_value(
    settings: sections.ValueSection,
    policy_settings: sections.PolicySection,
    policy: Policy | None = None,
    kind: ValueKind | None = None,
) -> ValueModel:
    """Builds the value model of a run, on the CPU: a separate model, or adapters on the policy's weights.

    Its forward pass runs in the policy's precision, with the policy's attention and gradient checkpointing. The weights
    have the same dtypes as the policy's: all in float32, or frozen ones in ``policy.dtype`` under float32 adapters. The
    head is in float32.

    Args:
        settings: the value section of the recipe. Members and their reduction, if left at their defaults, are those of
            a saved value model.
        policy_settings: the policy section.
        policy: the policy whose weights are shared; not yet wrapped by Accelerate.
        kind: kind of the values that are trained. Default: that of a saved value model, or else the mean.

    Raises:
        RecipeError: if settings contradict each other or the model they name.
    """
    _refuse_contradictions(settings, policy_settings)
    if settings.share:
        if policy is None or policy_settings.lora is None:
            raise RecipeError("value.share: needs policy.lora, because the adapters share the policy's frozen weights")
        backbone = with_adapter(policy.model, settings.lora or policy_settings.lora, VALUE_ADAPTER)
        value = _add_head(backbone, settings, policy.base.config, policy_settings)
        value.adapter = VALUE_ADAPTER
    else:
        value = _separate(settings, policy_settings)
    if kind is not None and not settings.frozen:
        beta = kind.beta if kind.backup == "soft" else None
        value.spec = dataclasses.replace(value.spec, kind=kind.backup, beta=beta)
    if value.spec.kind == "soft" and not value.spec.beta:
        raise RecipeError("target.beta: a soft value needs a temperature, in reward units")
    return value


def _separate(settings: sections.ValueSection, policy_settings: sections.PolicySection) -> ValueModel:
    """Builds a value model that shares no weights with the policy."""
    source = policy_settings
    if settings.model is not None:
        source = dataclasses.replace(policy_settings, model=settings.model, revision=None)
        _refuse_other_tokens(settings.model, policy_settings)
    compact = settings.frozen or settings.lora is not None
    dtype = DTYPES[policy_settings.dtype] if compact else torch.float32
    value = _load_with_head(source, dtype, settings.head, PLACE)
    if value is not None:
        _apply_settings(value, settings, source.model)
    elif settings.frozen:
        raise RecipeError(
            f"value.frozen: {source.model!r} is a language model without a value head, which has to be trained first"
        )
    else:
        implicit = settings.head is not None and settings.head.type == "implicit"
        model = load_model(source, dtype=dtype, place=PLACE, headless=not implicit)
        value = _add_head(model, settings, model.config, source)
        if isinstance(value, ImplicitValue) and settings.lora is None:
            value.base = Policy(load_model(source, dtype=dtype, place=PLACE)).requires_grad_(False).eval()
    if settings.frozen:
        return value.requires_grad_(False).eval()
    if settings.head_only:
        value.backbone.requires_grad_(False)
        return value
    if settings.lora is not None:
        value.backbone = with_adapter(value.backbone, settings.lora, VALUE_ADAPTER)
        value.adapter = VALUE_ADAPTER
    if policy_settings.gradient_checkpointing:
        enable_checkpointing(value.backbone)
    return value


def _add_head(model: Any, settings: sections.ValueSection, config: Any, source: sections.PolicySection) -> ValueModel:
    """Puts a new head on a language model, or on PEFT's wrapper of one. An implicit value needs no head."""
    text, head = config.get_text_config(), settings.head or sections.HeadSection()
    spec = ValueSpec(
        head=head, members=settings.members, reduce=settings.reduce, deviations=settings.deviations, base=source.model
    )
    if head.type == "implicit":
        local = expanded(source.model)
        base = str(local.resolve()) if local.is_dir() else source.model
        return ImplicitValue(model, dataclasses.replace(spec, base=base, base_revision=source.revision))
    backbone = model if hasattr(model, "peft_config") else model.get_decoder()
    return ValueModel(backbone, Head(head, text.hidden_size, text.vocab_size, settings.members), spec)


def _apply_settings(value: ValueModel, settings: sections.ValueSection, name: str) -> None:
    """Changes the spec of a saved value model as the recipe says.

    Raises:
        RecipeError: if the recipe's settings do not fit the saved model.
    """
    saved = value.spec
    if settings.head is not None and settings.head != saved.head:
        raise RecipeError(
            f"value.head: {settings.head} does not fit {name!r}, whose head is {saved.head}; leave value.head out to "
            "use the model's"
        )
    if settings.members not in (1, saved.members):
        raise RecipeError(f"value.members: {settings.members}, but {name!r} has {saved.members}")
    default = sections.ValueSection()
    changes = {
        key: getattr(settings, key)
        for key in ("reduce", "deviations")
        if getattr(settings, key) != getattr(default, key)
    }
    if settings.normalise and saved.head.type in ("bernoulli", "implicit"):
        raise RecipeError(f"value.normalise: the head of {name!r} is {saved.head.type}, whose scale is fixed")
    if saved.head.type != "implicit":  # an implicit value is defined by its base
        changes["base"] = name
    value.spec = dataclasses.replace(saved, **changes, step=None)


def _refuse_contradictions(settings: sections.ValueSection, policy_settings: sections.PolicySection) -> None:
    """
    Raises:
        RecipeError: naming each pair of settings that contradict each other.
    """
    head = settings.head or sections.HeadSection()
    problems = {
        "value.share: needs `policy.lora`, so that the shared weights are frozen": (
            settings.share and policy_settings.lora is None
        ),
        "value.share: the weights are the policy's, so `value.model` cannot be set": settings.share and settings.model,
        "value.share: new adapters have to be trained, so leave out `value.frozen`": (
            settings.share and settings.frozen
        ),
        "value.frozen: nothing is trained, so leave out `value.lora`": settings.frozen and settings.lora,
        "value.head_only: only the head is trained, so leave out `frozen`, `lora` and `share`": (
            settings.head_only and (settings.frozen or settings.lora is not None or settings.share)
        ),
        f"value.head_only: the {head.type} head is the model's own output layer": (
            settings.head_only and head.type == "implicit"
        ),
        "value.frozen: nothing is trained, so leave out `value.normalise`": settings.frozen and settings.normalise,
        "value.normalise: a bernoulli head's value is a probability, whose scale is fixed": (
            settings.normalise and head.type == "bernoulli"
        ),
        "value.normalise: an implicit value is a log-ratio, whose scale is fixed": (
            settings.normalise and head.type == "implicit"
        ),
        f"value.members: the {head.type} head has one member": (
            settings.members > 1 and head.type in ("per_token", "implicit")
        ),
        f"value.head: low ({head.low}) must be below high ({head.high})": (
            head.type == "categorical" and head.low >= head.high
        ),
    }
    present = [problem for problem, holds in problems.items() if holds]
    if present:
        raise RecipeError(present)


def _refuse_other_tokens(model: str, policy_settings: sections.PolicySection) -> None:
    """Checks that token ids mean the same to the value model and to the policy, because it reads the policy's ids.

    Raises:
        RecipeError: if the two vocabularies differ.
    """
    check_tokens(policy_settings, model, PLACE, kind="value model")


# ------------------------------------------------------------------------------------------------------------- on disk


def load_value(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    place: str = "value model",
) -> ValueModel:
    """Loads a value model that a run saved, or a Hugging Face reward or process model, in evaluation mode.

    A reward model (``...ForSequenceClassification`` with one label) gets a scalar head. A process model
    (``...ForTokenClassification``) with two labels, wrong and right, gets a bernoulli head on the difference of their
    logits; with one label, a scalar head. For an implicit value its base is loaded too.

    Args:
        place: beginning of error messages, such as the key of a YAML file that names the model.

    Raises:
        UserError: if there is no such model, or if it has no value head.
    """
    source = sections.PolicySection(
        model=str(path),
        attention=attention,  # pyright: ignore[reportArgumentType]  # checked by pydantic
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    value = _load_with_head(source, dtype, None, place)
    if value is None:
        raise UserError(
            f"{place}: {str(path)!r} is a language model without a value head. Use a value model that `posttrain "
            "train` saved beside a policy, or a reward or process model of Hugging Face's classification classes."
        )
    return value.eval()


def _load_with_head(
    source: sections.PolicySection, dtype: torch.dtype, head: sections.HeadSection | None, place: str
) -> ValueModel | None:
    """Loads a model with its saved head; None for a language model, which has none.

    Args:
        head: the head that the recipe asks for; it decides how the only output of a foreign model is read.
        place: beginning of error messages.
    """
    config = configuration_of(place, source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    name = (getattr(config, "architectures", None) or [""])[0]
    spec = _read_spec(config, source.model, place)
    if name.endswith("ForTokenClassification"):
        model = pretrained(AutoModelForTokenClassification, source, dtype, place)
        layer = _classifier(model)
    elif name.endswith("ForSequenceClassification"):
        model = pretrained(AutoModelForSequenceClassification, source, dtype, place)
        layer = _classifier(model)
        if layer.out_features != 1:
            raise RecipeError(f"{place}: {source.model!r} has {layer.out_features} labels; a reward model has 1")
    elif spec is not None:
        model = load_model(source, dtype=dtype, place=place)
        if spec.head.type == "implicit":
            return ImplicitValue(model, spec, _base_of(spec, source, dtype, place))
        layer = model.get_output_embeddings()
    else:
        if not name.endswith(("ForCausalLM", "LMHeadModel", "Model")):
            raise RecipeError(f"{place}: {source.model!r} is a {name}, not a language, reward or process model")
        return None
    weight, bias = _weight_and_bias(layer)
    if spec is None:
        spec, weight, bias = _foreign_spec(weight, bias, head, f"{place}: {source.model!r}")
    return _assemble(model, spec, weight, bias, f"{place}: {source.model!r}")


def _base_of(spec: ValueSpec, source: sections.PolicySection, dtype: torch.dtype, place: str) -> Policy:
    """Loads the model to which an implicit value is the log-ratio."""
    where = f"{place}: the base of the implicit value {source.model!r}"
    if spec.base is None:
        raise RecipeError(f"{where} is not named: the entry `posttrain` in its config.json has no `base`")
    base = dataclasses.replace(source, model=spec.base, revision=spec.base_revision)
    return Policy(load_model(base, dtype=dtype, place=where))


def _read_spec(config: Any, model: str, place: str) -> ValueSpec | None:
    """Reads the entry ``posttrain`` of a model's configuration; None if it has none."""
    entry = getattr(config, "posttrain", None)
    if entry is None:
        return None
    try:
        return TypeAdapter(ValueSpec).validate_python(entry)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        message = f"{place}: the entry `posttrain` in config.json of {model!r} is wrong: {'; '.join(problems)}"
        raise RecipeError(message) from error


def _classifier(model: Any) -> nn.Linear:
    """The layer of a classification model on top of its decoder, whose name depends on the model class."""
    return model.score if hasattr(model, "score") else model.classifier


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer in float32; a missing bias is 0."""
    weight = layer.weight.detach().float()
    bias = getattr(layer, "bias", None)
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().float()


def _foreign_spec(
    weight: Tensor, bias: Tensor, head: sections.HeadSection | None, name: str
) -> tuple[ValueSpec, Tensor, Tensor]:
    """The spec, weight and bias of a value head that equals the head of a reward or process model."""
    if len(weight) == 2:  # wrong, right: the probability of right is the sigmoid of the logits' difference
        return ValueSpec(head=sections.HeadSection(type="bernoulli")), weight[1:] - weight[:1], bias[1:] - bias[:1]
    if len(weight) != 1:
        raise RecipeError(f"{name} has {len(weight)} labels; a process model has 1 or 2")
    has_one_output = head is not None and head.type in ("scalar", "bernoulli")
    return ValueSpec(head=head if has_one_output and head is not None else sections.HeadSection()), weight, bias


def _assemble(model: Any, spec: ValueSpec, weight: Tensor, bias: Tensor, name: str) -> ValueModel:
    """Makes a value model from a loaded model and the weight and bias of its head."""
    text = model.config.get_text_config()
    head = Head(spec.head, text.hidden_size, text.vocab_size, spec.members)
    if head.linear.weight.shape != weight.shape:
        raise RecipeError(
            f"{name} has a head with {len(weight)} outputs, but its entry `posttrain` in config.json describes one "
            f"with {len(head.linear.weight)}"
        )
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        if head.linear.bias is not None:
            head.linear.bias.copy_(bias)
    return ValueModel(model.get_decoder(), head, spec)


def save_value(
    model: ValueModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    step: int | None = None,
) -> None:
    """Saves a value model as a Hugging Face checkpoint, with its adapter merged in.

    Args:
        model: the value model, not wrapped by Accelerate.
        tokenizer: tokenizer of the tokens that the model reads.
        folder: destination; created if it is missing.
        dtype: dtype of the weights on disk. In float32 and without an adapter, values are bit-equal after loading.
        step: number of optimiser steps that the model was trained for.
    """
    spec = dataclasses.replace(model.spec, step=step)
    config = copy.deepcopy(
        model.language_model.base.config if isinstance(model, ImplicitValue) else model.decoder.config
    )
    restore(config, model.language_model.base if isinstance(model, ImplicitValue) else model.decoder)
    config.update({"posttrain": TypeAdapter(ValueSpec).dump_python(spec, mode="json"), "use_cache": True})
    if spec.head.type == "per_token":
        config.tie_word_embeddings = False
        for name, plain in PLAIN_LOGITS.items():
            if hasattr(config, name):
                setattr(config, name, plain)  # Q has no cap and no scale
    is_language_model = spec.head.type in ("per_token", "implicit")
    if not is_language_model:
        config.update({"num_labels": len(model.head.linear.weight), "classifier_dropout": 0.0})
        config.update({"token_classification_bias": True})
    auto_class: Any = AutoModelForCausalLM if is_language_model else AutoModelForTokenClassification
    with torch.device("meta"):  # only names and configuration are needed from it
        shell = auto_class.from_config(config, dtype=dtype)
    state = _saved_weights(model, shell)
    if state.keys() != dict(shell.named_parameters()).keys():
        raise RuntimeError(f"the saved model would differ in {sorted(state.keys() ^ dict(shell.named_parameters()))}")
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    shell.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _saved_weights(model: ValueModel, shell: Any) -> dict[str, Tensor]:
    """The weights, adapter merged in, under their names in the Hugging Face model that is saved."""
    if isinstance(model, ImplicitValue):
        return dict(model.language_model.weights())
    layer = shell.get_output_embeddings() if model.spec.head.type == "per_token" else _classifier(shell)
    layer_name = next(name for name, module in shell.named_modules() if module is layer)
    decoder = merged(model.decoder, model.adapter) if model.adapter else model.decoder.named_parameters()
    state: dict[str, Tensor] = {f"{shell.base_model_prefix}.{name}": tensor for name, tensor in decoder}
    return state | {f"{layer_name}.{name}": tensor for name, tensor in model.head.linear.named_parameters()}
