"""What all decoders share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from posttrain.engines.base import Engine


class Decoder:
    """An engine that samples with another one: the weights are the other's, and a score keeps its own.

    A decoder adds ``generate``: see :meth:`posttrain.engines.base.Engine.generate`.
    """

    engine: Engine
    alone = False
    """Whether it changes all that the engine samples while it decodes, other requests' too."""

    @property
    def version(self) -> int:
        """Of the engine's weights."""
        return self.engine.version

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`: the engine's weights."""
        self.engine.load(tensors, version)

    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`: the engine."""
        self.engine.close()
