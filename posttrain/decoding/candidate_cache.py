"""Values of prefixes and candidate tokens with a key-value cache: one forward pass over the new tokens only.

While a completion is decoded token by token, each prefix is the last one and one of its candidates. Its keys and values
are then known: those of the last prefix, and those of the candidate that was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from posttrain.decoding.model_scores import NextTokenValueScore, ValueScore, head_value, padded
from posttrain.decoding.prefix_cache import BesideLayer, Memory, PrefixCache, forward_hidden, visible
from posttrain.decoding.prefixes import Prefix, ScoreKind
from posttrain.models.attention import sees_all_before

ROOM = 32
"""Spare columns of a new cache."""


def value_score(model: Any) -> ValueScore | CachedValueScore | CachedNextTokenValueScore:
    """The score of a ``posttrain.models.value.ValueModel``, with the kind, temperature and scale it was trained for.

    Raises:
        ValueError: for an implicit value, whose two language models make a score without it.
    """
    if model.spec.head.type == "implicit":
        raise ValueError(
            "an implicit value guides as what it is, the log-ratio of two language models: "
            "posttrain.decoding.model_scores.LogRatio(plus=model_distribution(trained), minus=model_distribution(base))"
        )
    per_token = model.spec.head.type == "per_token"
    if sees_all_before(model.decoder.config):
        return CachedNextTokenValueScore(model) if per_token else CachedValueScore(model)
    score = NextTokenValueScore if per_token else ValueScore
    return score(model, kind=model.spec.kind, beta=model.spec.beta, scale=model.spec.scale)


class CachedValueScore:
    """The value of a ``ValueModel``, with a cache of the last call's prefixes and their candidates.

    Args:
        model: all of its layers attend to all that came before.
    """

    def __init__(self, model: Any) -> None:
        self.kind: ScoreKind = model.spec.kind
        self.beta: float | None = model.spec.beta
        self.scale: float = model.spec.scale
        self.candidate_cache = CandidateCache(model)
        self.prefix_cache = PrefixCache(model)
        self._value = head_value(model)

    @torch.inference_mode()
    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        hidden = self.candidate_cache.known([tuple(prefix.tokens) for prefix in prefixes])
        return self._value(self.prefix_cache.read(prefixes) if hidden is None else hidden)

    @torch.inference_mode()
    def score_candidates(self, prefixes: Sequence[Prefix], candidates: Int[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """See :class:`posttrain.decoding.prefixes.CandidateScore`."""
        return self._value(self.candidate_cache.read([tuple(prefix.tokens) for prefix in prefixes], candidates))


class CachedNextTokenValueScore:
    """The values that a per-token (Q or twist) head gives to every next token; only the last token is read.

    Args:
        model: all of its layers attend to all that came before.
    """

    def __init__(self, model: Any) -> None:
        self.kind: ScoreKind = model.spec.kind
        self.beta: float | None = model.spec.beta
        self.scale: float = model.spec.scale
        self.candidate_cache = CandidateCache(model)
        self._uncached = NextTokenValueScore(model, kind=self.kind, beta=self.beta, scale=self.scale)

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        return self._uncached.score(prefixes)

    @torch.inference_mode()
    def score_next(self, prefixes: Sequence[Prefix]) -> Float[Tensor, "M V"]:
        """See :class:`posttrain.decoding.prefixes.NextTokenScore`."""
        if any(len(prefix.tokens) < 2 for prefix in prefixes):
            return self._uncached.score_next(prefixes)
        last = torch.tensor([[prefix.tokens[-1]] for prefix in prefixes])
        hidden = self.candidate_cache.read([tuple(prefix.tokens[:-1]) for prefix in prefixes], last)
        return self.candidate_cache.model.next_values(hidden[:, 0])


class CandidateCache:
    """Reads the hidden states of a value model at candidate tokens by one forward pass over the candidates.

    It holds keys and values of the last call's prefixes and candidates, and forgets them when the model's weights are
    changed in place, as optimisers and ``load_state_dict`` do.

    Args:
        model: a ``posttrain.models.value.ValueModel``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.computed = {"prefixes": 0, "candidates": 0}  # read in whole, and read as candidates
        self._weights_version = 0
        self._forget()

    def _forget(self) -> None:
        self._rows: dict[tuple[int, ...], int] = {}  # what each row has read
        self._memory: list[Memory] = []
        self._state: Tensor = torch.empty(0)  # [M, H], at the last token of each row
        self._candidates: list[dict[int, int]] = []  # token -> column, for each row
        self._candidate_memory: list[Memory] = []
        self._candidate_states: Tensor = torch.empty(0)  # [M, K, H]

    def _check_weights(self) -> None:
        version = sum(parameter._version for parameter in self.model.parameters())
        if version != self._weights_version:
            self._forget()
            self._weights_version = version

    def known(self, prefixes: Sequence[tuple[int, ...]]) -> Float[Tensor, "M H"] | None:
        """The hidden states at the last tokens of prefixes; None unless the last call has read all of them."""
        self._check_weights()
        rows = [self._rows.get(prefix) for prefix in prefixes]
        return None if None in rows else self._state[rows]

    def read(self, prefixes: Sequence[tuple[int, ...]], candidates: Int[Tensor, "M K"]) -> Float[Tensor, "M K H"]:
        """The hidden states at each candidate, read as the token after its prefix."""
        self._check_weights()
        device = next(self.model.parameters()).device
        self._advance(prefixes, device)
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        self._candidate_states = self._read_candidates(candidates.to(device), lengths)
        self._candidates = [{token: column for column, token in enumerate(row)} for row in candidates.tolist()]
        self.computed["candidates"] += candidates.numel()
        return self._candidate_states

    def _advance(self, keys: Sequence[tuple[int, ...]], device: torch.device) -> None:
        """Fills the rows with these prefixes: reuses rows that a candidate continues, and reads the others again."""
        known: list[tuple[int, int, int]] = []  # row now, row then, column of the candidate
        for now, key in enumerate(keys):
            then = self._rows.get(key[:-1])
            column = None if then is None else self._candidates[then].get(key[-1])
            if then is not None and column is not None:
                known.append((now, then, column))
        new = sorted(set(range(len(keys))) - {now for now, _, _ in known})
        state: list[Tensor] = [torch.empty(0)] * len(keys)
        width = max(map(len, keys))
        memory = self._moved(len(keys), width, known)
        if known:
            now, then, column = torch.tensor(known, device=device).T
            last = torch.tensor([len(keys[row]) - 1 for row, _, _ in known], device=device)
            for (row, _, _), hidden in zip(known, self._candidate_states[then, column], strict=True):
                state[row] = hidden
            for layer, added in zip(memory, self._candidate_memory, strict=True):
                for held, extra in zip(layer, added, strict=True):
                    held[now, :, last] = extra[then, :, column]
        if new:
            states, memory = self._read([keys[row] for row in new], new, memory, len(keys), width)
            for row, hidden in zip(new, states, strict=True):
                state[row] = hidden
        self._rows = {key: row for row, key in enumerate(keys)}
        self._memory, self._state = memory, torch.stack(state)

    def _moved(self, rows: int, width: int, known: Sequence[tuple[int, int, int]]) -> list[Memory]:
        """The cache of the last call with its rows in their new places and room for ``width`` columns."""
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
        self, prefixes: Sequence[tuple[int, ...]], at: list[int], memory: list[Memory], rows: int, width: int
    ) -> tuple[Float[Tensor, "new H"], list[Memory]]:
        """Reads whole prefixes into their rows and returns the hidden states at their last tokens."""
        device = next(self.model.parameters()).device
        tokens, lengths = padded([Prefix(tokens=prefix, start=0) for prefix in prefixes], device)
        cache = DynamicCache(config=self.model.decoder.config)
        hidden = forward_hidden(self.model, input_ids=tokens, past_key_values=cache, use_cache=True)
        read: list[Memory] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc]
        memory = memory or [(_room(keys, rows, width), _room(values, rows, width)) for keys, values in read]
        for layer, added in zip(memory, read, strict=True):
            for held, extra in zip(layer, added, strict=True):
                held[at, :, : tokens.shape[1]] = extra
        self.computed["prefixes"] += len(prefixes)
        return hidden[torch.arange(len(prefixes), device=device), lengths - 1], memory

    def _read_candidates(self, candidates: Int[Tensor, "M K"], lengths: Int[Tensor, " M"]) -> Float[Tensor, "M K H"]:
        """Attention mask and positions: each candidate sees its prefix and itself, at the position after the prefix."""
        width = int(lengths.max())
        layers = [BesideLayer(keys[:, :, :width], values[:, :, :width]) for keys, values in self._memory]
        cache = DynamicCache()
        cache.layers.extend(layers)
        itself = torch.eye(candidates.shape[1], dtype=torch.bool, device=candidates.device)
        hidden = forward_hidden(
            self.model,
            input_ids=candidates,
            position_ids=lengths[:, None].expand_as(candidates),
            attention_mask=visible(lengths, width, itself),
            past_key_values=cache,
            use_cache=True,
        )
        self._candidate_memory = [layer.added for layer in layers]
        return hidden


def _room(like: Float[Tensor, "m heads columns size"], rows: int, width: int) -> Float[Tensor, "rows heads room size"]:
    return like.new_zeros(rows, like.shape[1], width + ROOM, like.shape[3])
