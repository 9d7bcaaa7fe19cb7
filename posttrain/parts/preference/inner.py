"""Types of the options of a preference term that are parts themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from torch import Tensor

from posttrain.option_types import Inner

Score = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.scores", ("outputs", "batch"))]
"""``(Outputs, Batch) -> [N]``: the score of a completion, by which the policy prefers it more or less."""

PairLink = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.pair_links", ("margin", "target"))]
"""``([P], [P]) -> [P]``: the loss of a pair, from the margin of its scores and its target."""

PointLink = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.point_links", ("score", "label"))]
"""``([N], [N]) -> [N]``: the loss of a completion, from its score and its label."""

ListLink = Annotated[
    Callable[..., Tensor], Inner("posttrain.parts.preference.list_links", ("score", "log_target", "valid"))
]
"""``([G, K], [G, K], [G, K]) -> [G]``: the loss of a list, from its scores and log target probabilities."""

PairTarget = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.pair_targets", ("pairs",))]
"""``(Pairs) -> [P]``: the target of the link, mostly the probability that the chosen completion is the better one."""

ListTarget = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.list_targets", ("label", "valid"))]
"""``([G, K], [G, K]) -> [G, K]``: log target probabilities over a list, -inf for a probability of 0."""

Margin = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.margins", ("pairs",))]
"""``(Pairs) -> [P]``: the margin, which is subtracted from the difference of the pair's scaled scores."""

PairWeight = Annotated[Callable[..., Tensor], Inner("posttrain.parts.preference.pair_weights", ("pairs",))]
"""``(Pairs) -> [P]``: the weight of a pair, a factor of its loss without gradient."""
