"""Populations: particles grow block by block and are scored, and some of them survive.

One loop, many methods (P particles, n branches, blocks of M tokens):

* best-of-n: P = 1, n branches, one block, ``top``; soft best-of-n: ``tilted``
* blockwise controlled decoding: P = 1, n branches, M = 32, ``top``;  SVDD: ``tilted``
* beam search and IVO's beam: P = n = B, ``top``, final ``best``
* importance sampling, SIS and SMC: P particles, n = 1, ``resample``, final ``weighted``; the engine may be a shaped one
* majority and weighted votes: P particles, one block, ``keep``, final ``vote``

All live particles of all prompts grow in one call of the engine a round, and are scored in one call of the score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from posttrain.batch import Finish
from posttrain.decoding.answers import Decode, Final, best, weighted
from posttrain.decoding.base import Conflict, Decoder, OptionalDecoder
from posttrain.decoding.context import FromContext, NotInRecipes, Separator
from posttrain.decoding.kl import best_of_n_kl_bound, blockwise_kl_bound, weighted_kl_bound
from posttrain.decoding.particles import Particle, Pick, keep, logsumexp, resample, rule_of, top
from posttrain.decoding.prefixes import OptionalScore, Prefix, ScoreOption, continue_prefixes, grown
from posttrain.decoding.shaping import Shaped, warn_unless_tilted
from posttrain.engines.base import Completion, Engine, OnCompletion, Sampling
from posttrain.engines.choice import Chooser, MakeChooser, seeded_chooser
from posttrain.option_types import Breadth, Option, PositiveCount
from posttrain.recipe.sections import SamplingSection
from posttrain.seeds import CHOICES, FreshSeeds, derived_seed, sample_seed


class PopulationResult(NamedTuple):
    """The final particles of one population, with its costs."""

    particles: list[Particle]
    generated: int  # tokens
    scored: int  # prefixes

    @property
    def log_z(self) -> float:
        """Log of the mean weight, an unbiased estimate of Z = E[exp(λ r)] if the pick was ``resample`` or
        ``keep``, so that its own mean is at most log Z."""
        return logsumexp([one.log_weight for one in self.particles]) - math.log(len(self.particles))


@dataclass(slots=True)
class _Group:
    """State of the population that makes one completion."""

    prompt: int
    sample: int
    seed: int
    choose: Chooser
    particles: list[Particle]
    pinned: Sequence[int] | None = None  # the completion that the first particle follows
    generated: int = 0
    scored: int = 0
    rounds: int = 0

    @property
    def ended(self) -> bool:
        return all(particle.ended for particle in self.particles)

    @property
    def result(self) -> PopulationResult:
        return PopulationResult(self.particles, self.generated, self.scored)


class Population(Decoder):
    """Particles grow block by block and are scored, and some survive: best-of-n, blockwise decoding, beams, SMC, votes.

    Log-probs of its completions are those of the engine's own distribution, not of the one that a population samples
    from, which has no log-probs in closed form. ``measured`` holds ``generated``, ``scored``, ``log_weight`` and
    ``log_z``, and ``kl_bound`` if a bound is known: its mean over completions is an upper bound of the KL divergence
    from the engine's base distribution, in nats a sequence.

    Args:
        engine: grows the particles.
        score: scores prefixes.
        particles: P, the number of completions that are kept.
        branch: n, the number of continuations of each particle in a round.
        block: M, the most tokens of a round; default: the whole completion.
        separator: tokens that end a block early; in a recipe the text that they end with, such as a line break.
        pick: chooses the survivors of a round.
        final: chooses the answer among the particles.
        strength: λ; the potential of a particle is log ψ = λ · score, and weights are those of targets p0 · ψ.
        final_score: scores completions that have ended; default: ``score``. SMC is then unbiased for E[exp(λ final)].
        proposal: grows the particles in place of the engine, such as a shaped decoder on it: the proposal of SMC.
        tilted: warn if the score cannot give the tilted distribution.
        decode: token ids to text, for a ``final`` that reads texts.
        make_chooser: makes the random choices among particles.
        seed: seed of the seeds that are drawn if ``generate`` is given none.
    """

    def __init__(
        self,
        engine: Engine,
        score: ScoreOption,
        *,
        particles: Breadth = 1,
        branch: Breadth = 1,
        block: PositiveCount | None = None,
        separator: Separator = (),
        pick: Pick = top,
        final: Final = best,
        strength: float = 1.0,
        final_score: OptionalScore = None,
        proposal: OptionalDecoder = None,
        tilted: bool = False,
        decode: Annotated[Decode, FromContext("decode")] = str,
        make_chooser: NotInRecipes[MakeChooser] = seeded_chooser,
        seed: NotInRecipes[int] = 0,
    ) -> None:
        if particles < 1 or branch < 1 or (block is not None and block < 1):
            raise ValueError(f"particles {particles}, branch {branch} and block {block} are counts of at least 1")
        if tilted:
            warn_unless_tilted(final_score or score, strength)
        self.engine: Engine = proposal or engine
        self.score, self.final_score = score, final_score or score
        self.particles, self.branch, self.block, self.block_ends = particles, branch, block, tuple(separator)
        self.pick, self.final, self.strength, self.decode = pick, final, strength, decode
        self._make_chooser = make_chooser
        self._fresh_seeds = FreshSeeds(seed)

    @staticmethod
    def conflicts(options: Option, sampling: SamplingSection) -> Iterator[Conflict]:
        """Options that contradict each other."""
        if options["branch"] > 1 and rule_of(options["pick"]) is keep:
            yield ("pick",), "keep leaves nothing out: of several branches choose with top, tilted or resample"

    @staticmethod
    def pinning_conflicts(options: Option) -> Iterator[Conflict]:
        """Options with which a population cannot hold a pinned particle."""
        if options["branch"] > 1:
            yield ("branch",), "a pinned particle has one continuation: leave it at 1"
        if rule_of(options["pick"]) not in (resample, keep):
            yield ("pick",), "particles bound Z where they have weights: resample or keep"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.Engine.generate`: one population for each completion."""
        done: list[list[Completion]] = [[None] * n for _ in prompts]  # type: ignore[list-item]

        def finish(group: _Group) -> None:
            done[group.prompt][group.sample] = completion = self._completion(group)
            if on_completion is not None:
                on_completion(group.prompt, group.sample, completion)

        self._run(self._groups(prompts, n, seeds), sampling, finish)
        return done

    def populations(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        pinned: Sequence[Sequence[int]] | None = None,
    ) -> list[PopulationResult]:
        """All final particles of one population for each prompt, with their weights.

        Args:
            pinned: one whole completion of each prompt, drawn from the tilted distribution. It takes the place of the
                first particle and survives: then ``log_z`` is an upper bound of log Z on average, else a lower one
                (Zhao et al. 2024, arXiv:2404.17546; Grosse et al. 2015, arXiv:1511.02543).

        Raises:
            ValueError: for ``pinned`` where :meth:`check_pinned` raises it.
        """
        if pinned is not None:
            self.check_pinned()
        groups = self._groups(prompts, 1, seeds)
        for group, completion in zip(groups, pinned or [None] * len(groups), strict=True):
            group.pinned = completion
            group.particles[0] = dataclasses.replace(group.particles[0], pinned=completion is not None)
        self._run(groups, sampling, lambda group: None)
        return [group.result for group in groups]

    def check_pinned(self) -> None:
        """
        Raises:
            ValueError: for a population that a given particle cannot live in.
        """
        if self.branch > 1:
            raise ValueError("a pinned particle has one continuation: `branch` is 1")
        if rule_of(self.pick) not in (resample, keep):
            raise ValueError("a pinned particle bounds Z where particles are weighted: `pick` is resample or keep")

    def _groups(self, prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int] | None) -> list[_Group]:
        seeds = self._fresh_seeds.unless(seeds, len(prompts))
        groups = []
        for i, prompt in enumerate(prompts):
            root = Particle(prefix=Prefix(tokens=list(prompt), start=len(prompt)), version=self.version)
            for j in range(n):
                seed = sample_seed(seeds[i], j)
                choose = self._make_chooser(sample_seed(seed, CHOICES))
                groups.append(_Group(i, j, seed, choose, [root] * self.particles))
        return groups

    def _run(self, groups: Sequence[_Group], sampling: Sampling, finish: Callable[[_Group], None]) -> None:
        """Runs rounds of growth, scoring and picking until every particle has ended."""
        live = list(groups)
        while live:
            going = []
            for group, families in zip(live, self._scored(live, self._grown(live, sampling)), strict=True):
                group.particles = self.pick(families, group.choose)
                group.rounds += 1
                if group.ended:
                    finish(group)
                else:
                    going.append(group)
            live = going

    def _grown(self, groups: Sequence[_Group], sampling: Sampling) -> list[list[list[Particle]]]:
        """Grows every running particle of all groups in one call of the engine, without scores yet."""
        families: list[list[list[Particle]]] = [[[one] for one in group.particles] for group in groups]
        places, parents, seeds = [], [], []
        for row, group in enumerate(groups):
            for column, particle in enumerate(group.particles):
                if particle.ended or (column == 0 and group.pinned is not None):
                    continue
                places.append((row, column))
                parents.append(particle)
                seeds.append(derived_seed(group.seed, group.rounds, column))
        continued = continue_prefixes(
            self.engine,
            [parent.prefix for parent in parents],
            sampling,
            self.branch,
            seeds,
            block=self.block,
            ends=self.block_ends,
        )
        for (row, column), parent, continuations in zip(places, parents, continued, strict=True):
            families[row][column] = [self._child(parent, each, sampling) for each in continuations]
            groups[row].generated += sum(len(each.tokens) for each in continuations)
            groups[row].scored += round(sum(each.measured.get("scored", 0) for each in continuations))
        self._follow_pinned(groups, families, sampling)
        return families

    def _follow_pinned(
        self, groups: Sequence[_Group], families: list[list[list[Particle]]], sampling: Sampling
    ) -> None:
        """Grows the first particle of each group with a pinned completion along that completion."""
        for row, group in enumerate(groups):
            first = group.particles[0]
            if group.pinned is None or first.ended:
                continue
            begun = len(first.prefix.generated)
            block = self._next_block(group.pinned[begun:])
            over = begun + len(block) == len(group.pinned)
            cut = len(group.pinned) == sampling.max_tokens  # by length, if not by its last token: its score knows
            finish = Finish.STOPPED if over and not cut else Finish.LENGTH
            if isinstance(self.engine, Shaped):
                starts = [first.prefix.start]
                (completion,) = self.engine.forced([first.prefix.tokens], [block], sampling, starts)
            else:
                completion = Completion(block, [math.nan] * len(block), finish, self.version)  # nobody asks for them
            families[row][0] = [self._child(first, dataclasses.replace(completion, finish=finish), sampling)]

    def _next_block(self, left: Sequence[int]) -> list[int]:
        """The next tokens up to where the engine would have ended the round."""
        block = list(left[: self.block])
        end = next((place for place, token in enumerate(block) if token in self.block_ends), len(block))
        return block[: end + 1]

    def _child(self, parent: Particle, continuation: Completion, sampling: Sampling) -> Particle:
        """The particle with a continuation. Its weight includes the proposal; its score is still the parent's."""
        base_logp = continuation.measured.get("base_logp")
        proposal = 0.0 if base_logp is None else base_logp - sum(continuation.logps)
        return dataclasses.replace(
            parent,
            prefix=grown(parent.prefix, continuation, sampling, self.block_ends),
            version=continuation.version,
            log_weight=parent.log_weight + proposal - math.log(self.branch),
            fresh=True,
        )

    def _scored(self, groups: Sequence[_Group], families: list[list[list[Particle]]]) -> list[list[list[Particle]]]:
        """Scores the new particles of all groups by one call of each score, and updates potentials and weights."""
        fresh = [one for own in families for family in own for one in family if one.fresh]
        scores: dict[int, float] = {}
        for score, ended in ((self.score, False), (self.final_score, True)):
            if self.score is self.final_score:
                members = fresh if ended else []
            else:
                members = [one for one in fresh if one.ended is ended]
            if members:
                values = score.score([one.prefix for one in members]).tolist()
                scores |= {id(one): value for one, value in zip(members, values, strict=True)}
        for group, own in zip(groups, families, strict=True):
            group.scored += sum(one.fresh for family in own for one in family)
        return [[[self._valued(one, scores) for one in family] for family in own] for own in families]

    def _valued(self, particle: Particle, scores: dict[int, float]) -> Particle:
        if not particle.fresh:
            return particle
        score = scores[id(particle)]
        potential = self.strength * score
        log_weight = particle.log_weight + potential - particle.potential
        return dataclasses.replace(particle, score=score, potential=potential, log_weight=log_weight, fresh=False)

    def _completion(self, group: _Group) -> Completion:
        """The answer of a group as a completion, with its measurements."""
        chosen = group.particles[self.final(group.particles, group.choose, self.decode)]
        measured = {
            "generated": float(group.generated),
            "scored": float(group.scored),
            "log_weight": chosen.log_weight,
            "log_z": group.result.log_z,
        }
        bound = self._kl_bound(group, chosen)
        measured |= {} if bound is None else {"kl_bound": bound}
        finish = chosen.prefix.finish
        assert finish is not None
        return Completion(list(chosen.prefix.generated), list(chosen.prefix.logps), finish, chosen.version, measured)

    def _kl_bound(self, group: _Group, chosen: Particle) -> float | None:
        """The completion's term in the mean that bounds the divergence; None if no bound is known."""
        if rule_of(self.final) is weighted and rule_of(self.pick) in (resample, keep):
            return weighted_kl_bound(chosen.potential, group.result.log_z)
        if isinstance(self.engine, Shaped):
            return None  # the bounds below are to the distribution that particles grow by
        if self.block is None and not self.block_ends:
            return best_of_n_kl_bound(self.particles * self.branch)
        return blockwise_kl_bound(self.branch, float(group.rounds)) if self.particles == 1 else None
