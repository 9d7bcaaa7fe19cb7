"""Parts and slots: everything in a recipe besides plain settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from posttrain.errors import RecipeError
from posttrain.option_types import Share, fact
from posttrain.recipe.resolve import default_options, required
from posttrain.recipe.validation import Problems
from posttrain.recipe.yaml_reader import Location, dotted


class Slot(NamedTuple):
    """A place for parts in a recipe, with the arguments that parts are called with there."""

    takes: tuple[str, ...] | None  # arguments passed by position; None: the completion, and columns by name
    settings: tuple[str, ...] = ()  # fields of Part that an entry may set beside the options
    by_name: tuple[str, ...] = ()  # arguments passed by name
    several: bool = False  # the slot holds a list; one part alone may be written without the brackets


SLOTS: Mapping[str, Slot] = {
    "examples": Slot(("data", "tokenizer", "base")),
    "prompts": Slot((), by_name=("size", "seed")),
    "rollout": Slot(("engine", "prompts", "n", "context")),
    "decoder": Slot(("engine", "context")),
    "verify": Slot(None, ("weight", "time_limit", "on_error", "special_tokens"), several=True),
    "select": Slot(("batch",), several=True),
    "reward": Slot(("batch",), ("weight",), several=True),
    "combine": Slot(("batch",)),
    "compare": Slot(("batch",)),
    "advantage": Slot(("batch",)),
    "shape": Slot(("advantage", "batch"), several=True),
    "keep": Slot(("batch",), several=True),
    "baseline": Slot(("batch",)),
    "regroup": Slot(("batch",)),
    "normaliser": Slot(("batch",)),
    "loss": Slot(("outputs", "batch"), ("coef", "weights", "normaliser"), several=True),
    "weights": Slot(("outputs", "batch")),  # of an entry of `loss`
    "target": Slot(("batch",)),
    "value_loss": Slot(("outputs", "batch"), ("coef", "weights"), several=True),
}
"""All slots by name, in the order in which a step uses them. A kind of recipe says in ``modules`` which it has."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A callable in a slot, with the name it came from and the numbers that belong to the slot.

    ``call`` has its hyper-parameters bound. A part with memory is an object with a ``state`` dict, which checkpoints
    keep under the slot's path.
    """

    call: Callable[..., Any]
    name: str  # name as the recipe writes it
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: Share = 1.0  # weight of a verifier or reward in the sum
    coef: Share = 1.0  # coefficient of a loss term
    weights: tuple[Part, ...] = ()  # factors of a loss term, detached
    normaliser: Part | None = None  # normaliser of a loss term, in place of the recipe's
    time_limit: Annotated[float, Field(gt=0)] = 10.0  # seconds a completion for a verifier
    on_error: Literal["stop", "skip"] = "stop"  # what happens if a verifier raises an error
    special_tokens: bool = True  # a verifier reads the special tokens that the model wrote
    spec: str = ""  # file.py:name or package.module.name, which other processes resolve again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @classmethod
    def of(cls, target: Callable[..., Any], /, *, settings: Mapping[str, Any] | None = None, **options: Any) -> Part:
        """Makes a part of a function or class with options: ``Part.of(clip, low=0.2, high=0.28)``.

        A class is instantiated, unless its constructor asks for more than options; a function has them bound.

        Args:
            settings: fields of the part itself, such as ``{"coef": 0.1}``.
        """
        if isinstance(target, type) and set(required(target)) <= options.keys():
            call = target(**options)
        else:
            call = functools.partial(target, **options)
        name = getattr(target, "__name__", type(target).__name__)
        importable = "<" not in getattr(target, "__qualname__", "<")  # not a lambda, not inside a function
        spec = f"{target.__module__}.{name}" if importable and target.__module__ != "__main__" else ""
        return cls(**{"call": call, "name": name, "options": options, "spec": spec, **(settings or {})})

    def __str__(self) -> str:
        options = ", ".join(f"{name}={_short(value)}" for name, value in self.options.items())
        return f"{self.name}({options})" if options else self.name

    @property
    def target(self) -> Callable[..., Any]:
        """The function or class itself."""
        if isinstance(self.call, functools.partial):
            return self.call.func
        return self.call if hasattr(self.call, "__name__") else type(self.call)

    def fact(self, name: str) -> Any:
        """Reads a fact that the part carries: a field of :class:`posttrain.option_types.Facts`."""
        return fact(self.target, name, self.every_option)

    @property
    def every_option(self) -> dict[str, Any]:
        """The options, defaults included."""
        return default_options(self.target) | dict(self.options)


def _short(value: Any) -> str:
    text = "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
    return text.replace("\n", "\\n")


class RecipeConflict(RecipeError):
    """Error for settings that are right one by one and wrong together."""

    def __init__(self, conflicts: Problems) -> None:
        self.conflicts = conflicts
        super().__init__(f"{dotted(location)}: {message}" for location, message in conflicts)


class Checked:
    """Base of all kinds of recipes: slots, and settings that are checked together.

    Raises:
        RecipeConflict: if it is built from settings that do not go together.
    """

    modules: ClassVar[Mapping[str, str]] = {}
    """Slots of this kind of recipe, with the module in which each looks bare names up."""

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Yields the location of each setting that does not go with another one, and the reason."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        if conflicts := list(self.conflicts()):
            raise RecipeConflict(conflicts)
