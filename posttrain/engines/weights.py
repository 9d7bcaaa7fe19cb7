"""Replaces an engine's weights and checks that they arrive as they were sent."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.engines.base import WeightMismatch

WIDTH = 512  # number of words that are folded into one at a time


def checksum(tensor: Tensor) -> Int[Tensor, ""]:
    """A 64-bit hash of a tensor that depends on every bit and its position, in about one pass over memory.

    The bits are read as 64-bit words; each row of ``WIDTH`` words becomes its dot product, modulo 2^64, with fixed odd
    numbers, and the rows are folded again until one word is left. Multiplying by an odd number is invertible modulo
    2^64, so a change confined to one word of a row always shows; other changes are missed with a probability of about
    2^-64. The result is on the tensor's device.
    """
    words = _words(tensor)
    while len(words) > 1:
        words = _fold(words)
    return words.sum()  # one word, or none


def _words(tensor: Tensor) -> Int[Tensor, " words"]:
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() * flat.element_size() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0:
        return flat.view(torch.int64)
    octets = flat.view(torch.uint8)
    return torch.nn.functional.pad(octets, (0, -len(octets) % 8)).view(torch.int64)


def _fold(words: Int[Tensor, " words"]) -> Int[Tensor, " rows"]:
    factors = _factors(words.device)
    whole = len(words) // WIDTH * WIDTH
    rows, rest = words[:whole].view(-1, WIDTH), words[whole:]
    if words.device.type == "cpu":  # the integer matrix product exists on CPU alone
        sums = rows @ factors
    else:
        sums = torch.cat([(part * factors).sum(-1) for part in rows.split(1 << 14)] or [rows.new_empty(0)])
    return torch.cat([sums, (rest * factors[: len(rest)]).sum(0, keepdim=True)]) if len(rest) else sums


@functools.cache
def _factors(device: torch.device) -> Int[Tensor, " width"]:
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (WIDTH,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)


def load_verified(
    tensors: Iterable[tuple[str, Tensor]],
    places: Mapping[str, Tensor],
    load: Callable[[Iterable[tuple[str, Tensor]]], object],
) -> None:
    """Streams ``tensors`` through ``load`` and checks that each reads back from its place as it was sent.

    Args:
        tensors: Hugging Face names and tensors, on any device, of any floating dtype; consumed one at a time, so that
            each can be freed after use.
        places: the engine's memory for each Hugging Face name, in the engine's dtype. Tied weights are several names
            for one memory; one of them is enough.
        load: function that copies tensors into the engine.

    Raises:
        WeightMismatch: if a tensor is unknown, has another shape, was not sent, or reads back with other bits. The
            engine's weights are then undefined.
    """
    sent: dict[str, Tensor] = {}
    load(_announced(tensors, places, sent))
    filled = {_memory(places[name]) for name in sent}
    missing = [name for name, place in places.items() if _memory(place) not in filled]
    if missing:
        raise WeightMismatch(f"{_some(missing)} of the engine's {len(places)} tensors were not sent: {_names(missing)}")
    expected = torch.stack([sums.to("cpu", non_blocking=True) for sums in sent.values()]) if sent else torch.empty(0)
    actual = torch.stack([checksum(places[name]) for name in sent]).cpu() if sent else torch.empty(0)
    altered = [name for name, same in zip(sent, (expected == actual).tolist(), strict=True) if not same]
    if altered:
        raise WeightMismatch(
            f"{_some(altered)} of {len(sent)} tensors differ between the engine and what was sent: {_names(altered)}"
        )


def _announced(
    tensors: Iterable[tuple[str, Tensor]], places: Mapping[str, Tensor], sent: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors in the engine's dtype, and writes the checksum of each to ``sent``."""
    for name, tensor in tensors:
        place = places.get(name)
        if place is None:
            raise WeightMismatch(_unknown(name, places))
        if tensor.shape != place.shape:
            raise WeightMismatch(f"{name!r} is {list(tensor.shape)}, the engine's is {list(place.shape)}")
        tensor = tensor.detach().to(place.device, place.dtype)
        sent[name] = checksum(tensor)
        yield name, tensor


def _unknown(name: str, places: Mapping[str, Tensor]) -> str:
    """Message about a tensor that the engine does not have, with the engine's tensors in the same module."""
    module = name
    beside: list[str] = []
    while "." in module and not beside:
        module = module.rpartition(".")[0]
        beside = [place for place in places if place.startswith(f"{module}.")]
    close = difflib.get_close_matches(name, beside, n=1, cutoff=0.9)
    hint = f"did you mean {close[0]!r}?" if close else f"in {module} it has {_names(beside)}"
    reason = (
        ""
        if close
        else ". The engine arranges these weights in another way than Transformers, as vLLM does for a mixture of "
        "experts, so a load cannot be checked: set engine.use: transformers"
    )
    return f"the engine's model has no tensor {name!r}; {hint if beside else 'nor its module'}{reason}"


def _memory(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _some(names: list[str]) -> str:
    return "one" if len(names) == 1 else str(len(names))


def _names(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... and {len(names) - limit} more"
