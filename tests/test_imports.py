"""The rule of imports: the rooms stand in one order, and a module imports from its own room or from those to the left.

Every import counts: at the top of a file, inside a function, under ``TYPE_CHECKING``, and by a name in a string, as
slots and suites give it (``Slot("posttrain.parts.losses", ...)``). Between files of a room there is no circle.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    *("errors", "option_types", "batch", "seeds", "micro_batches"),
    *("system", "recipe", "parts", "models", "verify", "engines", "data", "reward_models", "decoding", "rollout"),
    *("output", "training", "serving", "reports", "commands", "quickstart"),
)
DOORS = ("posttrain", "posttrain.__main__")  # the public names and the command: they open to all rooms
OUTSIDE = ("recipes", "benchmarks", "examples", "scripts")  # scripts that use the package; no room imports them
NAME = re.compile(r"(posttrain|reward_models)(\.\w+)*")

EXCEPTIONS: set[tuple[str, str]] = set()
"""Pairs (module, imported module) that may break the rule. It stays empty."""


class Import(NamedTuple):
    """An import of a module, by statement or by a name in a string."""

    name: str
    line: int
    by_string: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def sources() -> dict[str, str]:
    """The text of every module that the rule is about, by the module's name."""
    folders = ("posttrain", "reward_models", *OUTSIDE)
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(path): path.read_text(encoding="utf-8") for path in paths}


def imports(text: str, modules: set[str]) -> Iterator[Import]:
    """Finds all imports of these modules in a source text, anywhere in the file, by statement or by string."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                name = member if member in modules else node.module
                if name in modules:
                    yield Import(name, node.lineno, False)
        elif isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, False) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            name = node.value if node.value in modules else node.value.rpartition(".")[0]
            if name in modules and name != "posttrain":  # the package's name alone is the command's
                yield Import(name, node.lineno, True)


def room(module: str) -> str:
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "posttrain" else first


def place(module: str) -> int:
    """The number of a module's room in the order; scripts outside come after all rooms."""
    return len(ROOMS) if room(module) in OUTSIDE else ROOMS.index(room(module))


def violations(texts: dict[str, str]) -> list[str]:
    """Each import of a room to the right, as ``file:line`` with both names."""
    broken = []
    for module, text in texts.items():
        if module in DOORS or room(module) in OUTSIDE:
            continue
        for other, line, _ in imports(text, set(texts)):
            reaches_right = other in DOORS or place(other) > place(module)
            if reaches_right and (module, other) not in EXCEPTIONS:
                broken.append(f"{module}:{line} imports {other}, which stands to the right of room {room(module)!r}")
    return broken


def circle(texts: dict[str, str]) -> list[str]:
    """The modules of a circle of import statements; empty if there is none.

    Names in strings are left out here: an option of a decoder may be a decoder, which no import has to follow.
    """
    graph = {
        module: {other for other, _, by_string in imports(text, set(texts)) if not by_string and other != module}
        for module, text in texts.items()
        if module not in DOORS
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_the_package_is_rooms_and_at_most_eight_modules() -> None:
    """Each room's ``__init__`` says in a docstring what is in it and what may be imported from it."""
    entries = [path for path in (ROOT / "posttrain").iterdir() if path.name != "__pycache__"]
    assert sum(path.suffix == ".py" for path in entries) <= 8
    for folder in (path for path in entries if path.is_dir()):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert len(text.splitlines()) >= 2, f"{folder.name}: its __init__ does not say what is in it"


def test_no_import_is_relative() -> None:
    """The rule reads absolute names only."""
    for module, text in sources().items():
        relative = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, module


def test_every_module_has_a_room() -> None:
    homeless = {m for m in sources() if m not in DOORS and room(m) not in (*ROOMS, *OUTSIDE)}
    assert not homeless, f"no room of the import rule: {sorted(homeless)}"


def test_a_room_imports_from_itself_and_from_rooms_to_its_left() -> None:
    assert not violations(sources())
    assert not EXCEPTIONS


def test_no_import_goes_round_in_a_circle() -> None:
    assert not circle(sources())


@pytest.mark.parametrize(
    ("module", "lines"),
    [
        ("posttrain.parts.losses", "def f():\n    from posttrain.training.loop import train"),
        (
            "posttrain.parts.losses",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import posttrain.training.loop",
        ),
        ("posttrain.recipe.part", 'SLOT = "posttrain.parts.losses"'),
        ("posttrain.recipe.part", 'DEFAULT = "posttrain.parts.normalisers.token_mean"'),
        ("posttrain.data.rows", "import reward_models"),
        ("reward_models.outcome", "def f():\n    from posttrain.rollout.collect import collect"),
        ("posttrain.system.files", "from posttrain import load_recipe"),
    ],
)
def test_the_rule_sees_imports_in_functions_in_typing_blocks_and_in_strings(module: str, lines: str) -> None:
    """A line that breaks the rule, added to a module that keeps it, is found: the test of the test."""
    texts = dict(sources())
    before = violations(texts)
    texts[module] += f"\n{lines}\n"
    assert len(violations(texts)) > len(before)


def test_a_circle_of_two_files_is_found() -> None:
    texts = dict(sources())
    texts["posttrain.data.arrow"] += "\ndef f():\n    from posttrain.data.read import read\n"
    assert {"posttrain.data.arrow", "posttrain.data.read"} <= set(circle(texts))


def test_parts_know_batches_and_option_types_alone() -> None:
    for module, text in sources().items():
        if room(module) == "parts":
            known = ("posttrain.batch", "posttrain.option_types", "posttrain.parts")
            assert {name for name, *_ in imports(text, set(sources())) if not name.startswith(known)} == set(), module
