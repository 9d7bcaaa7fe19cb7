"""Generated documents are what the code says now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", ["slots.py", "settings.py"])
def test_generated_documents_are_up_to_date(script: str):
    """In a process of its own, because the tests' type checker rewrites the signatures that the script reads."""
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    checked = subprocess.run(command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
