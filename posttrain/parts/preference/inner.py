"""The options of a preference term that are parts themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from torch import Tensor

from posttrain.option_types import Inner

Score = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.scores", ("outputs", "batch"))]
"""``(Outputs, Batch) -> [N]``: how much more (or less) the policy likes a completion; 0 where it is the reference."""

PairLink = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.pair_links", ("margin", "target"))]
"""``([P], [P]) -> [P]``: the loss of a pair from the margin of its scores and its target."""

PointLink = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.point_links", ("score", "label"))]
"""``([N], [N]) -> [N]``: the loss of a completion from its score and its label."""

ListLink = Annotated[
    Callable[..., Tensor], Inner("posttrain.parts.preference.list_links", ("score", "log_target", "valid"))
]
"""``([G, K], [G, K], [G, K]) -> [G]``: the loss of a list from its scores and log target probabilities."""

PairTarget = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.pair_targets", ("pairs",))]
"""``(Pairs) -> [P]``: what the link compares the margin with, mostly the probability that the chosen one wins."""

ListTarget = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.list_targets", ("label", "valid"))]
"""``([G, K], [G, K]) -> [G, K]``: log-probabilities over a list, -inf where a completion should have none."""

Margin = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.margins", ("pairs",))]
"""``(Pairs) -> [P]``: what the scaled scores of a pair must differ by before it counts as won."""

PairWeight = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.pair_weights", ("pairs",))]
"""``(Pairs) -> [P]``: a factor of the pair's loss, without gradient."""
