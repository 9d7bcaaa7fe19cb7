"""A key-value cache that is written in place."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

GROWTH = 64  # least number of columns that are added at a time


class GrowingLayer(DynamicLayer):
    """Keys and values of one attention layer in memory with room to spare.

    transformers' own layer copies all keys and values at every token. This one copies them each time the room is used
    up, and then makes room for a quarter more.
    """

    _room: tuple[Tensor, Tensor] | None = None  # keys and values [N, heads, columns with room, head size]

    def update(
        self,
        key_states: Float[Tensor, "N heads new size"],
        value_states: Float[Tensor, "N heads new size"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "N heads columns size"], Float[Tensor, "N heads columns size"]]:
        """Appends columns; returns views of all keys and values held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            columns = end + max(GROWTH, end // 4)
            self._room = _widened(self.keys, key_states, columns), _widened(self.values, value_states, columns)
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keeps the rows of these indices, in this order; an index may occur several times."""
        if self._room is not None:
            columns = self.get_seq_length()
            self._room = self._room[0][indices], self._room[1][indices]
            self.keys, self.values = (room[:, :, :columns] for room in self._room)


def _widened(held: Tensor | None, new: Tensor, columns: int) -> Tensor:
    """Makes memory for ``columns`` columns with dtype and device of ``new``, and copies the held columns into it."""
    room = new.new_empty(*new.shape[:2], columns, new.shape[-1])
    if held is not None and held.numel():
        room[:, :, : held.shape[-2]] = held
    return room


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """Makes the cache of a model; layers of other kinds (sliding windows) use transformers' own cache."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
