"""Makes parts of a recipe out of the classes of decoders and scores, so that each of them is written once.

The parameters of a class carry marks in their annotations. The marks say how an option becomes an argument: scores and
decoders are made with the context, separators become token ids, and parameters for Python alone are no options. A class
in a file of your own becomes a part in the same way: ``mine = decoder_part(Mine, "mine", __name__)``.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.decoding.context import DecoderContext, FromContext, PythonOnly, SeparatorMark
from posttrain.engines.base import Engine
from posttrain.option_types import Facts, Inner


def decoder_part(kind: type[Any], name: str, module: str) -> Callable[..., Engine]:
    """Makes the part ``(engine, context, *, options) -> Engine`` whose calls construct a decoder of this class.

    Args:
        kind: class whose constructor takes the engine and the options, with marks in the annotations.
        name: the bare name of the part in recipes.
        module: the module that holds the part under this name.
    """

    def part(engine: Engine, context: DecoderContext, **options: Any) -> Engine:
        within = context.on(engine, within_step=kind.scores_within_step)
        return kind(engine, **resolved(kind, options, engine, within))

    return _described(part, kind, name, module, ("engine", "context"))


def score_part(kind: type[Any], name: str, module: str) -> Callable[..., Any]:
    """Makes the part ``(context, *, options) -> PrefixScore`` whose calls construct a score of this class."""

    def part(context: DecoderContext, **options: Any) -> Any:
        return kind(**resolved(kind, options, context.engine, context))

    return _described(part, kind, name, module, ("context",))


def resolved(
    kind: type[Any], options: Mapping[str, Any], engine: Engine | None, context: DecoderContext
) -> dict[str, Any]:
    """Turns options of a recipe into arguments of the constructor: makes scores and decoders, looks separators up."""
    arguments: dict[str, Any] = {}
    for name, mark in _marks(kind).items():
        if isinstance(mark, FromContext):
            arguments[name] = getattr(context, mark.attribute)
        elif name not in options:
            continue
        elif isinstance(mark, SeparatorMark):
            arguments[name] = context.ends(options[name])
        elif isinstance(mark, Inner) and mark.takes == ("context",) and options[name] is not None:
            arguments[name] = options[name](context)
        elif isinstance(mark, Inner) and mark.takes == ("engine", "context") and options[name] is not None:
            arguments[name] = options[name](engine, context)
    return dict(options) | arguments


def _marks(kind: type[Any]) -> dict[str, Any]:
    """The first mark in the annotation of each parameter of the constructor that has one."""
    hints = typing.get_type_hints(kind.__init__, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: metadata[0] for name, metadata in marks.items() if metadata}


def _described(part: Any, kind: type[Any], name: str, module: str, takes: tuple[str, ...]) -> Any:
    """Gives the part the name, docstring, facts and options of the class, for recipes and ``posttrain show``."""
    hints, marks = typing.get_type_hints(kind.__init__, include_extras=True), _marks(kind)
    shown = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in takes]
    annotations: dict[str, Any] = {}
    for parameter in inspect.signature(kind).parameters.values():
        mark = marks.get(parameter.name)
        if parameter.name in takes or isinstance(mark, FromContext | PythonOnly):
            continue
        is_separator = isinstance(mark, SeparatorMark)
        annotations[parameter.name] = str | None if is_separator else hints[parameter.name]
        default = None if is_separator else parameter.default
        shown.append(
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotations[parameter.name], default=default
            )
        )
    part.__name__ = part.__qualname__ = name
    part.__module__, part.__doc__ = module, kind.__doc__
    part.__annotations__, part.__signature__ = annotations, inspect.Signature(shown)
    part.makes, part.facts = kind, getattr(kind, "facts", Facts())
    part.conflicts = getattr(kind, "conflicts", None)
    return part
