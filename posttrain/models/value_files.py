"""Value models: building them for a run, and on disk.

On disk a value model is a Hugging Face ``...ForTokenClassification`` checkpoint whose labels are the outputs of the
head, or, with a per-token head, a ``...ForCausalLM`` whose output layer is Q: plain transformers loads both. An
implicit value is a ``...ForCausalLM`` as it is. The entry ``posttrain`` of its ``config.json`` holds the
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
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.errors import RecipeError, UserError
from posttrain.models.adapters import enable_checkpointing, merged, with_adapter
from posttrain.models.heads import Head
from posttrain.models.implicit_value import ImplicitValue
from posttrain.models.load import DTYPES, load_model, not_found
from posttrain.models.policy import Policy
from posttrain.models.value import VALUE_ADAPTER, ValueKind, ValueModel, ValueSpec
from posttrain.recipe import sections

PLACE = "value.model"


def build_value(
    settings: sections.ValueSection,
    policy_settings: sections.PolicySection,
    policy: Policy | None = None,
    kind: ValueKind | None = None,
) -> ValueModel:
    """The value model of a run, on the CPU: a model of its own, or adapters on the policy's weights.

    Its forward pass runs in the policy's precision, with its attention and gradient checkpointing. Weights are held as
    the policy's are: all in float32, or frozen ones in ``policy.dtype`` under float32 adapters; the head in float32.

    Args:
        settings: the value section of the recipe. Members and their reduction, where left at their defaults, are those
            of a saved value model.
        policy_settings: the policy section.
        policy: to share its weights; not yet wrapped by Accelerate.
        kind: how targets are backed up. Default: as a saved value model says, or else the mean.

    Raises:
        RecipeError: for settings that contradict each other or the model they name.
    """
    _refuse_contradictions(settings, policy_settings)
    if settings.share:
        if policy is None or policy_settings.lora is None:
            raise RecipeError("value.share: needs policy.lora, for the adapters stand on frozen weights")
        backbone = with_adapter(policy.model, settings.lora or policy_settings.lora, VALUE_ADAPTER)
        value = _new(backbone, settings, policy.base.config, policy_settings)
        value.adapter = VALUE_ADAPTER
    else:
        value = _of_its_own(settings, policy_settings)
    if kind is not None and not settings.frozen:
        beta = kind.beta if kind.backup == "soft" else None
        value.spec = dataclasses.replace(value.spec, kind=kind.backup, beta=beta)
    if value.spec.kind == "soft" and not value.spec.beta:
        raise RecipeError("target.beta: a soft value needs its temperature, in reward units")
    return value


def _of_its_own(settings: sections.ValueSection, policy_settings: sections.PolicySection) -> ValueModel:
    source = policy_settings
    if settings.model is not None:
        source = dataclasses.replace(policy_settings, model=settings.model, revision=None)
        _refuse_other_tokens(settings.model, policy_settings)
    compact = settings.frozen or settings.lora is not None
    dtype = DTYPES[policy_settings.dtype] if compact else torch.float32
    value = _with_its_head(source, dtype, settings.head, PLACE)
    if value is not None:
        _fit(value, settings, source.model)
    elif settings.frozen:
        raise RecipeError(
            f"value.frozen: {source.model!r} is a language model without a value head: it has to learn one"
        )
    else:
        model = load_model(source, dtype=dtype, place=PLACE)
        value = _new(model, settings, model.config, source)
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


def _new(model: Any, settings: sections.ValueSection, config: Any, source: sections.PolicySection) -> ValueModel:
    """On a language model, or PEFT's wrapper of one, which most heads need without its output layer."""
    text, head = config.get_text_config(), settings.head or sections.HeadSection()
    spec = ValueSpec(
        head=head, members=settings.members, reduce=settings.reduce, deviations=settings.deviations, base=source.model
    )
    if head.type == "implicit":
        local = Path(source.model).expanduser()
        base = str(local.resolve()) if local.is_dir() else source.model
        return ImplicitValue(model, dataclasses.replace(spec, base=base, base_revision=source.revision))
    backbone = model if hasattr(model, "peft_config") else model.get_decoder()
    return ValueModel(backbone, Head(head, text.hidden_size, text.vocab_size, settings.members), spec)


def _fit(value: ValueModel, settings: sections.ValueSection, name: str) -> None:
    saved = value.spec
    if settings.head is not None and settings.head != saved.head:
        raise RecipeError(
            f"value.head: {settings.head} does not fit {name!r}, whose head is {saved.head}; leave value.head out to "
            "use the model's"
        )
    if settings.members not in (1, saved.members):
        raise RecipeError(f"value.members: {settings.members}, but {name!r} has {saved.members}")
    standard = sections.ValueSection()
    changes = {
        key: getattr(settings, key)
        for key in ("reduce", "deviations")
        if getattr(settings, key) != getattr(standard, key)
    }
    if settings.normalise and saved.head.type in ("bernoulli", "implicit"):
        raise RecipeError(f"value.normalise: the head of {name!r} is {saved.head.type}, which has no other scale")
    if saved.head.type != "implicit":  # whose base says what it means
        changes["base"] = name
    value.spec = dataclasses.replace(saved, **changes, step=None)


def _refuse_contradictions(settings: sections.ValueSection, policy_settings: sections.PolicySection) -> None:
    head = settings.head or sections.HeadSection()
    problems = {
        "value.share: needs `policy.lora`: the adapters stand on weights that nobody trains": (
            settings.share and policy_settings.lora is None
        ),
        "value.share: the weights are the policy's, so `value.model` cannot be set": settings.share and settings.model,
        "value.share: adapters that start at nothing have to learn, so not with `frozen`": (
            settings.share and settings.frozen
        ),
        "value.frozen: nothing is trained, so leave out `value.lora`": settings.frozen and settings.lora,
        "value.head_only: the head alone is trained, so leave out `frozen`, `lora` and `share`": (
            settings.head_only and (settings.frozen or settings.lora is not None or settings.share)
        ),
        f"value.head_only: the {head.type} head is the model's own output layer": (
            settings.head_only and head.type == "implicit"
        ),
        "value.frozen: nothing is trained, so leave out `value.normalise`": settings.frozen and settings.normalise,
        "value.normalise: a bernoulli head's value is a probability, which has no other scale": (
            settings.normalise and head.type == "bernoulli"
        ),
        "value.normalise: an implicit value is a log-ratio, which has no other scale": (
            settings.normalise and head.type == "implicit"
        ),
        f"value.members: the {head.type} head has one member": (
            settings.members > 1 and head.type in ("per_token", "implicit")
        ),
        f"value.head: low ({head.low}) must be below high ({head.high})": (
            head.type == "categorical" and head.low >= head.high
        ),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise RecipeError(found)


def _refuse_other_tokens(model: str, policy_settings: sections.PolicySection) -> None:
    """A value model reads the policy's token ids, so these must mean the same to both."""
    trust = policy_settings.trust_remote_code
    try:
        own = AutoTokenizer.from_pretrained(model, trust_remote_code=trust).get_vocab()
    except (OSError, ValueError) as error:
        raise RecipeError(not_found(PLACE, model, error)) from error
    of_policy = AutoTokenizer.from_pretrained(
        policy_settings.model, revision=policy_settings.revision, trust_remote_code=trust
    ).get_vocab()
    token_of = {i: token for token, i in own.items()}
    # a token that it does not know, at a place that it does not use, is none that it takes for another
    differ = [token for token, i in of_policy.items() if own.get(token, i) != i or token_of.get(i, token) != token]
    if differ:
        raise RecipeError(
            f"{PLACE}: {model!r} reads other tokens than the policy writes: {len(differ)} of {len(of_policy)} differ, "
            f"such as {differ[0]!r} ({of_policy[differ[0]]} to the policy, {own.get(differ[0], 'unknown')} to it). Use "
            "a value model with the policy's tokenizer"
        )


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
    """A value model that a run saved, or a Hugging Face reward or process model, ready to be asked.

    A reward model (``...ForSequenceClassification`` of one label) becomes a scalar head; a process model
    (``...ForTokenClassification``) of two labels, wrong and right, a bernoulli head on the difference of their logits,
    and of one label a scalar head. Beside an implicit value the model that it is compared with is loaded.

    Args:
        place: what messages begin with, such as the key of a YAML file that names the model.

    Raises:
        UserError: where there is no such model, or it has no value head.
    """
    source = sections.PolicySection(
        model=str(path),
        attention=attention,  # pyright: ignore[reportArgumentType]  # checked by pydantic
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    value = _with_its_head(source, dtype, None, place)
    if value is None:
        raise UserError(
            f"{place}: {str(path)!r} is a language model without a value head. A value model is what `posttrain "
            "train` saves beside the policy, or a reward or process model of Hugging Face's classification classes."
        )
    return value.eval()


def _with_its_head(
    source: sections.PolicySection, dtype: torch.dtype, wanted: sections.HeadSection | None, place: str
) -> ValueModel | None:
    """A model with the head it brings; None for a language model, which brings none. ``place``: where it was named."""
    try:
        config = AutoConfig.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(not_found(place, source.model, error)) from error
    name = (getattr(config, "architectures", None) or [""])[0]
    spec = _read_spec(config, source.model, place)
    if name.endswith("ForTokenClassification"):
        model = _load(AutoModelForTokenClassification, source, dtype, place)
        layer = _classifier(model)
    elif name.endswith("ForSequenceClassification"):
        model = _load(AutoModelForSequenceClassification, source, dtype, place)
        layer = _classifier(model)
        if layer.out_features != 1:
            raise RecipeError(f"{place}: {source.model!r} classifies into {layer.out_features}; a reward model has 1")
    elif spec is not None:
        model = load_model(source, dtype=dtype, place=place)
        if spec.head.type == "implicit":
            return ImplicitValue(model, spec, _base_of(spec, source, dtype, place))
        layer = model.get_output_embeddings()
    else:
        if not name.endswith(("ForCausalLM", "LMHeadModel", "Model")):
            raise RecipeError(f"{place}: {source.model!r} is a {name}: neither a language, reward nor process model")
        return None
    weight, bias = _rows(layer)
    if spec is None:
        spec, weight, bias = _foreign_spec(weight, bias, wanted, f"{place}: {source.model!r}")
    return _assembled(model, spec, weight, bias, f"{place}: {source.model!r}")


def _base_of(spec: ValueSpec, source: sections.PolicySection, dtype: torch.dtype, place: str) -> Policy:
    """The model that an implicit value is compared with."""
    where = f"{place}: what the implicit value {source.model!r} is compared with"
    if spec.base is None:
        raise RecipeError(f"{where} is not named: the entry `posttrain` in its config.json has no `base`")
    of_base = dataclasses.replace(source, model=spec.base, revision=spec.base_revision)
    return Policy(load_model(of_base, dtype=dtype, place=where))


def _load(kind: Any, source: sections.PolicySection, dtype: torch.dtype, place: str) -> PreTrainedModel:
    try:
        return kind.from_pretrained(
            source.model,
            dtype=dtype,
            attn_implementation=source.attention,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ImportError, ValueError) as error:
        raise RecipeError(not_found(place, source.model, error)) from error


def _read_spec(config: Any, model: str, place: str) -> ValueSpec | None:
    entry = getattr(config, "posttrain", None)
    if entry is None:
        return None
    try:
        return TypeAdapter(ValueSpec).validate_python(entry)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise RecipeError(f"{place}: the entry `posttrain` in config.json of {model!r}: {'; '.join(lines)}") from error


def _classifier(model: Any) -> nn.Linear:
    """The layer of a classification model on top of its decoder, which is not called the same everywhere."""
    return model.score if hasattr(model, "score") else model.classifier


def _rows(layer: Any) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach().float()
    bias = getattr(layer, "bias", None)
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().float()


def _foreign_spec(
    weight: Tensor, bias: Tensor, wanted: sections.HeadSection | None, whose: str
) -> tuple[ValueSpec, Tensor, Tensor]:
    if len(weight) == 2:  # wrong, right: the probability of right is the sigmoid of the logits' difference
        return ValueSpec(head=sections.HeadSection(type="bernoulli")), weight[1:] - weight[:1], bias[1:] - bias[:1]
    if len(weight) != 1:
        raise RecipeError(f"{whose} puts out {len(weight)} numbers a token; a process model has 1 or 2")
    one_output = wanted is not None and wanted.type in ("scalar", "bernoulli")
    return ValueSpec(head=wanted if one_output and wanted is not None else sections.HeadSection()), weight, bias


def _assembled(model: Any, spec: ValueSpec, weight: Tensor, bias: Tensor, whose: str) -> ValueModel:
    text = model.config.get_text_config()
    head = Head(spec.head, text.hidden_size, text.vocab_size, spec.members)
    if head.linear.weight.shape != weight.shape:
        raise RecipeError(
            f"{whose} has a head of {len(weight)} outputs, and its entry `posttrain` in config.json speaks of "
            f"{len(head.linear.weight)}"
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
    """A value model as a Hugging Face checkpoint, adapters merged.

    Args:
        model: not wrapped by Accelerate.
        tokenizer: of the tokens that it reads.
        folder: made where it is missing.
        dtype: of the weights on disk; in float32, and without adapters, values after loading are equal to the bit.
        step: optimiser steps it was trained for.
    """
    spec = dataclasses.replace(model.spec, step=step)
    config = copy.deepcopy(
        model.language_model.base.config if isinstance(model, ImplicitValue) else model.decoder.config
    )
    config.update({"posttrain": TypeAdapter(ValueSpec).dump_python(spec, mode="json"), "use_cache": True})
    if spec.head.type == "per_token":
        config.tie_word_embeddings = False
        if hasattr(config, "final_logit_softcapping"):
            config.final_logit_softcapping = None  # Q has no cap
    if spec.head.type not in ("per_token", "implicit"):
        config.update({"num_labels": len(model.head.linear.weight), "classifier_dropout": 0.0})
        config.update({"token_classification_bias": True})
    kind: Any = AutoModelForCausalLM if spec.head.type in ("per_token", "implicit") else AutoModelForTokenClassification
    with torch.device("meta"):  # names and configuration alone: the weights are those at hand
        shell = kind.from_config(config, dtype=dtype)
    state = _saved_weights(model, shell)
    if state.keys() != dict(shell.named_parameters()).keys():
        raise RuntimeError(f"the saved model would differ in {sorted(state.keys() ^ dict(shell.named_parameters()))}")
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    shell.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _saved_weights(model: ValueModel, shell: Any) -> dict[str, Tensor]:
    """The weights under their names in the Hugging Face model that is saved, adapters merged."""
    if isinstance(model, ImplicitValue):
        return dict(model.language_model.weights())
    layer = shell.get_output_embeddings() if model.spec.head.type == "per_token" else _classifier(shell)
    layer_name = next(name for name, module in shell.named_modules() if module is layer)
    decoder = merged(model.decoder, model.adapter) if model.adapter else model.decoder.named_parameters()
    state: dict[str, Tensor] = {f"{shell.base_model_prefix}.{name}": tensor for name, tensor in decoder}
    return state | {f"{layer_name}.{name}": tensor for name, tensor in model.head.linear.named_parameters()}
