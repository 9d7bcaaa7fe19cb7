"""Model cards cite the papers of what a recipe does, and no variant that it does not use."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain import load_recipe
from posttrain.training.citations import ARXIV, papers, sources

RECIPES = Path(__file__).parents[2] / "recipes"
DOCSTRING = """A part.

Author 2020 (A), arXiv:2001.00001. ``second``: Other 2021 (B), arXiv:2001.00002.
Label smoothing: Third 2022 (C), arXiv:2001.00003; Fourth 2022 (D),
arXiv:2001.00004. Mean: Fifth 2022 (E), arXiv:2001.00005.

Args:
    second: a number. Sixth 2023, arXiv:2001.00006.
    kind: what it is.
        - ``sum``: Seventh 2023, arXiv:2001.00007.
        - ``max``: Eighth 2023, arXiv:2001.00008.
"""


@pytest.mark.parametrize(
    ("changes", "cited"),
    [
        ({}, {1, 7}),
        ({"second": 2.0}, {1, 2, 6, 7}),
        ({"label_smoothing": 0.1}, {1, 3, 4, 7}),
        ({"kind": "mean"}, {1, 5}),
        ({"kind": "max"}, {1, 8}),
    ],
)
def test_a_source_is_cited_under_its_own_options(changes: dict, cited: set[int]) -> None:
    defaults = {"second": 1.0, "label_smoothing": 0.0, "kind": "sum"}
    lines = "\n".join(sources(DOCSTRING, defaults | changes, defaults))
    assert {int(number[-1]) for number in ARXIV.findall(lines)} == cited


@pytest.mark.parametrize(
    ("name", "cited", "not_cited"),
    [
        ("rl/grpo", {"2402.03300", "1707.06347"}, {"2503.14476", "2310.10505", "2505.07291", "1912.09729"}),
        ("rl/dapo", {"2503.14476"}, {"2310.10505", "2507.18071"}),
        ("preference/sft", {"2203.02155"}, {"2503.14476", "2310.10505", "2404.19733"}),
        ("preference/dpo", {"2305.18290"}, {"2310.10505", "2405.14734", "2407.13399"}),
        ("value/bradley_terry", {"2203.02155", "2312.09244"}, {"2307.09288", "2310.10505", "2503.14476"}),
    ],
)
def test_cards_of_recipes(name: str, cited: set[str], not_cited: set[str]) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    found = set(ARXIV.findall("\n".join(papers(recipe, of_value=name.startswith("value")))))
    assert cited <= found and not found & not_cited
