"""Exact draws of the distribution that a population aims at, and bounds of its log Z from both sides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.decoding.base import Conflict, Decoder, DecoderOption
from posttrain.decoding.context import NotInRecipes
from posttrain.decoding.kl import weighted_kl_bound
from posttrain.decoding.particles import softmax
from posttrain.decoding.population import Population, PopulationResult
from posttrain.decoding.prefixes import Prefix, grown
from posttrain.engines.base import Completion, Engine, OnCompletion, Sampling
from posttrain.engines.choice import Chooser, MakeChooser, seeded_chooser
from posttrain.errors import UserError
from posttrain.option_types import Breadth, Option, PositiveCount
from posttrain.recipe.sections import SamplingSection
from posttrain.seeds import CHOICES, FreshSeeds, derived_seed, sample_seed

ROUNDING = 1e-5  # by which a score may pass its highest
LOWER, UPPER = 1 << 33, 1 << 34  # added to a seed's place: the populations share no random numbers with the draws


@dataclass(slots=True)
class _Draws:
    """State of the rejection sampler for one completion."""

    prompt: int
    sample: int
    seed: int
    choose: Chooser
    candidates: list[tuple[Completion, Prefix, float]]  # with their potential
    accepted: int | None = None

    def consider(self, drawn: Sequence[tuple[Completion, Prefix, float]], highest: float) -> None:
        """Accepts the first draw that passes a test with probability exp(potential - highest)."""
        for one in drawn:
            self.candidates.append(one)
            share = math.exp(min(0.0, one[2] - highest))
            if self.accepted is None and self.choose([share, 1 - share]) == 0:
                self.accepted = len(self.candidates) - 1


class Rejection(Decoder):
    """Rejection sampling: exact draws of the tilted distribution that a population aims at, and bounds of log Z.

    accept y ~ p0 with probability exp(λ (r(y) - highest)), λ the population's strength

    Accepted completions have exactly the tilted distribution p0(y) exp(λ r(y)) / Z, and on average one of
    exp(λ ``highest``) / Z draws is accepted. An exact draw bounds log Z from both sides: the population's own log Ẑ is
    at most log Z on average, and with the draw pinned as its first particle it is at least log Z on average
    (bidirectional SMC, Zhao et al. 2024, arXiv:2404.17546; Grosse et al. 2015, arXiv:1511.02543). The gap between the
    bounds limits how far SMC's samples are from their target: the two divergences, one in each direction, sum to no
    more.

    ``measured`` holds ``accepted`` (1 or 0), ``generated``, ``scored``, and after an accepted draw ``log_z``,
    ``log_z_upper`` and ``kl_bound``, λ r - log Ẑ: its mean is an upper bound of the divergence of the tilted
    distribution from the engine's. If ``rounds`` accept nothing, the answer is one of the draws, chosen by weight,
    and these are absent.

    Args:
        engine: draws completions.
        population: scores completions that have ended, and has the particles: a ``population`` that resamples or keeps,
            without branches, on the same engine or on a shaped one of it.
        highest: upper bound of the final score.
        width: number of draws in a round.
        rounds: most rounds until a draw is accepted.
        make_chooser: makes the random choices.
        seed: seed of the seeds that are drawn if ``generate`` is given none.

    Raises:
        ValueError: for a population that cannot hold a pinned particle, or whose strength is not above 0.
    """

    def __init__(
        self,
        engine: Engine,
        population: DecoderOption,
        *,
        highest: float = 1.0,
        width: Breadth = 16,
        rounds: PositiveCount = 16,
        make_chooser: NotInRecipes[MakeChooser] = seeded_chooser,
        seed: NotInRecipes[int] = 0,
    ) -> None:
        if not isinstance(population, Population):
            raise ValueError(f"only the particles of a Population bound Z, not a {type(population).__name__}")
        population.check_pinned()
        if population.strength <= 0:
            raise ValueError(f"rejection needs a highest weight: strength {population.strength:g} is not above 0")
        self.engine, self.population = engine, population
        self.highest, self.width, self.rounds = highest, width, rounds
        self._make_chooser = make_chooser
        self._fresh_seeds = FreshSeeds(seed)

    @staticmethod
    def conflicts(options: Option, sampling: SamplingSection) -> Iterator[Conflict]:
        """Options that contradict each other."""
        population = options["population"]
        if getattr(population.target, "makes", None) is not Population:
            yield ("population", "use"), "only the particles of a `population` bound Z"
            return
        chosen = population.every_option
        yield from ((("population", *at), problem) for at, problem in Population.pinning_conflicts(chosen))
        if chosen["strength"] <= 0:
            message = "must be above 0: the highest score is then the most probable to be accepted"
            yield ("population", "strength"), message

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.Engine.generate`.

        Raises:
            UserError: for a completion that scores more than ``highest``.
        """
        groups = self._drawn(prompts, sampling, n, self._fresh_seeds.unless(seeds, len(prompts)))
        bounds = self._bounds(prompts, sampling, [group for group in groups if group.accepted is not None])
        done: list[list[Completion]] = [[] for _ in prompts]
        for group in groups:
            completion = self._completion(group, bounds.get((group.prompt, group.sample)))
            done[group.prompt].append(completion)
            if on_completion is not None:
                on_completion(group.prompt, group.sample, completion)
        return done

    def _drawn(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seeds: Sequence[int]
    ) -> list[_Draws]:
        """Draws in rounds for all completions without an accepted draw, each round in one call of the engine."""
        groups = []
        for i in range(len(prompts)):
            for j in range(n):
                seed = sample_seed(seeds[i], j)
                groups.append(_Draws(i, j, seed, self._make_chooser(sample_seed(seed, CHOICES)), []))
        highest = self.population.strength * self.highest
        for number in range(self.rounds):
            waiting = [group for group in groups if group.accepted is None]
            if not waiting:
                break
            roots = [Prefix(tokens=list(prompts[group.prompt]), start=len(prompts[group.prompt])) for group in waiting]
            drawn = self.engine.generate(
                [root.tokens for root in roots],
                sampling,
                self.width,
                seeds=[derived_seed(group.seed, number) for group in waiting],
            )
            ended = [[grown(root, one, sampling, ()) for one in own] for root, own in zip(roots, drawn, strict=True)]
            potentials = self._potentials([prefix for own in ended for prefix in own])
            for row, group in enumerate(waiting):
                own = potentials[row * self.width : (row + 1) * self.width]
                group.consider(list(zip(drawn[row], ended[row], own, strict=True)), highest)
        return groups

    def _potentials(self, prefixes: Sequence[Prefix]) -> list[float]:
        scores = self.population.final_score.score(prefixes).tolist()
        if max(scores) > self.highest + ROUNDING:
            raise UserError(
                f"decoder.highest: a completion scores {max(scores):g}, more than {self.highest:g}: rejection sampling "
                "is exact only under the highest score there is"
            )
        return [self.population.strength * score for score in scores]

    def _bounds(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[_Draws]
    ) -> dict[tuple[int, int], tuple[PopulationResult, PopulationResult]]:
        """Populations without and with the accepted completion among their particles, by prompt and sample."""
        if not groups:
            return {}
        own = [prompts[group.prompt] for group in groups]
        pinned = [group.candidates[group.accepted or 0][1].generated for group in groups]
        lower, upper = (
            self.population.populations(
                own, sampling, seeds=[sample_seed(group.seed, place) for group in groups], pinned=given
            )
            for place, given in ((LOWER, None), (UPPER, pinned))
        )
        return {
            (group.prompt, group.sample): both
            for group, both in zip(groups, zip(lower, upper, strict=True), strict=True)
        }

    def _completion(self, group: _Draws, bounds: tuple[PopulationResult, PopulationResult] | None) -> Completion:
        """The accepted draw, or else a draw chosen by weight, with its measurements."""
        chosen = group.accepted
        if chosen is None:
            chosen = group.choose(softmax([potential for _, _, potential in group.candidates]))
        completion, prefix, potential = group.candidates[chosen]
        measured = {
            "accepted": float(bounds is not None),
            "generated": float(sum(len(one.tokens) for one, _, _ in group.candidates)),
            "scored": float(len(group.candidates)),
        }
        if bounds is not None:
            lower, upper = bounds
            measured["generated"] += lower.generated + upper.generated
            measured["scored"] += lower.scored + upper.scored
            measured |= {"log_z": lower.log_z, "log_z_upper": upper.log_z}
            measured["kl_bound"] = weighted_kl_bound(potential, lower.log_z)
        assert prefix.finish is not None
        return dataclasses.replace(completion, finish=prefix.finish, measured=measured)
