"""A recipe that loads, as text to change, and a file with a user's own parts."""

from __future__ import annotations

GOOD = """\
policy:
  model: some/model
data:
  path: some/data
verify: [{use: math}]
advantage: {use: outcome, scale: group}
loss:
  - {use: clip, low: 0.2, high: 0.28}
  - use: kl
    coef: 1e-3
sampling:
  max_tokens: 64
optimizer: {learning_rate: 1e-5}
steps: 3
"""

OWN_PARTS = '''\
"""Parts of a user."""

from dataclasses import dataclass, field
from typing import Literal

from posttrain.option_types import facts


def doubled(batch, *, factor: float = 2.0, mode: Literal["plain", "odd"] = "plain"):
    """Twice the reward.

    A = 2 R.  Someone 2026, eq. 1, arXiv:2601.00001.
    """
    return batch


def has_unit(completion: str, *, unit: str, strict: bool = False) -> float:
    return float(unit in completion)


def trl_style(completions, prompts=None, **columns) -> list[float]:
    return [0.0 for _ in completions]


def needs_scale(batch, *, scale: float):
    return batch


@facts(compares_group=True)
def against_the_rest(batch):
    return batch


def of_a_loss(outputs, batch):
    return batch


@dataclass
class Running:
    """Counts its calls."""

    decay: float = 0.9
    state: dict = field(default_factory=dict)

    def __call__(self, batch):
        self.state["calls"] = self.state.get("calls", 0) + 1
        return self.state["calls"]


number = 3
'''


def edit(old: str, new: str) -> str:
    """The recipe GOOD with one piece of its text replaced."""
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)
