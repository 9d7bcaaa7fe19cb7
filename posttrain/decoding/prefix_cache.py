"""Hidden states at the ends of prefixes that grow by blocks, with a cache: no token is read twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from posttrain.decoding.prefixes import Prefix
from posttrain.models.adapters import active_adapter

ROWS = 64
"""Most prefixes in one forward pass."""
MEMORY_MB = 2048
"""Most memory of the keys and values that are kept between calls; prefixes beyond it are read again."""

Memory = tuple[Float[Tensor, "M heads columns size"], Float[Tensor, "M heads columns size"]]
"""Keys and values of one layer."""


class BesideLayer(DynamicLayer):
    """A cache layer with the unchanged keys and values of prefixes beside those of new tokens."""

    def __init__(self, keys: Float[Tensor, "M heads P size"], values: Float[Tensor, "M heads P size"]) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._held: Memory = (keys, values)
        self.added: Memory = (keys[:, :, :0], values[:, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, of prefixes and of new tokens."""
        self.added = key_states, value_states
        keys, values = self._held
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def forward_hidden(model: Any, **inputs: Any) -> Float[Tensor, "M columns H"]:
    """The last hidden states of a ``ValueModel``, through its own adapter if it has one."""
    adapter: AbstractContextManager[None] = nullcontext()
    if model.adapter is not None:
        adapter = active_adapter(model.backbone, model.adapter)
    grouped: AbstractContextManager[None] = nullcontext()
    if "attention_mask" in inputs:
        grouped = _grouped(model.decoder.config)
        if model.decoder.config._attn_implementation == "eager":
            inputs["attention_mask"] = added_to_logits(inputs["attention_mask"], next(model.parameters()).dtype)
    with adapter, grouped:
        return model.decoder(**inputs).last_hidden_state


def added_to_logits(mask: Bool[Tensor, "*B all"], dtype: torch.dtype) -> Float[Tensor, "*B all"]:
    """The mask as numbers that the eager kernel adds to attention logits, where it would add booleans as 0 and 1."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@contextmanager
def _grouped(config: Any) -> Iterator[None]:
    """Attention with :func:`grouped_attention` in place of transformers' own call of the same PyTorch function."""
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "m heads columns size"],
    key: Float[Tensor, "m groups all size"],
    value: Float[Tensor, "m groups all size"],
    attention_mask: Bool[Tensor, "m 1 columns all"],
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "m columns heads size"], None]:
    """Attention of several heads to shared keys and values, which are not copied for each head.

    Heads that share them (Ainslie et al. 2023, arXiv:2305.13245) stand beside each other as more queries: where there
    are few queries and many keys the copies would take most of the time.
    """
    rows, heads, columns, size = query.shape
    sharing = heads // key.shape[1]
    queries = query.reshape(rows, key.shape[1], sharing * columns, size)
    mask = attention_mask.repeat(1, 1, sharing, 1)
    out = nn.functional.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, columns, size).transpose(1, 2).contiguous(), None


GROUPED = "posttrain_grouped"
AttentionInterface.register(GROUPED, grouped_attention)


def visible(
    stems: Int[Tensor, " m"], past: int, among_new: Bool[Tensor, "new new"]
) -> Bool[Tensor, "m 1 new past+new"]:
    """The attention mask of new tokens: the columns of the row's stem, and the new tokens that each may see.

    Args:
        stems: how many of the ``past`` columns are a row's own.
        among_new: which new token sees which.
    """
    column = torch.arange(past, device=stems.device)
    before = (column < stems[:, None])[:, None, None].expand(-1, 1, len(among_new), -1)
    return torch.cat([before, among_new.expand(len(stems), 1, -1, -1)], -1)


@dataclass(slots=True)
class StoredPrefixes:
    """Keys and values of prefixes that may be continued in the next call."""

    rows: dict[int, int] = field(default_factory=dict)  # running hash of the tokens -> row
    tokens: list[Sequence[int]] = field(default_factory=list)  # of each row
    memory: list[Memory] = field(default_factory=list)

    def stem(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The row and length of the longest stored beginning of these tokens, at most all but the last one."""
        found, running = (0, 0), 0
        for length, token in enumerate(tokens[:-1], start=1):
            running = hash((running, token))
            row = self.rows.get(running)
            if row is not None and len(self.tokens[row]) == length and list(self.tokens[row]) == list(tokens[:length]):
                found = row, length
        return found


def running_hash(tokens: Sequence[int]) -> int:
    """The hash under which :class:`StoredPrefixes` stores a prefix."""
    running = 0
    for token in tokens:
        running = hash((running, token))
    return running


class PrefixCache:
    """Reads hidden states at the last tokens of prefixes. A prefix of the last call costs its new tokens only.

    So do all continuations of a particle of which blockwise decoding, beams and SMC sample several. It forgets when the
    model's weights are changed in place.

    Args:
        model: a ``posttrain.models.value.ValueModel`` all of whose layers attend to all that came before.
        memory_mb: most memory for keys and values, in MiB.
    """

    def __init__(self, model: Any, memory_mb: int = MEMORY_MB) -> None:
        self.model = model
        self.tokens_read = 0
        self._limit = memory_mb << 20
        self._kept = StoredPrefixes()
        self._weights_version = 0

    @torch.inference_mode()
    def read(self, prefixes: Sequence[Prefix]) -> Float[Tensor, "M H"]:
        """The hidden state at the last token of each prefix. Prefixes that have not ended are kept in the cache."""
        version = sum(parameter._version for parameter in self.model.parameters())
        if version != self._weights_version:
            self._kept, self._weights_version = StoredPrefixes(), version
        stems = [self._kept.stem(prefix.tokens) for prefix in prefixes]
        new = [len(prefix.tokens) - length for prefix, (_, length) in zip(prefixes, stems, strict=True)]
        order = sorted(range(len(prefixes)), key=new.__getitem__)
        going = [i for i in order if prefixes[i].finish is None]
        kept, hidden = self._room([prefixes[i].tokens for i in going]), [torch.empty(0)] * len(prefixes)
        row_of = {i: row for row, i in enumerate(going)} if kept.tokens else {}
        for start in range(0, len(order), ROWS):
            chunk = order[start : start + ROWS]
            lengths = torch.tensor([stems[i][1] for i in chunk])
            held = self._held([stems[i][0] for i in chunk], int(lengths.max()))
            last, added = self._forward([prefixes[i].tokens for i in chunk], lengths, held)
            for i, state in zip(chunk, last, strict=True):
                hidden[i] = state
            self.tokens_read += sum(new[i] for i in chunk)
            places = [(place, row_of[i]) for place, i in enumerate(chunk) if i in row_of]
            _remember(kept, places, lengths, [new[i] for i in chunk], held, added)
        self._kept = kept
        return torch.stack(hidden)

    def _held(self, rows: Sequence[int], width: int) -> list[Memory]:
        """Keys and values of these rows; empty if none of them is stored."""
        if width == 0:
            return []
        return [(keys[rows, :, :width], values[rows, :, :width]) for keys, values in self._kept.memory]

    def _forward(
        self, prefixes: Sequence[Sequence[int]], stems: Int[Tensor, " m"], held: list[Memory]
    ) -> tuple[Float[Tensor, "m H"], list[Memory]]:
        """Hidden states at the ends of the rows, and keys and values of the tokens after the stems."""
        device = next(self.model.parameters()).device
        suffixes = [list(tokens[stem:]) for tokens, stem in zip(prefixes, stems.tolist(), strict=True)]
        lengths = torch.tensor([len(suffix) for suffix in suffixes], device=device)
        width = int(lengths.max())
        tokens = torch.tensor([suffix + [0] * (width - len(suffix)) for suffix in suffixes], device=device)
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
        cache = DynamicCache(config=self.model.decoder.config)
        if held:
            stems = stems.to(device)
            cache = DynamicCache()
            cache.layers.extend(BesideLayer(*layer) for layer in held)
            inputs["position_ids"] = stems[:, None] + torch.arange(width, device=device)
            causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
            inputs["attention_mask"] = visible(stems, held[0][0].shape[2], causal)
        hidden = forward_hidden(self.model, past_key_values=cache, **inputs)
        added: list[Memory] = [
            layer.added if isinstance(layer, BesideLayer) else (layer.keys, layer.values)  # type: ignore[misc]
            for layer in cache.layers
        ]
        return hidden[torch.arange(len(tokens), device=device), lengths - 1], added

    def _room(self, prefixes: Sequence[Sequence[int]]) -> StoredPrefixes:
        """Memory for the keys and values of these prefixes; None if it would be too much."""
        config = self.model.decoder.config.get_text_config()
        parameter = next(self.model.parameters())
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(prefixes), heads, max(map(len, prefixes), default=0), size)
        dtype = self.model.decoder.dtype
        numbers = 2 * config.num_hidden_layers * torch.Size(shape).numel()
        if not prefixes or numbers * dtype.itemsize > self._limit:
            return StoredPrefixes()
        rows = {running_hash(tokens): row for row, tokens in enumerate(prefixes)}
        memory: list[Memory] = [
            (parameter.new_zeros(shape, dtype=dtype), parameter.new_zeros(shape, dtype=dtype))
            for _ in range(config.num_hidden_layers)
        ]
        return StoredPrefixes(rows, list(prefixes), memory)


def _remember(
    kept: StoredPrefixes,
    places: Sequence[tuple[int, int]],
    stems: Int[Tensor, " m"],
    new: Sequence[int],
    held: list[Memory],
    added: list[Memory],
) -> None:
    """Writes keys and values of a chunk into their rows: first those of the stems, then those of new tokens.

    Args:
        places: of those that are kept: place in the chunk, and row.
    """
    if not places:
        return
    device = added[0][0].device
    place, row = torch.tensor(places, device=device).T
    stems, count = stems.to(device)[place], torch.tensor(new, device=device)[place]
    one, column = (torch.arange(added[0][0].shape[2], device=device) < count[:, None]).nonzero().T
    for number, layer in enumerate(kept.memory):
        for part, room in enumerate(layer):
            if held:
                past = held[number][part]
                width = min(past.shape[2], room.shape[2])
                room[row, :, :width] = past[place, :, :width]
            room[row[one], :, stems[one] + column] = added[number][part][place[one], :, column]
