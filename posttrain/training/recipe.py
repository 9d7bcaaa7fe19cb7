"""The recipe of a training run: a frozen dataclass of parts (callables) and plain settings, and what contradicts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, InstanceOf, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from posttrain.decoding.checks import decoder_conflicts
from posttrain.option_types import Breadth, Inner, PositiveCount, RowCount
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
    "combine": "posttrain.parts.combining",
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


@checked_dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class Recipe(Checked):
    """Everything that defines a training run. ``docs/slots.md`` lists the slots with their signatures and parts.

    Raises:
        RecipeConflict: if settings contradict each other.
    """

    modules: ClassVar[Mapping[str, str]] = MODULES

    policy: sections.PolicySection
    reference: sections.ReferenceSection = field(default_factory=sections.ReferenceSection)
    opponent: sections.OpponentSection | None = None
    """A second policy that samples, if ``rollout`` asks for it."""
    value: sections.ValueSection | None = None
    """The value model. Default: one with a scalar head if some part reads or trains values."""
    data: sections.DataSection
    examples: InstanceOf[Part] | None = None
    """Completions from the dataset, instead of sampling."""

    # The slots, in the order in which a step uses them
    prompts: InstanceOf[Part] = _default("posttrain.data.samplers.uniform")
    rollout: InstanceOf[Part] = _default("posttrain.rollout.rollouts.single_turn")
    decoder: InstanceOf[Part] | None = None
    """Samples the rollouts in place of the policy alone."""
    verify: tuple[InstanceOf[Part], ...] = ()
    select: tuple[InstanceOf[Part], ...] = ()
    reward: tuple[InstanceOf[Part], ...] = ()
    combine: InstanceOf[Part] = _default("posttrain.parts.combining.weighted_sum")
    """Makes one reward of the verifiers' values and the rewards of whole completions."""
    compare: InstanceOf[Part] | None = None
    """Replaces the reward: how completions do in comparison."""
    advantage: InstanceOf[Part] | None = None
    shape: tuple[InstanceOf[Part], ...] = ()
    keep: tuple[InstanceOf[Part], ...] = ()
    baseline: InstanceOf[Part] | None = None
    regroup: InstanceOf[Part] | None = None
    normaliser: InstanceOf[Part] = _default("posttrain.parts.normalisers.token_mean")
    loss: tuple[InstanceOf[Part], ...] = ()
    """Terms of the policy's loss. Empty: the policy is not trained."""
    target: InstanceOf[Part] | None = None
    value_loss: tuple[InstanceOf[Part], ...] = ()

    sampling: sections.SamplingSection = field(default_factory=sections.SamplingSection)
    engine: sections.EngineSection = field(default_factory=sections.EngineSection)
    optimizer: sections.OptimizerSection = field(default_factory=sections.OptimizerSection)
    evaluate: sections.EvaluationSection | None = None
    run: sections.RunSection = field(default_factory=sections.RunSection)

    steps: PositiveCount = 100
    """Number of optimiser steps on new batches."""
    prompts_per_step: RowCount = 32
    """Number of prompts a step, over all processes."""
    completions: Breadth = 8
    """Number of completions of a prompt."""
    epochs: PositiveCount = 1
    """Number of passes over a batch."""
    minibatches: PositiveCount = 1
    """Number of optimiser steps a pass."""
    micro_batch_tokens: PositiveCount = 16384
    """Most padded tokens in one forward pass."""
    extragradient: bool = False
    """Every other step only looks ahead; the next one samples there and counts."""
    max_refills: PositiveCount = 10
    """Most rounds of generation in which ``select`` may find enough prompts."""
    short_steps: Literal["warn", "error"] = "warn"
    """Action if ``select`` keeps too few prompts all the same."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything that is drawn; below 2^32, which is NumPy's limit."""

    name: str = "recipe"
    path: Path | None = None  # of the YAML file, if it came from one

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Settings that contradict each other, with their places."""
        return _conflicts(self)

    @property
    def others_write(self) -> bool:
        """True if some of a prompt's completions are not the policy's own: an opponent's, or those of the dataset."""
        return bool(self.rollout.fact("others_write"))

    @property
    def changes_scores(self) -> bool:
        """True if rewards are not the verifiers' scores alone, so that they are known only after ``select``."""
        return bool(self.reward) or self.compare is not None or not self.combine.fact("keeps_scores")

    @property
    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain data, defaults included: it is saved with the run and loads as a recipe again."""
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
    """Reads a training recipe from a YAML file, with ``--key.path=value`` overrides.

    Raises:
        RecipeError: one line for each problem in file, base and overrides, with its place and a suggestion.
    """
    return load_as(Recipe, path, overrides)


SETTINGS_AND_SLOTS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in ("name", "path"))
"""Names of all keys that a YAML recipe may have at the top."""


def _plain_part(part: Part, slot: str, mark: Inner | None = None) -> dict[str, Any]:
    module, settings = (mark.module, ()) if mark else (MODULES[slot], SLOTS[slot].settings)
    name = getattr(part.target, "__name__", part.name)
    bare = getattr(sys.modules.get(module), name, None) is part.target
    # A verifier's parameters without a given option are columns of the dataset, whatever their defaults.
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
    """Plain data of an option that is a part, a list of parts, or a function (a default in the signature)."""
    if isinstance(value, list | tuple):
        return [_plain_inner(each, name, mark) for each in value]
    return _plain_part(value if isinstance(value, Part) else Part.of(value), name, mark)


def _conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    yield from _sampling_conflicts(recipe)
    yield from _group_conflicts(recipe)
    yield from _loss_conflicts(recipe)
    yield from _value_conflicts(recipe)
    yield from _evaluation_conflicts(recipe)
    yield from _reference_conflicts(recipe)
    yield from _opponent_conflicts(recipe)
    yield from _extragradient_conflicts(recipe)
    if recipe.decoder is not None:
        yield from decoder_conflicts(recipe.decoder, recipe.sampling, recipe.engine)
        if recipe.examples is not None:
            yield ("decoder",), "is for sampled completions, but this recipe takes its completions from `examples`"


def _sampling_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    full = sections.SamplingSection()
    for name in ("top_p", "top_k", "min_p"):
        value, neutral = getattr(recipe.sampling, name), getattr(full, name)
        if value != neutral:
            yield (
                ("sampling", name),
                f"{value} cuts the distribution that is sampled from. The trainer's full softmax is then not the "
                f"distribution that the tokens came from, and the policy gradient is biased. Leave it at {neutral} for "
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


def _group_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Parts that compare the completions of a prompt, where a prompt has only one."""
    if recipe.completions > 1 or recipe.others_write:
        return
    slots: list[tuple[Location, Part | None]] = [
        (("advantage",), recipe.advantage),
        (("compare",), recipe.compare),
        (("combine",), recipe.combine),
    ]
    names = ("shape", "select", *(() if recipe.examples is not None else ("loss",)))
    slots += [((name, i), part) for name in names for i, part in enumerate(getattr(recipe, name))]
    for place, part in slots:
        if part is not None and part.fact("compares_group"):
            yield (
                place,
                f"{part.name} compares the completions of a prompt with each other, and `completions: 1` leaves "
                "nothing to compare: no prompt would teach anything",
            )


def _loss_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    rows = recipe.prompts_per_step * recipe.completions
    if recipe.minibatches > rows:
        yield ("minibatches",), f"{recipe.minibatches} optimiser steps a pass, but a step has {rows} completions"
    if not recipe.loss and not recipe.value_loss:
        yield ("loss",), "is empty, and so is `value_loss`: there is nothing to minimise"
    needs_advantage = not any(term.fact("learns_without_advantage") for term in recipe.loss)
    if recipe.loss and recipe.advantage is None and recipe.examples is None and needs_advantage:
        yield (), "the section 'advantage' is missing"
    if not (recipe.verify or recipe.reward or recipe.compare) and recipe.examples is None:
        yield ("verify",), "is empty and so is `reward`: nothing says which completions are good"
    needs_mismatched = recipe.baseline is not None and recipe.baseline.fact("needs_mismatched")
    if needs_mismatched and not (recipe.examples is not None and recipe.examples.fact("gives_mismatched")):
        yield ("baseline",), "needs completions of other prompts: `examples: {use: rated, mismatched: true}`"


def _value_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    value = recipe.value or sections.ValueSection()
    if recipe.value_loss and recipe.target is None:
        yield ("value_loss",), "needs a `target` to learn, such as `target: {use: lambda_return}`"
    if recipe.target is not None and not recipe.value_loss:
        yield ("target",), "is learned by nothing: add `value_loss: [{use: mse}]`, or leave `target` out"
    if value.branches is not None and (recipe.value_loss or value != sections.ValueSection(branches=value.branches)):
        yield ("value", "branches"), "replace the value model: leave its settings and `value_loss` out"
    if value.frozen and recipe.value_loss:
        yield ("value", "frozen"), "keeps the value model as it is, but there is a `value_loss` to train it"
    if value.frozen and value.model is None:
        yield ("value", "frozen"), "a head that was never trained is of no use: name a trained `value.model`"
    if value.share and recipe.policy.lora is None:
        yield (
            ("value", "share"),
            "puts the value model's adapter on the policy's frozen weights, so `policy.lora` must be set",
        )
    if value.share and value.model is not None:
        yield ("value", "model"), "with `share` the backbone is the policy's; leave one of them out"
    if value.head is not None and value.head.low >= value.head.high:
        yield ("value", "head", "low"), f"{value.head.low} is not below `high: {value.head.high}`"
    if value.head is not None and value.head.type == "implicit":
        if value.members > 1:
            yield ("value", "members"), "an implicit value comes from one language model, which has no members"
        if value.normalise:
            yield ("value", "normalise"), "an implicit value is a log-ratio, which has no other scale"
    if value.ready_at is not None and not (recipe.value_loss and recipe.loss):
        yield ("value", "ready_at"), "makes the policy wait for the value model: both must be trained"


def _evaluation_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    evaluate = recipe.evaluate
    if evaluate is None:
        return
    if evaluate.data is None and evaluate.examples is None:
        yield ("evaluate",), "says nothing to measure on: give `data` (prompts to verify) or `examples`"
    if evaluate.examples is not None and recipe.examples is None:
        yield ("evaluate", "examples"), "are read by the recipe's `examples` part, and there is none: give `data`"
    if evaluate.guided and recipe.decoder is None:
        yield ("evaluate", "guided"), "needs a `decoder`, and there is none: the policy alone completes the prompts"
    if evaluate.completions > 1 and evaluate.sampling.temperature == 0:
        yield (
            ("evaluate", "completions"),
            f"{evaluate.completions} completions of a prompt at temperature 0 are all equal; set "
            "`evaluate.sampling.temperature`, or `completions: 1`",
        )


AVERAGED = "averages of adapters' factors are not averages of their products, so not of the policies' weights"


def _reference_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    moving, lora = recipe.reference.every is not None, recipe.policy.lora is not None
    if moving and lora and recipe.reference.rate < 1:
        yield ("reference", "rate"), f"{AVERAGED}: set `rate: 1`, or leave `policy.lora` out"
    if moving and lora and recipe.reference.model is not None:
        yield ("reference", "model"), "moves by taking over the policy's adapters, which belong to `policy.model`"
    if not moving and recipe.reference.rate != sections.ReferenceSection().rate:
        yield ("reference", "rate"), "the reference never moves: say after how many steps with `reference.every`"


def _opponent_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    plays = recipe.rollout.fact("plays_opponent")
    if plays and recipe.opponent is None:
        yield (
            ("rollout",),
            "asks for completions of an opponent: say which policy it is, such as `opponent: {share: 0.125}`",
        )
    if recipe.opponent is not None and not plays:
        yield ("opponent",), "samples nothing unless `rollout` asks for it: `rollout: {use: against}`"
    if recipe.opponent is not None and recipe.opponent.average is not None and recipe.policy.lora is not None:
        yield ("opponent", "average"), f"{AVERAGED}: leave `policy.lora` out"


def _extragradient_conflicts(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    if recipe.extragradient and recipe.steps % 2:
        yield ("steps",), f"come in pairs with `extragradient`, and {recipe.steps} is odd"
    if recipe.extragradient and (recipe.examples is not None or not recipe.loss or recipe.value_loss):
        yield ("extragradient",), "works on the policy's own samples: it needs a `loss`, no `examples`, no `value_loss`"
