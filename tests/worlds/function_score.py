"""A score of prefixes from a Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.decoding.prefixes import Prefix, ScoreKind


@dataclass(frozen=True, kw_only=True)
class FunctionScore:
    """A function of prefixes as a score: a reward model, a judge, a rule.

    Args:
        function: prefixes to one number each, in reward units.
    """

    function: Callable[[Sequence[Prefix]], Sequence[float] | Tensor]
    kind: ScoreKind = "mean"
    beta: float | None = None
    scale: float = 1.0

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`.

        Raises:
            ValueError: if the function returns another number of scores.
        """
        values = self.function(prefixes)
        scores = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.float64)
        if scores.shape != (len(prefixes),):
            raise ValueError(f"the score of {len(prefixes)} prefixes has shape {list(scores.shape)}, not one each")
        return self.scale * scores
