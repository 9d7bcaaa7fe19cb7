"""Refuses parts that would execute what they are given, such as ``os.system`` for a verifier."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

LIBRARIES = frozenset(
    [
        "sympy",
        "numpy",
        "pandas",
        "numexpr",
        "torch",
        "transformers",
        "datasets",
        "yaml",
        "dill",
        "cloudpickle",
        "joblib",
        "IPython",
        "pexpect",
        "sh",
        "plumbum",
        "invoke",
        "fabric",
        "paramiko",
        "docker",
        "requests",
        "httpx",
        "urllib3",
        "aiohttp",
    ]
)
"""Libraries whose functions execute, load or fetch what their argument names; none of them is a part."""


def executor_problem(target: Callable[..., Any], spec: str) -> str | None:
    """Says why a callable may not be a part; None if it may.

    A part gets text that a model wrote. A function of Python's standard library runs that text (``os.system``,
    ``builtins.eval``), opens it as a file, or means nothing. A file of one's own may do all that: a recipe is code. But
    then someone has written it down.
    """
    module = str(getattr(_unwrapped(target), "__module__", None) or "").partition(".")[0]
    if module in sys.stdlib_module_names or module in LIBRARIES:
        origin = f"the library {module}" if module in LIBRARIES else "Python's standard library"
        return (
            f"{spec} is a function of {origin}. A part gets texts that a model wrote, and such a function may "
            "execute them; name a function of your own, as in `use: my_file.py:my_function`"
        )
    return None


def _unwrapped(target: Any) -> Any:
    """The function behind decorators and ``functools.partial``."""
    while True:
        plain = inspect.unwrap(target) if callable(target) else target
        plain = plain.func if isinstance(plain, functools.partial) else plain
        if plain is target:
            return plain
        target = plain
