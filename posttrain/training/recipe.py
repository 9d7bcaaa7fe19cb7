"""A recipe: what a run is made of, as a frozen dataclass of callables and plain settings."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, InstanceOf, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from posttrain.decoding.checks import decoder_conflicts
from posttrain.option_types import Inner, PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import SLOTS, Checked, Part
from posttrain.recipe.resolve import inner_slots, resolve
from posttrain.recipe.yaml_reader import Location, Overrides

MODULES: Mapping[str, str] = {
    "examples": "posttrain.data.examples",
    "prompts": "posttrain.data.samplers",
    "rollout": "posttrain.rollout.rollouts",
    "decoder": "posttrain.decoding.decoders",
    "verify": "posttrain.verify.functions",
    "select": "posttrain.parts.selection",
    "reward": "posttrain.parts.rewards",
    "compare": "posttrain.parts.preference.games",
    "advantage": "posttrain.parts.advantages",
    "shape": "posttrain.parts.advantages",
    "keep": "posttrain.parts.selection",
    "baseline": "posttrain.parts.preference.baselines",
    "regroup": "posttrain.parts.preference.baselines",
    "normaliser": "posttrain.parts.normalisers",
    "loss": "posttrain.parts.losses",
    "weights": "posttrain.parts.weighting",
    "target": "posttrain.parts.targets",
    "value_loss": "posttrain.parts.value_losses",
}
"""Where each slot of a training recipe looks bare names up."""


def _default(spec: str) -> Any:
    return field(default_factory=lambda: Part.of(resolve(spec)))


@checked_dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Recipe(Checked):
    """All of a run. Slots: see ``posttrain show`` for each slot's signature.

    Raises:
        RecipeConflict: when built from settings that do not go together.
    """

    modules: ClassVar[Mapping[str, str]] = MODULES

    policy: sections.PolicySection
    reference: sections.ReferenceSection = field(default_factory=sections.ReferenceSection)
    opponent: sections.OpponentSection | None = None  # who writes some of the completions, where `rollout` asks for it
    value: sections.ValueSection | None = None  # default: a recipe whose parts read or train values gets one
    data: sections.DataSection
    examples: InstanceOf[Part] | None = None  # given completions to learn from, instead of sampling

    # The slots, in the order in which a step uses them
    prompts: InstanceOf[Part] = _default("posttrain.data.samplers.uniform")
    rollout: InstanceOf[Part] = _default("posttrain.rollout.rollouts.single_turn")
    decoder: InstanceOf[Part] | None = None  # what rollouts are sampled from, in place of the policy itself
    verify: tuple[InstanceOf[Part], ...] = ()
    select: tuple[InstanceOf[Part], ...] = ()
    reward: tuple[InstanceOf[Part], ...] = ()
    compare: InstanceOf[Part] | None = None  # what becomes the reward in its place: how completions do in comparison
    advantage: InstanceOf[Part] | None = None
    shape: tuple[InstanceOf[Part], ...] = ()
    keep: tuple[InstanceOf[Part], ...] = ()
    baseline: InstanceOf[Part] | None = None
    regroup: InstanceOf[Part] | None = None
    normaliser: InstanceOf[Part] = _default("posttrain.parts.normalisers.token_mean")
    loss: tuple[InstanceOf[Part], ...] = ()  # none: the policy stays as it is
    target: InstanceOf[Part] | None = None
    value_loss: tuple[InstanceOf[Part], ...] = ()

    sampling: sections.SamplingSection = field(default_factory=sections.SamplingSection)
    engine: sections.EngineSection = field(default_factory=sections.EngineSection)
    optimizer: sections.OptimizerSection = field(default_factory=sections.OptimizerSection)
    evaluate: sections.EvaluationSection | None = None
    run: sections.RunSection = field(default_factory=sections.RunSection)

    steps: PositiveCount = 100
    prompts_per_step: PositiveCount = 32  # over all processes
    completions: PositiveCount = 8  # a prompt
    epochs: PositiveCount = 1  # passes over a batch
    minibatches: PositiveCount = 1  # optimiser steps a pass
    micro_batch_tokens: PositiveCount = 16384  # padded tokens in one forward pass
    extragradient: bool = False  # every other step only looks ahead: the next one samples there and goes on from before
    max_refills: PositiveCount = 10  # rounds of generation in which `select` may find enough prompts
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # NumPy's limit, in vLLM

    name: str = "recipe"
    path: Path | None = None  # of the YAML file, if it came from one

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """What is wrong with the recipe as a whole."""
        return _conflicts(self)

    @property
    def others_write(self) -> bool:
        """Whether some of a prompt's completions are not the policy's: an opponent's, or given ones."""
        return bool({"opponents", "given"} & self.rollout.every_option.keys())

    @property
    def resolved(self) -> dict[str, Any]:
        """Plain data of the whole recipe, defaults included, as saved with the run; loads as a recipe again."""
        plain: dict[str, Any] = {}
        for name in SETTINGS_AND_SLOTS:
            value = getattr(self, name)
            if isinstance(value, Part):
                plain[name] = _plain_part(value, name)
            elif isinstance(value, tuple) and name in MODULES:
                plain[name] = [_plain_part(part, name) for part in value]
            else:
                plain[name] = TypeAdapter(Any).dump_python(value, mode="json")
        return {name: value for name, value in plain.items() if value is not None}


def load_recipe(path: str | Path, overrides: Overrides = ()) -> Recipe:
    """The recipe in a YAML file, with ``--key.path=value`` overrides.

    Raises:
        RecipeError: one line for each problem in file, base and overrides, with its place and a suggestion.
    """
    return load_as(Recipe, path, overrides)


SETTINGS_AND_SLOTS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in ("name", "path"))
"""What a YAML recipe may hold at the top."""


def _plain_part(part: Part, slot: str, mark: Inner | None = None) -> dict[str, Any]:
    module, settings = (mark.module, ()) if mark else (MODULES[slot], SLOTS[slot].settings)
    name = getattr(part.target, "__name__", part.name)
    bare = getattr(sys.modules.get(module), name, None) is part.target
    # A verifier's parameters without a given option are columns of the data set, whatever their defaults.
    chosen = part.options if slot == "verify" else part.every_option
    plain: dict[str, Any] = {"use": name if bare else part.spec or part.name}
    inner = inner_slots(part.target)
    plain |= TypeAdapter(Any).dump_python(
        {name: value for name, value in chosen.items() if name not in inner}, mode="json", fallback=repr
    )
    for name, of_inner in inner.items():
        if chosen.get(name) is not None:
            plain[name] = _plain_inner(chosen[name], name, of_inner)
    for setting in settings:
        value = getattr(part, setting)
        if setting == "weights":
            value = [_plain_part(weight, setting) for weight in value]
        elif isinstance(value, Part):
            value = _plain_part(value, setting)
        if value is not None:
            plain[setting] = value
    return plain


def _plain_inner(value: Any, name: str, mark: Inner) -> Any:
    """An option that is a part, or several, or a function as the signature has it by default."""
    if isinstance(value, list | tuple):
        return [_plain_inner(each, name, mark) for each in value]
    return _plain_part(value if isinstance(value, Part) else Part.of(value), name, mark)


def _conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    yield from _sampling_conflicts(recipe)
    yield from _group_conflicts(recipe)
    rows = recipe.prompts_per_step * recipe.completions
    if recipe.minibatches > rows:
        yield ("minibatches",), f"{recipe.minibatches} optimiser steps a pass, but a step has {rows} completions"
    if not recipe.loss and not recipe.value_loss:
        yield ("loss",), "is empty, and so is `value_loss`: there is nothing to minimise"
    of_labels = any(term.target.__module__.startswith("posttrain.parts.preference.") for term in recipe.loss)
    if recipe.loss and recipe.advantage is None and recipe.examples is None and not of_labels:
        yield (), "the section 'advantage' is missing"
    if not (recipe.verify or recipe.reward or recipe.compare) and recipe.examples is None:
        yield ("verify",), "is empty and so is `reward`: nothing says which completions are good"
    yield from _value_conflicts(recipe)
    yield from _evaluation_conflicts(recipe)
    yield from _player_conflicts(recipe)
    if recipe.decoder is not None:
        yield from decoder_conflicts(recipe.decoder, recipe.sampling, recipe.engine)
        if recipe.examples is not None:
            yield ("decoder",), "is for completions that are sampled, and this recipe's are given by `examples`"
    mismatched = (
        recipe.baseline is not None and recipe.baseline.spec == "posttrain.parts.preference.baselines.mismatched"
    )
    if mismatched and not (recipe.examples is not None and recipe.examples.every_option.get("mismatched")):
        yield ("baseline",), "needs completions of other prompts: `examples: {use: rated, mismatched: true}`"


def _evaluation_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    evaluate = recipe.evaluate
    if evaluate is None:
        return
    if evaluate.data is None and evaluate.examples is None:
        yield ("evaluate",), "says nothing to measure on: give `data` (prompts to verify) or `examples`"
    if evaluate.examples is not None and recipe.examples is None:
        yield ("evaluate", "examples"), "are read by the recipe's `examples` part, and there is none: give `data`"


def _value_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    value = recipe.value or sections.ValueSection()
    if recipe.value_loss and recipe.target is None:
        yield ("value_loss",), "needs a `target` to learn, such as `target: {use: lambda_return}`"
    if recipe.target is not None and not recipe.value_loss:
        yield ("target",), "nothing learns it: add `value_loss: [{use: mse}]`, or leave `target` out"
    if value.branches is not None and (recipe.value_loss or value != sections.ValueSection(branches=value.branches)):
        yield ("value", "branches"), "are in place of a value model: leave its settings and `value_loss` out"
    if value.frozen and recipe.value_loss:
        yield ("value", "frozen"), "the value model is to be used as it is, and yet there is a `value_loss` to train it"
    if value.frozen and value.model is None:
        yield ("value", "frozen"), "a head that was never trained is of no use: name a trained `value.model`"
    if value.share and recipe.policy.lora is None:
        yield ("value", "share"), "adapters are shared out over one copy of frozen weights: set `policy.lora`"
    if value.share and value.model is not None:
        yield ("value", "model"), "with `share` the backbone is the policy's; leave one of them out"
    if value.head is not None and value.head.low >= value.head.high:
        yield ("value", "head", "low"), f"{value.head.low} is not below `high: {value.head.high}`"
    if value.head is not None and value.head.type == "implicit":
        if value.members > 1:
            yield ("value", "members"), "an implicit value is that of one language model, which has no members"
        if value.normalise:
            yield ("value", "normalise"), "an implicit value is a log-ratio, which has no other scale"
    if value.ready_at is not None and not (recipe.value_loss and recipe.loss):
        yield ("value", "ready_at"), "makes the policy wait for the value model: both must be trained"


def _player_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    moving, lora = recipe.reference.every is not None, recipe.policy.lora is not None
    averaged = "averages of adapters' factors are not averages of their products, so not of the policies' weights"
    if moving and lora and recipe.reference.rate < 1:
        yield ("reference", "rate"), f"{averaged}: set `rate: 1`, or leave `policy.lora` out"
    if moving and lora and recipe.reference.model is not None:
        yield ("reference", "model"), "moves by taking over the policy's adapters, which belong to `policy.model`"
    if not moving and recipe.reference.rate != sections.ReferenceSection().rate:
        yield ("reference", "rate"), "the reference never moves: say after how many steps with `reference.every`"
    plays = "opponents" in recipe.rollout.every_option
    if plays and recipe.opponent is None:
        yield ("rollout",), "asks for completions of an opponent: say who that is, such as `opponent: {share: 0.125}`"
    if recipe.opponent is not None:
        if not plays:
            yield ("opponent",), "writes nothing unless `rollout` asks for it: `rollout: {use: against}`"
        if recipe.opponent.average is not None and lora:
            yield ("opponent", "average"), f"{averaged}: leave `policy.lora` out"
    if recipe.extragradient and recipe.steps % 2:
        yield ("steps",), f"come in pairs with `extragradient`, and {recipe.steps} is odd"
    if recipe.extragradient and (recipe.examples is not None or not recipe.loss or recipe.value_loss):
        yield ("extragradient",), "is about the policy's own samples: it needs a `loss`, no `examples`, no `value_loss`"


def _sampling_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    full = sections.SamplingSection()
    for name in ("top_p", "top_k", "min_p"):
        value, neutral = getattr(recipe.sampling, name), getattr(full, name)
        if value != neutral:
            yield (
                ("sampling", name),
                f"{value} cuts the distribution that is sampled from, and the trainer's full softmax is then not the "
                f"distribution the tokens came from: the policy gradient is biased. Leave it at {neutral} for "
                f"training; `evaluate.sampling.{name}` may cut",
            )
    if recipe.sampling.temperature == 0:
        yield (
            ("sampling", "temperature"),
            "0 decodes greedily: all completions of a prompt are equal and nothing can be learned from them; "
            "use 1.0, or `evaluate.sampling.temperature: 0` for evaluation",
        )
    length = recipe.engine.max_model_len
    if length is not None and length <= recipe.sampling.max_tokens:
        yield (
            ("engine", "max_model_len"),
            f"{length} tokens for prompt and completion leave no room for `sampling.max_tokens: "
            f"{recipe.sampling.max_tokens}`",
        )
    if recipe.evaluate and recipe.evaluate.guided and recipe.decoder is None:
        yield ("evaluate", "guided"), "needs a `decoder`: there is none, so the policy completes the prompts by itself"
    if recipe.evaluate and recipe.evaluate.completions > 1 and recipe.evaluate.sampling.temperature == 0:
        yield (
            ("evaluate", "completions"),
            f"{recipe.evaluate.completions} completions a prompt at temperature 0 are all equal; set "
            "`evaluate.sampling.temperature`, or `completions: 1`",
        )


def _group_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    if recipe.completions > 1 or recipe.others_write:
        return
    reason = "compares the completions of a prompt with each other, and `completions: 1` leaves nothing to compare"
    places = [(("advantage",), recipe.advantage), *((("shape", i), part) for i, part in enumerate(recipe.shape))]
    for place, part in places:
        if part is None:
            continue
        values = {name: part.every_option.get(name) for name in ("center", "scale")}
        in_groups = [name for name, value in values.items() if value in ("group", "leave_one_out")]
        if in_groups:
            named = " and ".join(f"`{name}: {values[name]}`" for name in in_groups)
            yield place, f"{part.name} with {named} {reason}; every advantage would be 0"
    for i, part in enumerate(recipe.select):
        if part.spec == "posttrain.parts.selection.mixed_groups":
            yield ("select", i), f"{part.name} {reason}; it would never keep a prompt"
    for i, part in enumerate(recipe.loss if recipe.examples is None else ()):
        if part.spec in ("posttrain.parts.losses.pairwise", "posttrain.parts.losses.listwise"):
            yield ("loss", i), f"{part.name} {reason}; every loss would be 0"
