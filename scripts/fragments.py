"""Lists docstrings whose first line is a fragment: ``python scripts/fragments.py [FOLDER ...]``.

A docstring's first line is a sentence with a verb, or a noun phrase that can stand alone. A line that begins with
"Of", "What" or "Those" is neither: it continues a sentence that is not there. Attribute docstrings (a string below a
field or a constant) are checked too. The script prints one line for each fragment, and exits with 1 if there is any. It
is a part of ``make lint``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("posttrain", "reward_models", "benchmarks", "examples", "recipes", "scripts", "startup", "tests")
FRAGMENT = re.compile(r"(What|Of|How|Those|Which|Whether|As|The same|And|That|For)\b")


def main() -> int:
    """Prints the fragments in the folders of the command line, or in all folders with Python files."""
    folders = [Path(name) for name in sys.argv[1:]] or [ROOT / name for name in FOLDERS]
    lines = [line for folder in folders for path in sorted(folder.rglob("*.py")) for line in fragments(path)]
    print(*lines, sep="\n", end="\n" if lines else "")
    return 1 if lines else 0


def fragments(path: Path) -> Iterator[str]:
    """Yields ``file:line: first line`` for each docstring in a file that begins like a fragment."""
    for node, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
        first = text.strip().partition("\n")[0]
        if FRAGMENT.match(first):
            yield f"{path}:{node.lineno}: {first}"


def docstrings(tree: ast.AST) -> Iterator[tuple[ast.Expr, str]]:
    """Yields every string that is a statement: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node, node.value.value


if __name__ == "__main__":
    sys.exit(main())
