"""Keeps the model classes of Transformers as they are, which vLLM changes for families that it has no own code for.

Such families run through vLLM's Transformers backend. It decorates the class of the layers in place: the constructor
asks for vLLM's configuration, and calls look for attributes that only vLLM's model has. The trainer uses the same
class, for its model before the engine starts and for the model that it saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def classes_kept() -> Iterator[list[tuple[type, type]]]:
    """Inside, vLLM's decorations are noted; afterwards every decorated class is as it was.

    Yields:
        Pairs of a class and its decorated twin, filled when the block ends, for :func:`use_twins`.
    """
    from vllm.model_executor.models.transformers.base import Base

    decorate, before = Base._decorate_cls_for_torch_compile, {}
    twins: list[tuple[type, type]] = []

    def noting(self: Any, cls: type, **arguments: Any) -> None:
        before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
        decorate(self, cls=cls, **arguments)

    Base._decorate_cls_for_torch_compile = noting  # type: ignore[method-assign]
    try:
        yield twins
    finally:
        Base._decorate_cls_for_torch_compile = decorate  # type: ignore[method-assign]
        twins += [(cls, _undecorated(cls, *was)) for cls, was in before.items()]


def _undecorated(cls: type, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
    """Undoes a decoration, and returns a twin of the class that has it."""
    added = tuple(base for base in cls.__bases__ if base not in bases)
    changed = {name: value for name, value in vars(cls).items() if attributes.get(name) is not value}
    for name in changed:
        if name in attributes:
            setattr(cls, name, attributes[name])
        else:
            delattr(cls, name)
    cls.__bases__ = bases
    return type(cls.__name__, (cls, *added), {**changed, "__module__": cls.__module__})


def use_twins(model: nn.Module, twins: list[tuple[type, type]]) -> None:
    """Gives vLLM's own modules the decorated twins of their classes."""
    twin_of = dict(twins)
    for module in model.modules():
        if type(module) in twin_of:
            module.__class__ = twin_of[type(module)]
