"""Writes `docs/slots.md`, the list of all slots and parts, from the code: ``python scripts/slots.py [--check]``.

Signatures, parts, options and descriptions come from the slots' modules. Only the sentence about each slot is written
here. ``--check`` writes nothing and exits with 1 if the file is out of date; ``tests/test_docs.py`` runs it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from generated import write_or_check

from posttrain.recipe.part import SLOTS
from posttrain.recipe.resolve import inner_slots, parameters, positional, public_callables
from posttrain.training.recipe import MODULES

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "slots.md"
MODELS = "reward_models"
Part = Callable[..., Any]

WHAT_SLOTS_DO = {
    "examples": "Reads completions from a dataset. A recipe with `examples` does not sample, so it uses neither "
    "`rollout` nor `decoder`; `prompts` still orders the rows.",
    "prompts": "Chooses the order in which prompts (or examples) come.",
    "rollout": "Turns prompts into completions with the engine, and completions into a `Batch`.",
    "decoder": "Wraps the engine: completions are drawn from a guided distribution instead of the policy's own.",
    "verify": "Scores one completion. Columns of the dataset arrive by name; `None` means that the verifier does not "
    "apply. The score is the weighted sum of the verifiers that apply.",
    "select": "Says which completions to keep. The loop draws more prompts until enough are kept.",
    "reward": "Adds to the reward, for a completion (`[N]`) or for each token (`[N, L]`).",
    "combine": "Makes one reward of the verifiers' values and the rewards of whole completions.",
    "compare": "Replaces the reward by one that comes from comparing the completions of a prompt.",
    "advantage": "Turns rewards into the advantage of each token.",
    "shape": "Changes the advantages, such as by scaling them.",
    "keep": "Says which completions stay in the batch, after the advantages are known.",
    "baseline": "Gives the number that the score of a preference loss is measured against.",
    "regroup": "Puts completions into other groups, such as other pairs.",
    "normaliser": "Gives each token its share of the loss.",
    "loss": "Gives the loss of each token of the policy; entries are added, each with a `coef`, `weights` and a "
    "`normaliser` of its own.",
    "weights": "Gives factors without gradient for one entry of `loss` or `value_loss`.",
    "target": "Gives what the value model should predict at each state; NaN where there is nothing to learn.",
    "value_loss": "Gives the loss of the value model at each state that has a target.",
}
"""One sentence or two for each slot of a training recipe."""

WHAT_OPTIONS_DO = {
    "score(outputs, batch)": "How much the policy likes a completion.",
    "link(margin, target)": "The loss of a pair, from the margin of its scores and its target.",
    "link(score, label)": "The loss of a single completion, from its score and its label.",
    "link(score, log_target, valid)": "The loss of a list, from its scores and its target distribution.",
    "target(pairs)": "What the link compares the margin with; mostly the probability that the chosen completion wins.",
    "target(label, valid)": "The target distribution over a list, as log-probabilities.",
    "margin(pairs)": "What the scaled scores of a pair must differ by before it counts as won; several are added.",
    "pair_weight(pairs)": "A factor of the pair's loss, without gradient; several are multiplied.",
    "score(context)": "How good a prefix is. Value models, language models, reward models and paths can be scores.",
    "pick(families, choose)": "Which particles survive a round.",
    "final(particles, choose, decode)": "Which particle is the answer.",
    "answer(text)": "The answer that a completion gives, for votes.",
    "population(engine, context)": "The population of particles whose target distribution is sampled exactly.",
    "proposal(engine, context)": "The decoder that particles grow by.",
    "propose(engine, prefixes, sampling, seeds)": "The steps that a search tries from a node.",
    "select(tree)": "Which nodes are expanded next.",
    "backup(leaf)": "What a simulation changes along its path.",
    "decide(tree)": "Which node is the answer.",
    "act(tree)": "Which move is made after the simulations of one move.",
    "key(node)": "The number that nodes are ordered by.",
    "reward(context)": "The reward of a finished completion.",
    "tilt(context)": "The score that weights the rollouts of another policy.",
    "process(context)": "The reward of one step.",
    "of(context)": "The score inside.",
    "terms(context)": "The scores that are combined.",
    "of(batch)": "A reward model that reads texts.",
    "of(completion)": "A verifier of the completion so far; columns of the dataset are options here.",
}
"""One sentence for each option that is a part itself, by its name and by what is passed to it."""

GIVES = {"baseline": "Float", "regroup": "Int", "select(tree)": "list", "decide(tree)": "Node", "act(tree)": "Node"}
"""The beginning of the return type, where slots that pass the same arguments share a module."""


class Place(NamedTuple):
    """A place for parts: a slot of a recipe, or an option of a part."""

    name: str
    module: str
    takes: tuple[str, ...] | None

    @property
    def key(self) -> str:
        """``link(margin, target)``: what an option is listed under."""
        return f"{self.name}({', '.join(self.takes or ())})"


def document() -> str:
    """The whole page."""
    page = Page()
    lines = INTRODUCTION.splitlines()
    for name in SLOTS:
        lines += ["", *page.slot(name)]
    lines += ["", "## Options that are parts", "", OPTIONS]
    while page.waiting:
        lines += ["", *page.option(page.waiting.pop(0))]
    described = WHAT_SLOTS_DO.keys() | WHAT_OPTIONS_DO.keys()
    if wrong := described ^ (SLOTS.keys() | page.options.keys()):
        raise SystemExit(f"scripts/slots.py: sentences are missing, or not needed any more, for {sorted(wrong)}")
    return "\n".join(lines) + "\n"


INTRODUCTION = """\
# Slots and parts

This page is generated from the code by `python scripts/slots.py`. Do not edit it.

A recipe has slots, and a slot holds parts, written `{use: name, option: value}`. A part is a function (or a class whose
objects are called) that takes what the slot passes. All its other parameters are options. Write your own part in a file
beside the recipe and name it `use: my_file.py:my_part`, or install it and name it `use: package.module.name`.

`N` is the number of completions in the batch, `L` the number of token columns, `P` of pairs, `G` of groups, `K` of
completions in a group. Column `t` of a tensor belongs to token `t` (see `posttrain/batch.py`).

`posttrain show RECIPE` prints the parts of a recipe with their equations and papers.

## Slots

They are listed in the order in which a step uses them."""

OPTIONS = """\
Some options of parts are parts themselves, written in the same way: `loss: [{use: pairwise, link: {use: hinge}}]`."""


class Page:
    """Writes sections, and remembers which parts are listed already and which options still need a section."""

    def __init__(self) -> None:
        self.options: dict[str, list[str]] = {}  # parts that have an option, by the option's key
        self.waiting: list[Place] = []  # options that have no section yet
        self.sections: dict[tuple[str, ...], str] = {}  # where the parts of a module that fit a place are listed

    def slot(self, name: str) -> Iterator[str]:
        """The section of a slot."""
        slot = SLOTS[name]
        place = Place(name, MODULES[name], slot.takes)
        facts = [f"`{signature(place)}`"]
        facts += ["the slot holds a list"] if slot.several else []
        facts += [f"an entry may also have {', '.join(f'`{s}`' for s in slot.settings)}"] if slot.settings else []
        yield from (f"### `{name}`", "", WHAT_SLOTS_DO[name], "", f"{'; '.join(facts)}.", "")
        yield from self.parts(place, f"the slot `{name}`")
        if name in ("reward", "compare"):
            yield from ("", f"From the package `{MODELS}`; models are loaded when they are first needed:", "")
            for part in reward_models(comparing=name == "compare"):
                yield from self.entry(f"{MODELS}.{part.__name__}", part, place)

    def option(self, place: Place) -> Iterator[str]:
        """The section of an option that is a part."""
        owners = ", ".join(self.options[place.key])
        yield from (f"### `{place.name}` of {owners}", "", WHAT_OPTIONS_DO.get(place.key, ""), "")
        yield from (f"`{signature(place)}`.", "")
        yield from self.parts(place, f"`{place.name}` of {owners}")

    def parts(self, place: Place, title: str) -> Iterator[str]:
        """A line for each part that fits, or a pointer to where they are listed already."""
        found = shipped(place)
        names = tuple(f"{place.module}.{name}" for name in found)
        if names in self.sections:
            yield f"The parts are those of {self.sections[names]}."
            return
        self.sections[names] = title
        yield from (f"Bare names come from `{place.module}`:", "")
        for name, part in found.items():
            yield from self.entry(name, part, place)

    def entry(self, name: str, part: Part, place: Place) -> Iterator[str]:
        """The line of a part; its options that are parts get sections later."""
        yield f"- `{name}{options(part, place)}`: {sentence(part)}"
        for option, inner in inner_slots(part).items():
            option = {"final_score": "score"}.get(option, option)
            inside = Place(option, inner.module, tuple(inner.takes))
            if inside.key not in self.options:
                self.waiting.append(inside)
            owners = self.options.setdefault(inside.key, [])
            owners += [f"`{name}`"] if f"`{name}`" not in owners else []


def shipped(place: Place) -> dict[str, Part]:
    """The parts of a place's module that fit the place, by name, in the order of the module."""
    module = importlib.import_module(place.module)
    parts = {name: getattr(module, name) for name in public_callables(module)}
    return {name: part for name, part in parts.items() if fits(part, place)}


def reward_models(comparing: bool) -> list[Part]:
    """The reward models that compare completions with each other, or the others."""
    module = importlib.import_module(MODELS)
    parts = {name: getattr(module, name) for name in public_callables(module)}
    return [part for part in parts.values() if ("against" in parameters(part)) == comparing]


def fits(part: Part, place: Place) -> bool:
    """True if a part is called with what the place passes, and returns what the place needs."""
    if place.takes is None:  # a verifier: any function of a completion
        return not isinstance(part, type)
    if not place.takes:  # a prompt sampler, built by name
        return {"size", "seed"} <= parameters(part).keys()
    if place.module == MODELS:  # as an option, a reward model reads texts
        return hasattr(part, "of_texts")
    asks = positional(called(part)) if not isinstance(part, type) else positional(called(part))[1:]
    starts = GIVES.get(place.name if place.name in SLOTS and place.module == MODULES[place.name] else place.key, "")
    return tuple(asks) == place.takes and returned(part).startswith(starts)


def called(part: Part) -> Part:
    """The function that a slot calls: of a class, the one that its objects are called by."""
    return part.__call__ if isinstance(part, type) else part


def returned(part: Part) -> str:
    """The return annotation as it is written."""
    annotation = inspect.signature(called(part)).return_annotation
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def signature(place: Place) -> str:
    """``(Outputs, Batch) -> [N, L]``: the types of what the shipped parts take and return."""
    if place.takes is None:
        return "(completion, *, <columns by name>, <options>) -> float | None"
    if not place.takes:
        return "(*, size, seed, <options>) -> PromptSampler"
    parts = shipped(place).values()
    kinds = [inspect.signature(called(part)).parameters for part in parts]
    takes = [usual(short(str(kind[name].annotation)) for kind in kinds if name in kind) for name in place.takes]
    gives = dict.fromkeys(short(returned(part)) for part in parts)
    if gives.keys() & {"[N]", "[N, L]"}:
        gives.pop("Tensor", None)
    return f"({', '.join(takes)}) -> {' or '.join(gives)}"


def usual(annotations: Iterable[str]) -> str:
    """The annotation that most parts have."""
    return Counter(annotations).most_common(1)[0][0]


def short(annotation: str) -> str:
    """An annotation for readers: ``Float[Tensor, "N L"]`` is ``[N, L]``."""
    found = re.fullmatch(r"(Float|Int|Bool)\[Tensor, [\"'](.*)[\"']\]", annotation)
    if not found:
        return annotation.rsplit(".", 1)[-1] if re.fullmatch(r"[\w.]+", annotation) else annotation
    kind = "" if found[1] == "Float" else found[1]
    return f"{kind}[{', '.join(found[2].split())}]"


def options(part: Part, place: Place) -> str:
    """``(low=0.2, high=0.2)``: the options with their defaults; those without a default by name."""
    passed = {*(place.takes or ()), "size", "seed"} if not isinstance(part, type) else {"size", "seed"}
    passed |= set(list(parameters(part))[:1]) if place.takes is None else set()
    shown = []
    for name, parameter in parameters(part).items():
        if name in passed or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        shown.append(name if parameter.default is parameter.empty else f"{name}={value(parameter.default)}")
    return f"({', '.join(shown)})" if shown else ""


def value(default: Any) -> str:
    """A default as a reader writes it."""
    text = str(getattr(default, "__name__", None) or repr(default))
    return text if len(text) <= 40 and "\n" not in text and " at 0x" not in text else "..."


def sentence(part: Part) -> str:
    """The first sentence of the docstring, as Markdown."""
    first = " ".join((inspect.getdoc(part) or "").split("\n\n")[0].split())
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z])", first)[0]
    first = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", first).replace("``", "`")
    return first.rstrip(":")


if __name__ == "__main__":
    sys.exit(write_or_check(FILE, document()))
