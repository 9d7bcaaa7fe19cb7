"""Token-wise shaping: an engine's next-token distribution, tilted by a score of the prefix that each token leads to.

    log π(a | s) = log p0(a | s) / T + strength · score(s a) - log Z(s)

Mudgal et al. 2023 (CD), arXiv:2310.17022; Yang and Klein 2021 (FUDGE), arXiv:2104.05218. With a soft value of
temperature β and strength 1/β the product of the π's is the tilted distribution p0(y) exp(r(y)/β) / Z (Zhao et al.
2024, proposition 3.3, arXiv:2404.17546); with a mean value it is not.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posttrain.decoding.base import Conflict, Decoder
from posttrain.decoding.kl import next_token_kl
from posttrain.decoding.prefix_scores import next_scores
from posttrain.decoding.prefixes import NextTokenScore, Prefix, PrefixScore, ScoreOption
from posttrain.engines.base import Completion, OnCompletion, Request, RequestUpdate, Row, Sampling, ShapingEngine
from posttrain.engines.stepping import SteppingEngine
from posttrain.option_types import Breadth, OpenFraction, Option, PositiveCount, facts
from posttrain.recipe.sections import SamplingSection

Rest = Literal["drop", "mean", "state", "residual"]


class GuideWarning(UserWarning):
    """Warns that the guide's value cannot give the tilted distribution that the decoder was asked for."""


def warn_unless_tilted(score: PrefixScore, strength: float) -> None:
    """Warns if shaping by this score does not give the tilted distribution p0(y) exp(r(y) / β) / Z."""
    if score.kind != "soft":
        problem = f"the score is a {score.kind} value; only a soft value makes the shaped distribution the tilted one"
    elif score.beta is None or abs(strength * score.beta - 1) > 1e-6:
        problem = f"the soft value was trained for beta {score.beta}, but strength is {strength}, not 1 / beta"
    else:
        return
    warnings.warn(f"{problem}; samples will follow another distribution", GuideWarning, stacklevel=3)


@facts(exact_logp=True, shapes_tokens=True)
class Shaped(Decoder):
    """Token-wise shaping: every token's distribution is tilted by the score of the prefix that the token leads to.

    log π(a | s) = log p0(a | s) + strength · score(s a) - log Z(s)

    Mudgal et al. 2023, arXiv:2310.17022. The equation is for candidates; ``rest`` says what other tokens get.

    Log-probs of its completions are those of the shaped distribution that they were drawn from. ``measured`` holds
    ``base_logp`` (log-prob of the completion under the engine's own distribution), ``kl`` (exact KL(π ‖ p0) of each
    step's whole distribution, summed along the completion: its mean over completions is the sequence KL in nats) and
    ``scored`` (prefixes that were scored; a vocabulary vector counts as one).

    Candidates are all tokens, or the ``k`` most probable ones, or those with p0 >= ``head`` · max p0 (contrastive
    decoding, Li et al. 2022, arXiv:2210.15097). With ``rest`` the other tokens get

    * ``drop``: probability 0 (FUDGE; ARGS, Khanov et al. 2024, arXiv:2402.01694; TQ*);
    * ``mean``: the unweighted mean of the candidates' scores (VAS, Han et al. 2024, arXiv:2405.06639, its code);
    * ``state``: the score of the state itself (IVO, Liu et al. 2025, eq. 5, arXiv:2503.02368);
    * ``residual``: the mass exp(strength · score(s)) - Σ_candidates p0 exp(strength · score), which is exact for the
      candidates if the score is a soft value and strength is 1/β; at least 0.

    Args:
        engine: its distribution is p0, at the sampling temperature; at temperature 0 the shaped mode is taken.
        score: scores prefixes, including ended ones.
        strength: λ, in 1 / reward units.
        k: number of candidates, the most probable tokens; default: all tokens.
        head: smallest probability of a candidate, as a share of the largest probability.
        rest: rule for the tokens that are no candidates.
        every: distance of shaped tokens: only tokens 0, b, 2b, ... are shaped (IVO, eq. 14).
        tilted: warn if the score cannot give the tilted distribution.

    Raises:
        ValueError: for both ``k`` and ``head``.
    """

    engine: ShapingEngine
    takes_starts = True
    scores_within_step = True

    def __init__(
        self,
        engine: ShapingEngine,
        score: ScoreOption,
        *,
        strength: float = 1.0,
        k: Breadth | None = None,
        head: OpenFraction | None = None,
        rest: Rest = "drop",
        every: PositiveCount = 1,
        tilted: bool = False,
    ) -> None:
        if k is not None and head is not None:
            raise ValueError("candidates are the `k` most probable tokens or the `head` of the distribution, not both")
        if tilted:
            warn_unless_tilted(score, strength)
        self.engine, self.score, self.strength, self.every = engine, score, strength, every
        self.k, self.head = k, head
        self.rest: Rest = rest
        self._stream = _Call(self)
        self._shaper = self._stream.shape  # one object: engines hand its rows over together
        self._places = itertools.count()

    @staticmethod
    def conflicts(options: Option, sampling: SamplingSection) -> Iterator[Conflict]:
        """Options that contradict each other."""
        if options["k"] is not None and options["head"] is not None:
            yield (
                ("head",),
                "candidates are the `k` most probable tokens or the `head` of the distribution, not both",
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
        starts: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.Engine.generate`.

        Args:
            starts: where prompts are prefixes: the length of the prompt within each.
        """
        return self._generate(prompts, sampling, n, seeds, on_completion, starts, forced=None)

    def forced(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        sampling: Sampling,
        starts: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Forced continuations with log-probs and measurements, as if the decoder had sampled them."""
        done: list[Completion | None] = [None] * len(prompts)
        for length in sorted({len(continuation) for continuation in continuations}):
            members = [i for i, continuation in enumerate(continuations) if len(continuation) == length]
            forcing = dataclasses.replace(sampling, max_tokens=length, stop_token_ids=(), ignore_eos=True)
            outputs = self._generate(
                [prompts[i] for i in members],
                forcing,
                1,
                [0] * len(members),
                None,
                None if starts is None else [starts[i] for i in members],
                forced=[continuations[i] for i in members],
            )
            for i, (completion,) in zip(members, outputs, strict=True):
                done[i] = completion
        return done  # type: ignore[return-value]

    def submit(self, request: Request, *, strength: float | None = None) -> int:
        """See :meth:`posttrain.engines.stepping.SteppingEngine.submit`; the engine's ``step`` and ``abort`` serve both.

        Requests of different strengths are scored together, each tilted by its own.

        Args:
            strength: instead of the decoder's.

        Raises:
            TypeError: for an engine that does not take requests one by one.
        """
        if not isinstance(self.engine, SteppingEngine):
            raise TypeError(f"a {type(self.engine).__name__} does not take requests one by one")
        place = next(self._places), 0

        def on_update(update: RequestUpdate) -> None:
            if update.completion is not None:
                measured = self._stream.measured(*place, update.completion)
                update = dataclasses.replace(update, completion=measured)
            if update.ended:
                self._stream.rows.pop(place)
            request.on_update(update)

        own = dataclasses.replace(request, shaper=self._shaper, place=place, on_update=on_update)
        number = self.engine.submit(own)
        strength = self.strength if strength is None else strength
        self._stream.rows[place] = _Path(start=len(request.prompt), strength=strength)
        return number

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        seeds: Sequence[int] | None,
        on_completion: OnCompletion | None,
        starts: Sequence[int] | None,
        *,
        forced: Sequence[Sequence[int]] | None,
    ) -> list[list[Completion]]:
        starts = [len(prompt) for prompt in prompts] if starts is None else starts
        call = _Call(self)
        for i, start in enumerate(starts):
            for j in range(n):
                call.rows[i, j] = _Path(start, self.strength, None if forced is None else forced[i])

        def report(prompt: int, sample: int, completion: Completion) -> None:
            if on_completion is not None:
                on_completion(prompt, sample, call.measured(prompt, sample, completion))

        outputs = self.engine.generate(prompts, sampling, n, seeds=seeds, on_completion=report, shaper=call.shape)
        return [[call.measured(i, j, c) for j, c in enumerate(group)] for i, group in enumerate(outputs)]

    def distribution(
        self, logp0: Float[Tensor, "B V"], prefixes: Sequence[Prefix], strength: Float[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B V"], int]:
        """The shaped distribution of the next token, and the number of prefixes that were scored.

        Args:
            strength: of each row; default: the decoder's.
        """
        each = logp0.new_full((len(prefixes),), self.strength) if strength is None else strength
        if self.k is None and self.head is None and isinstance(self.score, NextTokenScore):
            values = self.score.score_next(prefixes).to(logp0)
            return (logp0 + each[:, None] * values).log_softmax(-1), len(prefixes)
        candidates, valid = choose_candidates(logp0, k=self.k, head=self.head)
        values = next_scores(self.score, prefixes, candidates).to(logp0)
        scored = len(prefixes) if isinstance(self.score, NextTokenScore) else candidates.numel()
        state = None
        if self.rest in ("state", "residual"):
            state = each * self.score.score(prefixes).to(logp0)
            scored += len(prefixes)
        return shaped_distribution(
            logp0, candidates, each[:, None] * values, valid, rest=self.rest, state=state
        ), scored


@dataclass(slots=True)
class _Path:
    """State of one row. Engines may ask for the same position twice."""

    start: int  # length of the prompt, where the row's own prompt is a prefix
    strength: float
    forced: Sequence[int] | None = None  # the only tokens that may be drawn
    kl: dict[int, float] = field(default_factory=dict)  # by position
    scored: dict[int, int] = field(default_factory=dict)
    logps: dict[int, tuple[float, float]] = field(
        default_factory=dict
    )  # of tokens, under the base and shaped distributions
    last: tuple[int, Float[Tensor, " V"], Float[Tensor, " V"]] | None = None  # position and both distributions

    def settle(self, tokens: Sequence[int]) -> None:
        """Records the log-probs of the token that was drawn from the last distribution."""
        if self.last is not None and self.last[0] < len(tokens):
            position, base, shaped = self.last
            self.logps[position] = float(base[tokens[position]]), float(shaped[tokens[position]])


class _Call:
    """A shaper that identifies rows by prompt and sample."""

    def __init__(self, decoder: Shaped) -> None:
        self.decoder = decoder
        self.rows: dict[tuple[int, int], _Path] = {}

    def shape(self, logp0: Float[Tensor, "B V"], rows: Sequence[Row]) -> Float[Tensor, "B V"]:
        paths = [self.rows[row.prompt, row.sample] for row in rows]
        positions = [len(row.tokens) - row.start for row in rows]
        for path, row in zip(paths, rows, strict=True):
            path.settle(row.tokens[row.start :])
        shaped = logp0.clone()
        generated = [len(row.tokens) - path.start for path, row in zip(paths, rows, strict=True)]
        now = [index for index, count in enumerate(generated) if count % self.decoder.every == 0]
        cost = [0] * len(rows)
        if now:
            prefixes = [Prefix(tokens=rows[i].tokens, start=paths[i].start) for i in now]
            strengths = logp0.new_tensor([paths[i].strength for i in now])
            shaped[now], scored = self.decoder.distribution(logp0[now], prefixes, strengths)
            for index in now:
                cost[index] = scored // len(now)
        kl = next_token_kl(shaped, logp0).tolist()
        for index, (path, position) in enumerate(zip(paths, positions, strict=True)):
            path.kl[position], path.scored[position] = kl[index], cost[index]
            path.last = position, logp0[index], shaped[index]
        if paths[0].forced is None:
            return shaped
        forced = [path.forced or () for path in paths]
        return _only(shaped, [tokens[position] for tokens, position in zip(forced, positions, strict=True)])

    def measured(self, prompt: int, sample: int, completion: Completion) -> Completion:
        """The completion with its measurements. Forced completions also get the shaped distribution's log-probs."""
        path = self.rows[prompt, sample]
        path.settle(completion.tokens)
        positions = range(len(completion.tokens))
        measured = {
            "generated": float(len(positions)),
            "scored": float(sum(path.scored[position] for position in positions)),
            "kl": sum(path.kl[position] for position in positions),
            "base_logp": sum(path.logps[position][0] for position in positions),
        }
        logps = completion.logps if path.forced is None else [path.logps[position][1] for position in positions]
        return dataclasses.replace(completion, logps=logps, measured=measured)


def _only(shaped: Float[Tensor, "B V"], tokens: Sequence[int]) -> Float[Tensor, "B V"]:
    """Log-probs that put all probability on one token of each row."""
    distribution = torch.full_like(shaped, -torch.inf)
    distribution[torch.arange(len(tokens)), list(tokens)] = 0.0
    return distribution


def choose_candidates(
    logp0: Float[Tensor, "B V"], *, k: int | None = None, head: float | None = None
) -> tuple[Int[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Tokens to score, most probable first, and a mask of the candidates: with ``head`` their number differs by row."""
    if head is not None:
        inside = logp0 >= logp0.amax(-1, keepdim=True) + torch.tensor(head).log().to(logp0)
        k = int(inside.sum(-1).max())
    top, candidates = logp0.topk(min(k or logp0.shape[-1], logp0.shape[-1]), -1)
    if head is None:
        return candidates, torch.ones_like(candidates, dtype=torch.bool)
    return candidates, inside.gather(-1, candidates)


def shaped_distribution(
    logp0: Float[Tensor, "B V"],
    candidates: Int[Tensor, "B K"],
    values: Float[Tensor, "B K"],
    valid: Bool[Tensor, "B K"],
    *,
    rest: Rest,
    state: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B V"]:
    """log π(a) = log p0(a) + values(a) - log Z for candidates; the rule ``rest`` for all other tokens.

    Args:
        logp0: log-probs, normalised.
        values: strength · score of each candidate.
        valid: which are candidates indeed.
        state: strength · score of the state, for ``state`` and ``residual``.

    Raises:
        ValueError: for an unknown rule.
    """
    is_candidate = torch.zeros_like(logp0, dtype=torch.bool).scatter(-1, candidates, valid)
    bonus = torch.zeros_like(logp0).scatter(-1, candidates, values.where(valid, 0.0))
    match rest:
        case "drop":
            outside = logp0.new_full((len(logp0), 1), -torch.inf)
        case "mean":
            outside = (values.where(valid, 0.0).sum(-1) / valid.sum(-1))[:, None]
        case "state" if state is not None:
            outside = state[:, None]
        case "residual" if state is not None:
            outside = _residual(logp0, (logp0 + bonus).where(is_candidate, -torch.inf), is_candidate, state)
        case _:
            raise ValueError(f"the rest is drop, mean, or with the state's score state or residual; not {rest!r}")
    return (logp0 + torch.where(is_candidate, bonus, outside)).log_softmax(-1)


def _residual(
    logp0: Float[Tensor, "B V"],
    tilted: Float[Tensor, "B V"],
    is_candidate: Bool[Tensor, "B V"],
    state: Float[Tensor, " B"],
) -> Float[Tensor, "B 1"]:
    """log of (exp(state) - Σ_candidates exp(tilted)) / Σ_others p0; -inf if no mass is left."""
    inside = tilted.logsumexp(-1)
    left = state + torch.log1p(-(inside - state).clamp(max=0.0).exp())
    others = logp0.where(~is_candidate, -torch.inf).logsumexp(-1)
    return (left - others).where((inside < state) & others.isfinite(), -torch.inf)[:, None]
