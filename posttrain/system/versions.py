"""Versions of the packages that a run was made with."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("posttrain", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "vllm")


def versions() -> dict[str, str]:
    """The packages that made the model, those that are installed."""
    found = {}
    for name in PACKAGES:
        for distribution in (name, f"{name}-cpu"):
            try:
                found.setdefault(name, importlib.metadata.version(distribution))
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def engine_name(engine: object) -> str:
    """The library that samples with its version, as ``vllm 0.32.0``; of an engine without one, the class."""
    library = getattr(engine, "library", None)
    return f"{library} {versions()[library]}" if library else type(engine).__name__
