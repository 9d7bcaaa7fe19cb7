"""Versions of the packages that a run uses."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("posttrain", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "vllm")


def versions() -> dict[str, str]:
    """Versions of the installed packages that matter for a run."""
    installed = {}
    for name in PACKAGES:
        for distribution in (name, f"{name}-cpu"):
            try:
                installed.setdefault(name, importlib.metadata.version(distribution))
            except importlib.metadata.PackageNotFoundError:
                continue
    return installed


def engine_name(engine: object) -> str:
    """Name and version of the library that samples, such as ``vllm 0.32.0``; the class name for other engines."""
    library = getattr(engine, "library", None)
    return f"{library} {versions()[library]}" if library else type(engine).__name__
