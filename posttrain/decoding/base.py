"""The base class of decoders: an engine that samples with another engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from torch import Tensor

from posttrain.engines.base import Engine
from posttrain.option_types import Inner


class Decoder:
    """An engine that samples with another engine. Loading weights changes that engine, not the score.

    Subclasses add ``generate``: see :meth:`posttrain.engines.base.Engine.generate`.
    """

    engine: Engine
    alone = False
    """True if other requests to the engine are changed too while the decoder runs."""
    scores_within_step = False
    """True if the decoder asks for scores while the engine draws a token."""

    @property
    def version(self) -> int:
        """Version of the weights that the engine holds; set by ``load``."""
        return self.engine.version

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`: the engine's weights."""
        self.engine.load(tensors, version)

    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`: the engine."""
        self.engine.close()


DecoderOption = Annotated[Engine, Inner("posttrain.decoding.decoders", ("engine", "context"))]
"""An option of a decoder that is a decoder itself."""

OptionalDecoder = Annotated[Engine | None, Inner("posttrain.decoding.decoders", ("engine", "context"))]
"""An option of a decoder that is a decoder itself, or None."""

Conflict = tuple[tuple[str | int, ...], str]
"""A problem with the options of a decoder or score: the path of the option within it, and the message."""
