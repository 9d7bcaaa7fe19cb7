"""Finds the callable of ``use: name``, and checks the recipe's options against its keyword parameters.

A name is a bare one, looked up in the slot's module; ``my_file.py:name``; or ``package.module.name``. There is no
registry, so the same text finds the same callable in every process. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.errors import RecipeError
from posttrain.option_types import Inner, LocalPath
from posttrain.recipe.executors import executor_problem
from posttrain.recipe.validation import Problems, validate
from posttrain.recipe.yaml_reader import suggestion
from posttrain.system.long_work import saying_still
from posttrain.system.places import expanded, is_there

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def resolve(spec: str) -> Any:
    """Imports the callable ``/path/to/file.py:name`` or ``package.module.name``.

    Raises:
        RecipeError: if the file or module cannot be imported, has no such name, or if the name is of a function that
            executes what it is given.
    """
    file, colon, name = spec.rpartition(":")
    if colon:
        target = _member(import_file(Path(file)), name, Path(file).name)
    else:
        module_name, _, name = spec.rpartition(".")
        target = _member(_import_module(module_name, spec), name, module_name)
    if problem := executor_problem(target, name if colon else spec):
        raise RecipeError(problem)
    return target


def specify(name: str, module: str, folders: Iterable[Path]) -> str:
    """Turns a name as a recipe writes it into the full one that :func:`resolve` takes.

    Args:
        module: module in which bare names are looked up.
        folders: folders in which files are looked for, in this order.

    Raises:
        RecipeError: if there is no such file or bare name.
    """
    if re.fullmatch(r"\w+", name):
        names = public_callables(importlib.import_module(module))
        if name not in names:
            guess = suggestion(name, names)
            own_file = "" if guess.startswith("did") else f"; one of your own is named as in `use: my_file.py:{name}`"
            raise RecipeError(f"{module} has no {name!r}; {guess}{own_file}")
        return f"{module}.{name}"
    file, colon, attribute = name.rpartition(":")
    if colon:
        return f"{find_file(file, folders)}:{attribute}"
    if "/" in name or name.endswith(".py"):
        raise RecipeError(f"{name!r} names a file but no function in it; write it as in `use: my_file.py:my_function`")
    return name


def find_file(file: str, folders: Iterable[Path]) -> Path:
    """Finds a file that is named relative to one of the folders; returns its absolute path.

    Raises:
        RecipeError: if it is in none of them.
    """
    candidates = [folder / expanded(file) for folder in folders]
    file_path = next((path for path in candidates if is_there(path) and path.is_file()), None)
    if file_path is None:
        parents = [path.parent for path in candidates if is_there(path.parent)]
        near = {other.name for parent in parents if parent.is_dir() for other in parent.glob("*.py")}
        looked = ", ".join(dict.fromkeys(str(path.parent.resolve()) for path in candidates))
        guess = suggestion(Path(file).name, near)
        raise RecipeError(f"no file {file!r} (looked in {looked})" + (f"; {guess}" if guess.startswith("did") else ""))
    return file_path.resolve()


def import_file(path: Path) -> ModuleType:
    """Imports the module in a file, once a process.

    Its folder goes to the end of ``sys.path``: it can import its neighbours, and they shadow nothing.

    Raises:
        RecipeError: if the import fails; the message names the line.
    """
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        with saying_still(f"importing {path.name}"):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RecipeError(_import_failure(str(path), error)) from error
    return module


def _import_module(module: str, spec: str) -> ModuleType:
    if not module:
        raise RecipeError(f"{spec!r} is not a name")
    if module in sys.modules:
        return sys.modules[module]
    own = module.startswith("posttrain.")  # every command waits for these
    try:
        with contextlib.nullcontext() if own else saying_still(f"importing {module}"):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(
            f"{error.name}."
        ):  # the module itself is missing, not one that it imports
            raise RecipeError(f"no module {error.name!r} in this Python; is it installed?") from None
        raise RecipeError(_import_failure(module, error)) from error
    except (Exception, SystemExit) as error:
        raise RecipeError(_import_failure(module, error)) from error


def _import_failure(name: str, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"cannot import {name}: {error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"cannot import {name}: {frame.filename}:{frame.lineno}: {type(error).__name__}: {error}"


def _member(module: ModuleType, name: str, shown: str) -> Any:
    member = getattr(module, name, None)
    if callable(member):
        return member
    what = f"has no {name!r}" if member is None else f"has a {name!r}, but it cannot be called"
    raise RecipeError(f"{shown} {what}; {suggestion(name, public_callables(module))}")


def public_callables(module: ModuleType) -> list[str]:
    """Names of a module's public functions and classes: in ``__all__``, or defined in it without an underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        names = [name for name, value in public.items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in names if callable(getattr(module, name, None))]


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a function, or of a class's constructor, by name."""
    return dict(inspect.signature(target).parameters)


def required(target: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default."""
    return [name for name, p in parameters(target).items() if p.default is p.empty and p.kind not in _VARIADIC]


def positional(target: Callable[..., Any]) -> list[str]:
    """Names of the required parameters that can be passed by position. The slot supplies them."""
    return [name for name in required(target) if parameters(target)[name].kind != inspect.Parameter.KEYWORD_ONLY]


def default_options(target: Callable[..., Any]) -> dict[str, Any]:
    """Defaults of the parameters that have one, by name."""
    return {name: p.default for name, p in parameters(target).items() if p.default is not p.empty}


def check_options(
    target: Callable[..., Any],
    options: Mapping[str, Any],
    passed: Iterable[str],
    *,
    beside: Iterable[str] = (),
    complete: bool = True,
) -> tuple[dict[str, Any], Problems]:
    """Checks options against the annotations of the parameters: unknown, missing or of a wrong type.

    Args:
        passed: names of parameters that the slot passes; they are no options.
        beside: keys that an entry may have beside options; only for suggestions.
        complete: require every parameter without a default. Not so for verifiers, whose parameters are also columns of
            the dataset.

    Returns:
        The options in the types of the annotations, and the problems.
    """
    known = {name: p for name, p in parameters(target).items() if name not in set(passed)}
    open_ended = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in known.values())
    known = {name: p for name, p in known.items() if p.kind not in _VARIADIC}
    hints = _annotations(target)
    checked: dict[str, Any] = {}
    problems: Problems = []
    for name, value in options.items():
        if name not in known and not open_ended:
            problems.append(((name,), f"unknown option; {suggestion(name, {*known, *beside})}"))
            continue
        checked[name], wrong = validate(hints.get(name, Any), value)
        problems.extend(((name, *at), message) for at, message in wrong)
    missing = [name for name in required(target) if name in known and name not in options] if complete else []
    problems.extend(((), f"option {name!r} is missing and has no default") for name in missing)
    return checked, problems


def inner_slots(target: Callable[..., Any]) -> dict[str, Inner]:
    """Marks of the options whose values are parts themselves, one or several, by name."""
    marks: dict[str, Inner] = {}
    for name, annotation in _annotations(target).items():
        several = typing.get_origin(annotation) is tuple
        marked = typing.get_args(annotation)[0] if several else annotation
        for mark in getattr(marked, "__metadata__", ()):
            if isinstance(mark, Inner):
                marks[name] = mark._replace(several=several)
    return marks


def local_options(target: Callable[..., Any]) -> list[str]:
    """Names of the options whose values may be local paths."""
    return [name for name, annotation in _annotations(target).items() if _is_local(annotation)]


def _is_local(annotation: Any) -> bool:
    marks = getattr(annotation, "__metadata__", ())
    return any(isinstance(mark, LocalPath) for mark in marks) or any(map(_is_local, typing.get_args(annotation)))


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Evaluated annotations by name; empty if one of them names something that does not exist at run time."""
    try:
        return typing.get_type_hints(target.__init__ if isinstance(target, type) else target, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}
