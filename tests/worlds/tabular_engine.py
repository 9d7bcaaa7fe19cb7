"""An exact world behind the interface of an engine: the next-token distribution of every prefix stands in a table.

For tests of decoders and of training: whatever runs on it can be compared with what enumeration says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Finish
from posttrain.engines.base import Request, Row, Sampling
from posttrain.engines.choice import Chooser, MakeChooser, seeded_chooser
from posttrain.engines.requests import stop_ids
from posttrain.engines.sampling import filters
from posttrain.engines.stepping import SteppingEngine
from posttrain.engines.weights import load_verified


class TabularEngine(SteppingEngine):
    """Samples from a table, in float64.

    Its one tensor is ``logits``, [prefixes, V], in the order of the mapping it was made from.

    Args:
        logits: for each prefix, prompt included, the logits of the next token; all of one length V.
        eos: tokens that end a completion.
        max_model_len: most tokens of a prompt and its completion together; default: those of the longest prefix and
            one more.
        make_chooser: where random choices come from, by the sample's seed.
        seed: of the seeds drawn where ``generate`` is given none.
    """

    def __init__(
        self,
        logits: Mapping[tuple[int, ...], Sequence[float]],
        *,
        eos: Sequence[int] = (),
        max_model_len: int | None = None,
        make_chooser: MakeChooser = seeded_chooser,
        seed: int = 0,
    ) -> None:
        super().__init__(max_model_len=max_model_len or 1 + max(map(len, logits)), seed=seed)
        self._row = {prefix: row for row, prefix in enumerate(logits)}
        self._logits = torch.tensor([list(values) for values in logits.values()], dtype=torch.float64)
        self._eos = tuple(eos)
        self._make_chooser = make_chooser
        self._running: dict[int, _Sampled] = {}

    def next_logps(self, prefixes: Sequence[Sequence[int]], temperature: float = 1.0) -> Float[Tensor, "M V"]:
        """The distribution of the next token after each prefix.

        Raises:
            ValueError: for a prefix that is not in the table.
        """
        return (self._next_logits(prefixes) / temperature).log_softmax(-1)

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`."""

        def copy(stream: Iterable[tuple[str, Tensor]]) -> None:
            for _, tensor in stream:
                self._logits.copy_(tensor)

        load_verified(tensors, {"logits": self._logits}, copy)
        self.version = version

    def forget_prefixes(self) -> None:
        """Does nothing: a table has no cache."""

    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`."""

    def _next_logits(self, prefixes: Sequence[Sequence[int]]) -> Float[Tensor, "M V"]:
        for prefix in prefixes:
            if tuple(prefix) not in self._row:
                raise ValueError(f"the table has no prefix {list(prefix)}")
        return self._logits[[self._row[tuple(prefix)] for prefix in prefixes]]

    def _add(self, number: int, request: Request) -> None:
        self._running[number] = _Sampled(request, list(request.prompt), self._make_chooser(request.seed))

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._running.pop(number, None)

    def _advance(self) -> None:
        """Draws one token for each row; rows of equal terms in one call of their shaper."""
        groups: dict[tuple[Sampling, int], dict[int, _Sampled]] = {}
        for number, row in self._running.items():
            groups.setdefault((row.request.sampling, id(row.request.shaper)), {})[number] = row
        for (sampling, _), group in groups.items():
            try:
                logps = self._sampling_logps([*group.values()], sampling)
            except Exception as error:  # told to those who asked
                for number in group:
                    del self._running[number]
                    self._fail(number, error)
                continue
            self._draw(group, sampling, logps)

    def _sampling_logps(self, rows: Sequence[_Sampled], sampling: Sampling) -> Float[Tensor, "M V"]:
        logits = self._next_logits([row.tokens for row in rows])
        if sampling.temperature > 0:
            logits = filters(sampling)(None, logits / sampling.temperature)  # type: ignore[arg-type]
        logps, shaper = logits.log_softmax(-1), rows[0].request.shaper
        if shaper is None:
            return logps
        return shaper(logps, [Row(*row.request.place, len(row.request.prompt), row.tokens) for row in rows])

    def _draw(self, rows: Mapping[int, _Sampled], sampling: Sampling, logps: Float[Tensor, "M V"]) -> None:
        probabilities, best = logps.exp().tolist(), logps.argmax(-1).tolist()
        for (number, row), distribution, token, values in zip(
            rows.items(), probabilities, best, logps.tolist(), strict=True
        ):
            drawn = row.choose(distribution) if sampling.temperature > 0 else token
            row.tokens.append(drawn)
            row.logps.append(values[drawn])
            finish = self._finish(row, sampling)
            if finish is not None:
                del self._running[number]
            if row.request.stream:
                self._grow(number, [drawn], [values[drawn]], finish)
            elif finish is not None:
                self._grow(number, row.tokens[len(row.request.prompt) :], row.logps, finish)

    def _finish(self, row: _Sampled, sampling: Sampling) -> Finish | None:
        if row.tokens[-1] in stop_ids(sampling, self._eos):
            return Finish.STOPPED
        return Finish.LENGTH if len(row.logps) == sampling.max_tokens else None


@dataclass(slots=True)
class _Sampled:
    """A completion in the making."""

    request: Request
    tokens: list[int]  # prompt included
    choose: Chooser
    logps: list[float] = field(default_factory=list)
