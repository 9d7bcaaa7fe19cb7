"""An exact world behind the interface of an engine: the next-token law of every prefix stands in a table.

For tests of decoders and of training: whatever runs on it can be compared with what enumeration says.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Finish
from posttrain.engines.base import Completion, OnCompletion, Row, Sampling, Shaper, sample_seed
from posttrain.engines.choice import Chooser, MakeChooser, seeded_chooser
from posttrain.engines.requests import check_prompts, check_shaper
from posttrain.engines.sampling import filters
from posttrain.engines.weights import load_verified


class TabularEngine:
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
        self.version = 0
        self._row = {prefix: row for row, prefix in enumerate(logits)}
        self._logits = torch.tensor([list(values) for values in logits.values()], dtype=torch.float64)
        self._eos = tuple(eos)
        self._max_model_len = max_model_len or 1 + max(map(len, logits))
        self._make_chooser = make_chooser
        self._fresh_seeds = random.Random(seed)

    def next_logps(self, prefixes: Sequence[Sequence[int]], temperature: float = 1.0) -> Float[Tensor, "M V"]:
        """The law of the next token after each prefix.

        Raises:
            ValueError: for a prefix that is not in the table.
        """
        return (self._next_logits(prefixes) / temperature).log_softmax(-1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
        shaper: Shaper | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.ShapingEngine.generate`."""
        check_prompts(prompts, sampling.max_tokens, self._max_model_len)
        check_shaper(shaper, sampling)
        if seeds is None:
            seeds = [self._fresh_seeds.getrandbits(63) for _ in prompts]
        running = [
            _Sampled(i, j, len(prompt), list(prompt), self._make_chooser(sample_seed(seeds[i], j)))
            for i, prompt in enumerate(prompts)
            for j in range(n)
        ]
        done: list[list[Completion]] = [[None] * n for _ in prompts]  # type: ignore[list-item]
        while running:
            self._step(running, sampling, shaper)
            going = []
            for row in running:
                if (finish := self._finish(row, sampling)) is None:
                    going.append(row)
                    continue
                completion = Completion(row.tokens[row.start :], row.logps, finish, self.version)
                done[row.prompt][row.sample] = completion
                if on_completion is not None:
                    on_completion(row.prompt, row.sample, completion)
            running = going
        return done

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`."""

        def copy(stream: Iterable[tuple[str, Tensor]]) -> None:
            for _, tensor in stream:
                self._logits.copy_(tensor)

        load_verified(tensors, {"logits": self._logits}, copy)
        self.version = version

    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`."""

    def _next_logits(self, prefixes: Sequence[Sequence[int]]) -> Float[Tensor, "M V"]:
        for prefix in prefixes:
            if tuple(prefix) not in self._row:
                raise ValueError(f"the table has no prefix {list(prefix)}")
        return self._logits[[self._row[tuple(prefix)] for prefix in prefixes]]

    def _step(self, rows: Sequence[_Sampled], sampling: Sampling, shaper: Shaper | None) -> None:
        """Draws one token for each row."""
        logits = self._next_logits([row.tokens for row in rows])
        if sampling.temperature > 0:
            logits = filters(sampling)(None, logits / sampling.temperature)  # type: ignore[arg-type]
        logps = logits.log_softmax(-1)
        if shaper is not None:
            logps = shaper(logps, [Row(row.prompt, row.sample, row.start, row.tokens) for row in rows])
        probabilities, best = logps.exp().tolist(), logps.argmax(-1).tolist()
        for row, law, token, values in zip(rows, probabilities, best, logps.tolist(), strict=True):
            drawn = row.choose(law) if sampling.temperature > 0 else token
            row.tokens.append(drawn)
            row.logps.append(values[drawn])

    def _finish(self, row: _Sampled, sampling: Sampling) -> Finish | None:
        stops = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *self._eos)
        if row.tokens[-1] in stops:
            return Finish.STOPPED
        return Finish.LENGTH if len(row.logps) == sampling.max_tokens else None


@dataclass(slots=True)
class _Sampled:
    """A completion in the making."""

    prompt: int
    sample: int
    start: int  # length of the prompt
    tokens: list[int]  # prompt included
    choose: Chooser
    logps: list[float] = field(default_factory=list)
