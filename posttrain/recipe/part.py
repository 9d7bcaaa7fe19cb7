"""Parts and slots: what a recipe is made of besides plain settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from posttrain.errors import RecipeError
from posttrain.recipe.resolve import default_options, required
from posttrain.recipe.validation import Problems
from posttrain.recipe.yaml_reader import Location, dotted

PositiveInt = Annotated[int, Field(ge=1)]


class Slot(NamedTuple):
    """Where a part goes, and what it is called with."""

    module: str  # where bare names are looked up
    takes: tuple[str, ...] | None  # what the loop passes by position; None: the completion, and columns by name
    settings: tuple[str, ...] = ()  # fields of Part that an entry may give beside the options
    by_name: tuple[str, ...] = ()  # what the loop passes by name


@dataclass(frozen=True, kw_only=True)
class Part:
    """A callable in a slot, with where it came from and the numbers that belong to the slot.

    ``call`` has its hyper-parameters bound. A part with memory is an object with a ``state`` dict, which checkpoints
    keep under the slot's path.
    """

    call: Callable[..., Any]
    name: str  # as the recipe wrote it
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0  # of a verifier or reward in the sum
    coef: float = 1.0  # of a loss term
    weights: tuple[Part, ...] = ()  # of a loss term: factors, detached
    normaliser: Part | None = None  # of a loss term, in place of the recipe's
    time_limit: Annotated[float, Field(gt=0)] = 10.0  # of a verifier, seconds a completion
    on_error: Literal["stop", "skip"] = "stop"  # of a verifier
    spec: str = ""  # what other processes resolve again: file.py:name or package.module.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @classmethod
    def of(cls, target: Callable[..., Any], /, *, settings: Mapping[str, Any] | None = None, **options: Any) -> Part:
        """The part that a function or class makes with these options: ``Part.of(clip, low=0.2, high=0.28)``.

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

    @property
    def every_option(self) -> dict[str, Any]:
        """The options, defaults included."""
        return default_options(self.target) | dict(self.options)


def _short(value: Any) -> str:
    text = "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
    return text.replace("\n", "\\n")


class RecipeConflict(RecipeError):
    """Settings that are right one by one and wrong together."""

    def __init__(self, conflicts: Problems) -> None:
        self.conflicts = conflicts
        super().__init__(f"{dotted(location)}: {message}" for location, message in conflicts)


class Checked:
    """Settings that must go together.

    Raises:
        RecipeConflict: when built from settings that do not.
    """

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Where they do not, and why."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        if conflicts := list(self.conflicts()):
            raise RecipeConflict(conflicts)
