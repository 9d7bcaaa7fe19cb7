"""Scores made of models: value models, and log-ratios of language models.

Tokens are padded on the right, where causal attention cannot see them. M prefixes, V tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posttrain.decoding.prefixes import Prefix, ScoreKind

ROWS = 64
"""Most prefixes in one forward pass."""

Distribution = Callable[[Sequence[Prefix]], tuple[Float[Tensor, " M"], Float[Tensor, "M V"]]]
"""A language model's distribution: the log-prob of each prefix's generated tokens, and of every next token."""


HiddenValue = Callable[[Float[Tensor, "*S H"]], Float[Tensor, "*S"]]
"""A value of last-layer hidden states (after the final norm), in float32."""


@dataclass(frozen=True, kw_only=True)
class LogRatio:
    """Σ_t log p⁺(token_t) - log p⁻(token_t) over what was generated, under two language models or one of them.

    GenARM: p⁺ = an autoregressive reward model (Xu et al. 2024, arXiv:2410.08193).
    Proxy tuning: a small tuned model and the same untuned (Liu et al. 2024, arXiv:2401.08565).
    Contrastive decoding: p⁻ = a small model (Li et al. 2022, arXiv:2210.15097).
    Implicit reward: a tuned policy and its reference (Rafailov et al. 2023, eq. 5, arXiv:2305.18290).
    """

    plus: Distribution | None = None
    minus: Distribution | None = None
    kind: ScoreKind = "other"
    beta: None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.plus is None and self.minus is None:
            raise ValueError("a log-ratio needs `plus`, `minus` or both")

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        return self.scale * sum(sign * distribution(prefixes)[0] for sign, distribution in self._distributions())  # type: ignore[return-value]

    def score_next(self, prefixes: Sequence[Prefix]) -> Float[Tensor, "M V"]:
        """See :class:`posttrain.decoding.prefixes.NextTokenScore`."""
        parts = [(sign, *distribution(prefixes)) for sign, distribution in self._distributions()]
        return self.scale * sum(sign * (path[:, None] + following) for sign, path, following in parts)  # type: ignore

    def _distributions(self) -> list[tuple[float, Distribution]]:
        return [
            (sign, distribution)
            for sign, distribution in ((1.0, self.plus), (-1.0, self.minus))
            if distribution is not None
        ]


def model_distribution(model: nn.Module, *, temperature: float = 1.0) -> Distribution:
    """The distribution of a Hugging Face language model, whose vocabulary must be that of the model that generates."""

    @torch.inference_mode()
    def distribution(prefixes: Sequence[Prefix]) -> tuple[Float[Tensor, " M"], Float[Tensor, "M V"]]:
        paths, following = [], []
        for rows in _chunks(prefixes):
            tokens, lengths = padded(rows, _device(model))
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float() / temperature
            logps = logits.log_softmax(-1)
            chosen = logps[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            column = torch.arange(1, tokens.shape[1], device=tokens.device)
            start = torch.tensor([row.start for row in rows], device=tokens.device)[:, None]
            inside = (column >= start) & (column < lengths[:, None])
            paths.append(chosen.where(inside, 0.0).sum(-1))
            following.append(logps[torch.arange(len(rows)), lengths - 1])
        return torch.cat(paths), torch.cat(following)

    return distribution


@dataclass(frozen=True)
class ValueScore:
    """The value that a model gives to each prefix, in reward units: at its last token.

    Args:
        model: ``forward(tokens [N, L], states [N, L]) -> (value [N, L], ...)``, such as a ``ValueModel``.
    """

    model: nn.Module
    kind: ScoreKind = "mean"
    beta: float | None = None
    scale: float = 1.0

    @torch.inference_mode()
    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        return torch.cat(values_at(self.model, prefixes, [[len(prefix.tokens) - 1] for prefix in prefixes]))


def values_at(
    model: nn.Module, prefixes: Sequence[Prefix], columns: Sequence[Sequence[int]]
) -> list[Float[Tensor, " C"]]:
    """The values of the beginnings of each prefix that end at some columns, in ascending order."""
    found: list[Tensor] = []
    for start in range(0, len(prefixes), ROWS):
        tokens, _ = padded(prefixes[start : start + ROWS], _device(model))
        at = torch.zeros_like(tokens, dtype=torch.bool)
        for row, its in zip(at, columns[start : start + ROWS], strict=True):
            row[list(its)] = True
        outputs = model(tokens, at)
        values = outputs[0] if isinstance(outputs, tuple) else outputs
        found += [own[ends] for own, ends in zip(values, at, strict=True)]
    return found


AGGREGATES: Mapping[str, Callable[[Float[Tensor, " K"]], Float[Tensor, ""]]] = {
    "product": torch.prod,
    "min": torch.min,
    "mean": torch.mean,
    "last": lambda values: values[-1],
}


@dataclass(frozen=True)
class StepScore:
    """A process model's values of the steps of a completion, each read at its last token, as one number.

    Args:
        model: as for :class:`ValueScore`.
        steps: the step of each token that was generated, from 0 on.
        aggregate: of ``AGGREGATES``.
    """

    model: nn.Module
    steps: Callable[[Sequence[int]], Int[Tensor, " L"]]
    aggregate: str
    kind: ScoreKind = "other"
    beta: None = None
    scale: float = 1.0

    @torch.inference_mode()
    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`. A prompt alone counts as a step."""
        values = values_at(self.model, prefixes, [self._ends(prefix) for prefix in prefixes])
        return torch.stack([AGGREGATES[self.aggregate](own) for own in values])

    def _ends(self, prefix: Prefix) -> list[int]:
        """The columns of the last token of every step."""
        numbers = self.steps(prefix.generated).tolist() if prefix.generated else []
        inner = [column for column, (one, following) in enumerate(itertools.pairwise(numbers)) if one != following]
        return [*(prefix.start + column for column in inner), len(prefix.tokens) - 1]


class NextTokenValueScore(ValueScore):
    """The values that a per-token (Q or twist) head gives to every next token, from one forward pass a prefix."""

    @torch.inference_mode()
    def score_next(self, prefixes: Sequence[Prefix]) -> Float[Tensor, "M V"]:
        """See :class:`posttrain.decoding.prefixes.NextTokenScore`."""
        model: Any = self.model
        values = []
        for rows in _chunks(prefixes):
            tokens, lengths = padded(rows, _device(model))
            values.append(model.next_values(model.hidden_states(tokens)[last_token(tokens, lengths)]))
        return torch.cat(values)


def head_value(model: Any) -> HiddenValue:
    """The head of a ``ValueModel`` as a function of hidden states, in reward units."""

    def value(hidden: Float[Tensor, "*S H"]) -> Float[Tensor, "*S"]:
        decoded = model.head.decode(model.head(hidden))
        return model.reduce((model.spec.shift + model.spec.scale * decoded).movedim(-1, 0))

    return value


def padded(prefixes: Sequence[Prefix], device: torch.device) -> tuple[Int[Tensor, "M L"], Int[Tensor, " M"]]:
    """Tokens of prefixes, padded on the right with 0, and their lengths."""
    lengths = [len(prefix.tokens) for prefix in prefixes]
    width = max(lengths)
    rows = [[*prefix.tokens, *([0] * (width - length))] for prefix, length in zip(prefixes, lengths, strict=True)]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)


def last_token(tokens: Int[Tensor, "M L"], lengths: Int[Tensor, " M"]) -> Bool[Tensor, "M L"]:
    """True at the last token of each row."""
    return torch.arange(tokens.shape[1], device=tokens.device) == lengths[:, None] - 1


def _chunks(prefixes: Sequence[Prefix]) -> list[Sequence[Prefix]]:
    return [prefixes[start : start + ROWS] for start in range(0, len(prefixes), ROWS)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
