"""Every kind of run is killed while it writes, and goes on with the same bits: ``benchmarks/crashes.py`` in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import command

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "crashes.py"
KINDS = ("offline with cache", "decode", "label", "eval")  # the others are killed by other tests, and there in large


@pytest.mark.engine
def test_runs_that_are_killed_while_they_write_go_on_with_the_same_bits(tmp_path: Path):
    settings = ("--moments", "0", "--writes", "2", "--kinds", *KINDS)
    done = command(str(BENCHMARK), "--json", str(tmp_path / "counts.json"), *settings)
    counts = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))["kinds"]
    assert done.returncode == 0, [counts, done.stderr[-2000:]]
    assert list(counts) == list(KINDS)
    for kind in counts.values():
        assert kind["SIGKILL"] == 2 and kind["files compared"] > 1 and kind["changes of the file system"] > 20
