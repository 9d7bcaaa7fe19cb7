"""Parts inside parts: options of a part that are functions with options of their own."""

from __future__ import annotations

from typing import NamedTuple


class Inner(NamedTuple):
    """Marks, in an option's annotation, that its value is a part: ``{use: name, <options>}`` in a recipe."""

    module: str  # where bare names are looked up
    takes: tuple[str, ...]  # what the outer part passes by position
    several: bool = False  # filled in where the option is a tuple of such parts


class LocalPath(NamedTuple):
    """Marks, in an option's annotation, a path that is looked for beside the recipe and then in the working folder."""
