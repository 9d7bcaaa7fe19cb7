"""Values of candidate tokens with a key-value cache: one forward pass over the candidates alone.

While a completion is decoded token by token, each prefix is the last one and one of its candidates. Its keys and values
are then known: those of the last prefix, and those of the candidate that was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from posttrain.decoding.model_scores import NextTokenValueScore, ValueScore, head_value, padded
from posttrain.decoding.prefixes import Kind, Prefix
from posttrain.models import active_adapter

ROOM = 32
"""Columns that a cache has to spare when it is made."""

Memory = tuple[Float[Tensor, "M heads columns size"], Float[Tensor, "M heads columns size"]]
"""Keys and values of one layer."""


def value_score(model: Any) -> ValueScore | CachedValueScore:
    """The score of a ``posttrain.values.ValueModel``, with the kind, temperature and scale it was trained for."""
    if model.spec.head.type == "per_token":
        return NextTokenValueScore(model, kind=model.spec.kind, beta=model.spec.beta, scale=model.spec.scale)
    full = {"full_attention"}
    kinds = set(getattr(model.decoder.config.get_text_config(), "layer_types", None) or full)
    if kinds == full:
        return CachedValueScore(model)
    return ValueScore(model, kind=model.spec.kind, beta=model.spec.beta, scale=model.spec.scale)


class CachedValueScore:
    """The value of a ``posttrain.values.ValueModel``, which remembers the last call's prefixes and their candidates.

    It forgets them when the model's weights are changed in place, as optimisers and ``load_state_dict`` do.

    Args:
        model: all of its layers attend to all that came before.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kind: Kind = model.spec.kind
        self.beta: float | None = model.spec.beta
        self.scale: float = model.spec.scale
        self.computed = {"prefixes": 0, "candidates": 0}  # read in whole, and scored as candidates
        self._uncached = ValueScore(model, kind=self.kind, beta=self.beta, scale=self.scale)
        self._value = head_value(model)
        self._weights_version = 0
        self._forget()

    def _forget(self) -> None:
        self._rows: dict[tuple[int, ...], int] = {}  # what each row has read
        self._memory: list[Memory] = []
        self._state: Tensor = torch.empty(0)  # [M], the values of the rows themselves
        self._candidates: list[dict[int, int]] = []  # token -> column, for each row
        self._candidate_memory: list[Memory] = []
        self._candidate_values: Tensor = torch.empty(0)  # [M, K]

    def _check_weights(self) -> None:
        version = sum(parameter._version for parameter in self.model.parameters())
        if version != self._weights_version:
            self._forget()
            self._weights_version = version

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        self._check_weights()
        rows = [self._rows.get(tuple(prefix.tokens)) for prefix in prefixes]
        known = [row for row in rows if row is not None]
        return self._state[known] if len(known) == len(rows) else self._uncached.score(prefixes)

    @torch.inference_mode()
    def score_candidates(self, prefixes: Sequence[Prefix], candidates: Int[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """See :class:`posttrain.decoding.prefixes.CandidateScore`."""
        device = next(self.model.parameters()).device
        self._check_weights()
        self._advance(prefixes, device)
        lengths = torch.tensor([len(prefix.tokens) for prefix in prefixes], device=device)
        values = self._read_candidates(candidates.to(device), lengths)
        self._candidates = [{token: column for column, token in enumerate(row)} for row in candidates.tolist()]
        self._candidate_values = values
        self.computed["candidates"] += candidates.numel()
        return values

    def _advance(self, prefixes: Sequence[Prefix], device: torch.device) -> None:
        """Makes the rows those of ``prefixes``: from last time's where they go on with a candidate, or else anew."""
        keys = [tuple(prefix.tokens) for prefix in prefixes]
        known: list[tuple[int, int, int]] = []  # row now, row then, column of the candidate
        for now, key in enumerate(keys):
            then = self._rows.get(key[:-1])
            column = None if then is None else self._candidates[then].get(key[-1])
            if then is not None and column is not None:
                known.append((now, then, column))
        new = sorted(set(range(len(keys))) - {now for now, _, _ in known})
        state = torch.zeros(len(keys), device=device)
        width = max(map(len, keys))
        memory = self._moved(len(keys), width, known)
        if known:
            now, then, column = torch.tensor(known, device=device).T
            last = torch.tensor([len(keys[row]) - 1 for row, _, _ in known], device=device)
            state[now] = self._candidate_values[then, column]
            for layer, added in zip(memory, self._candidate_memory, strict=True):
                for held, extra in zip(layer, added, strict=True):
                    held[now, :, last] = extra[then, :, column]
        if new:
            state[new], memory = self._read([prefixes[row] for row in new], new, memory, len(keys), width)
        self._rows = {key: row for row, key in enumerate(keys)}
        self._memory, self._state = memory, state

    def _moved(self, rows: int, width: int, known: Sequence[tuple[int, int, int]]) -> list[Memory]:
        """The memory of last time with its rows in their new places, and room for ``width`` columns."""
        if not known:
            return []
        now, then = [row for row, _, _ in known], [row for _, row, _ in known]
        same = now == then == list(range(rows)) and rows == len(self._memory[0][0])
        if same and self._memory[0][0].shape[2] >= width:
            return self._memory
        moved: list[Memory] = []
        for layer in self._memory:
            keys, values = (_room(held, rows, width) for held in layer)
            for room, held in zip((keys, values), layer, strict=True):
                kept = min(width, held.shape[2])
                room[now, :, :kept] = held[then, :, :kept]
            moved.append((keys, values))
        return moved

    def _read(
        self, prefixes: Sequence[Prefix], at: list[int], memory: list[Memory], rows: int, width: int
    ) -> tuple[Float[Tensor, " new"], list[Memory]]:
        """Reads prefixes in whole into their rows; their values."""
        device = next(self.model.parameters()).device
        tokens, lengths = padded(prefixes, device)
        cache = DynamicCache(config=self.model.decoder.config)
        hidden = self._forward(input_ids=tokens, past_key_values=cache, use_cache=True)
        read: list[Memory] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc]
        memory = memory or [(_room(keys, rows, width), _room(values, rows, width)) for keys, values in read]
        for layer, added in zip(memory, read, strict=True):
            for held, extra in zip(layer, added, strict=True):
                held[at, :, : tokens.shape[1]] = extra
        self.computed["prefixes"] += len(prefixes)
        return self._value(hidden[torch.arange(len(prefixes), device=device), lengths - 1]), memory

    def _read_candidates(self, candidates: Int[Tensor, "M K"], lengths: Int[Tensor, " M"]) -> Float[Tensor, "M K"]:
        """Each candidate sees its prefix and itself, and stands right after the prefix."""
        width = int(lengths.max())
        layers = [_CandidateLayer(keys[:, :, :width], values[:, :, :width]) for keys, values in self._memory]
        cache = DynamicCache()
        cache.layers.extend(layers)
        hidden = self._forward(
            input_ids=candidates,
            position_ids=lengths[:, None].expand_as(candidates),
            attention_mask=_visible(lengths, width, candidates.shape[1]),
            past_key_values=cache,
            use_cache=True,
        )
        self._candidate_memory = [layer.added for layer in layers]
        return self._value(hidden)

    def _forward(self, **inputs: Any) -> Float[Tensor, "M columns H"]:
        adapter: AbstractContextManager[None] = nullcontext()
        if self.model.adapter is not None:
            adapter = active_adapter(self.model.backbone, self.model.adapter)
        with adapter:
            return self.model.decoder(**inputs).last_hidden_state


def _visible(lengths: Int[Tensor, " M"], width: int, candidates: int) -> Bool[Tensor, "M 1 K columns"]:
    """What each candidate attends to: the columns of its prefix, and itself."""
    column = torch.arange(width, device=lengths.device)
    past = (column < lengths[:, None])[:, None, None].expand(-1, 1, candidates, -1)
    own = torch.eye(candidates, dtype=torch.bool, device=lengths.device).expand(len(lengths), 1, -1, -1)
    return torch.cat([past, own], -1)


def _room(like: Float[Tensor, "m heads columns size"], rows: int, width: int) -> Float[Tensor, "rows heads room size"]:
    return like.new_zeros(rows, like.shape[1], width + ROOM, like.shape[3])


class _CandidateLayer(DynamicLayer):
    """Keys and values of prefixes that stay as they are; those of candidates are put beside them."""

    def __init__(self, keys: Float[Tensor, "M heads P size"], values: Float[Tensor, "M heads P size"]) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._held: Memory = (keys, values)
        self.added: Memory = (keys[:, :, :0], values[:, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and all values, of prefixes and candidates."""
        self.added = key_states, value_states
        keys, values = self._held
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)
