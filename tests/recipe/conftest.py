"""The fixture that writes recipes for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from recipe_texts import GOOD, OWN_PARTS


@pytest.fixture
def recipe(tmp_path: Path):
    """``recipe(text, **other files) -> Path`` of ``r.yaml``, beside ``parts.py``."""
    (tmp_path / "parts.py").write_text(OWN_PARTS)

    def write(text: str = GOOD, **files: str) -> Path:
        for name, content in {"r": text, **files}.items():
            (tmp_path / f"{name}.yaml").write_text(dedent(content))
        return tmp_path / "r.yaml"

    return write
