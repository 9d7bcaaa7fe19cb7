"""The decoders of a recipe's ``decoder:`` slot: an engine and its context to an engine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from posttrain.decoding import finals, nodes, particles
from posttrain.decoding.checks import law_known
from posttrain.decoding.context import (
    Backup,
    Choice,
    DecoderContext,
    Final,
    ModelPath,
    OptionalChoice,
    OptionalDecoder,
    OptionalScore,
    Pick,
    Propose,
    Score,
    Select,
    TargetDecoder,
)
from posttrain.decoding.model_scores import head_value
from posttrain.decoding.population import Population
from posttrain.decoding.rejection import Rejection
from posttrain.decoding.shaping import Shaped
from posttrain.decoding.tree import TreeSearch, sampled_steps
from posttrain.engines.base import Engine, ShapingEngine
from posttrain.errors import RecipeError
from posttrain.models.value_files import load_value
from posttrain.option_types import Count, OpenFraction, Positive, PositiveCount
from posttrain.recipe.part import Part


@law_known
def shaped(
    engine: ShapingEngine,
    context: DecoderContext,
    *,
    score: Score,
    strength: float = 1.0,
    k: PositiveCount | None = None,
    head: OpenFraction | None = None,
    rest: Literal["drop", "mean", "state", "residual"] = "drop",
    every: PositiveCount = 1,
    tilted: bool = False,
) -> Engine:
    """log π(a | s) = log p0(a | s) + strength · score(s a) - log Z(s) for candidates; ``rest`` for the others.

    Mudgal et al. 2024, arXiv:2310.17022. See :class:`posttrain.decoding.shaping.Shaped`.

    Args:
        score: of prefixes.
        strength: in 1 / reward units.
        k: the most probable tokens are candidates; default: all tokens.
        head: or those with at least this share of the largest probability.
        rest: what the other tokens get: no probability, the mean of the candidates' scores, the score of the state, or
            the mass that a soft value leaves for them.
        every: only tokens 0, b, 2b, ... are shaped.
        tilted: warn where the score cannot give the tilted law.
    """
    return Shaped(
        engine,
        score(context.on(engine, within_step=True)),
        strength=strength,
        k=k,
        head=head,
        rest=rest,
        every=every,
        tilted=tilted,
    )


def population(
    engine: Engine,
    context: DecoderContext,
    *,
    score: Score,
    particles: PositiveCount = 1,
    branch: PositiveCount = 1,
    block: PositiveCount | None = None,
    separator: str | None = None,
    pick: Pick = particles.top,
    final: Final = finals.best,
    strength: float = 1.0,
    final_score: OptionalScore = None,
    proposal: OptionalDecoder = None,
    tilted: bool = False,
) -> Engine:
    """Particles that grow block by block, are scored, and of which some survive.

    See :class:`posttrain.decoding.population.Population`: best-of-n, blockwise decoding, beams, SMC, votes.

    Args:
        score: of prefixes.
        particles: completions that are kept.
        branch: continuations of each in a round.
        block: most tokens a round; default: the whole completion.
        separator: text that ends a block early, such as a line break.
        pick: who survives a round.
        final: which particle is the answer.
        strength: of the score, in 1 / reward units.
        final_score: of completions that have ended; default: ``score``.
        proposal: the decoder that particles grow by, such as a shaped one; default: the policy itself.
        tilted: warn where the score cannot give the tilted law.
    """
    context = context.on(engine)
    return Population(
        engine if proposal is None else proposal(engine, context),
        score(context),
        particles=particles,
        branch=branch,
        block=block,
        block_ends=context.ends(separator),
        pick=_plain(pick),
        final=_final(final, context),
        strength=strength,
        final_score=None if final_score is None else final_score(context),
        tilted=tilted,
    )


def rejection(
    engine: Engine,
    context: DecoderContext,
    *,
    population: TargetDecoder,
    highest: float = 1.0,
    width: PositiveCount = 16,
    rounds: PositiveCount = 16,
) -> Engine:
    """Exact draws of the tilted law p0 · exp(strength · final score) / Z that a population aims at, and bounds of log Z
    from below and, with the draw as its pinned particle, from above.

    Zhao et al. 2024, arXiv:2404.17546. See :class:`posttrain.decoding.rejection.Rejection`.

    Args:
        population: the particles: a ``population`` that resamples or keeps, without branches.
        highest: no completion has a higher final score.
        width: completions that are drawn at once.
        rounds: how often, at most, until one is accepted.
    """
    made = population(engine, context)
    assert isinstance(made, Population)  # posttrain.decoding.checks has looked
    return Rejection(engine, made, highest=highest, width=width, rounds=rounds)


def tree(
    engine: Engine,
    context: DecoderContext,
    *,
    score: Score,
    select: Select,
    propose: Propose = sampled_steps,
    separator: str | None = None,
    backup: Backup = nodes.average,
    decide: Choice = nodes.best_ending,
    act: OptionalChoice = None,
    simulations: PositiveCount = 100,
    paths: PositiveCount | None = None,
    tokens: PositiveCount | None = None,
    delay: Count = 0,
    to_end: bool = False,
    final_score: OptionalScore = None,
    process: OptionalScore = None,
) -> Engine:
    """A search of steps. See :class:`posttrain.decoding.tree.TreeSearch`.

    Args:
        score: of prefixes: the value of a node.
        select: which nodes come next.
        propose: the steps from a node.
        separator: text that ends a step, such as a line break; for a ``propose`` that takes ``ends``.
        backup: what a simulation changes on its path.
        decide: which node is the answer.
        act: the move after ``simulations``; default: there are no moves.
        simulations: rounds of select and backup, of each move if there are moves.
        paths: the search is over when it has reached so many endings.
        tokens: and when it has generated so many tokens.
        delay: visits before a node is expanded.
        to_end: a simulation goes on until it has reached an ending.
        final_score: of completions that have ended; default: ``score``.
        process: process reward of a step, for ``a_star_key``.

    Raises:
        RecipeError: for a separator with a ``propose`` that has no use for it.
    """
    context = context.on(engine)
    return TreeSearch(
        engine=engine,
        score=score(context),
        propose=_with_ends(propose, context, separator),
        select=select,
        backup=backup,
        decide=decide,
        act=act,
        simulations=simulations,
        paths=paths,
        tokens=tokens,
        delay=delay,
        to_end=to_end,
        final_score=None if final_score is None else final_score(context),
        process=None if process is None else process(context),
    )


@law_known
def edited(
    engine: Engine,
    context: DecoderContext,
    *,
    model: ModelPath,
    step_size: Positive = 0.5,
    steps: PositiveCount = 30,
) -> Engine:
    """u <- u + step_size · ∇_h V(h + u) on the last hidden state before every token.

    Kong et al. 2024 (RE-Control), arXiv:2406.05954. See :class:`posttrain.decoding.editing.Edited`.

    Args:
        model: a value model on the policy's own hidden states.
        step_size: the paper takes 0.2 to 1.
        steps: gradient steps a token; the paper takes 30 to 200.

    Raises:
        RecipeError: on an engine that keeps hidden states to itself, or for a value model of other hidden states.
    """
    from posttrain.decoding.editing import Edited  # these two import much that other decoders do without
    from posttrain.engines.transformers import TransformersEngine

    if not isinstance(engine, TransformersEngine):
        raise RecipeError("engine.use: edited needs hidden states, which vLLM keeps to itself: set it to transformers")
    loaded: Any = context.loaded("value in float32", model, lambda: load_value(model))
    mine, its = (each.config.get_text_config().hidden_size for each in (engine.model, loaded.decoder))
    if mine != its:
        raise RecipeError(f"decoder: {model!r} values hidden states of {its} numbers, those of the policy have {mine}")
    return Edited(engine, head_value(loaded), step_size=step_size, steps=steps)


def _plain(part: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself where it has no options, by which decoders know it."""
    return part.target if isinstance(part, Part) and not part.options else part


def _final(final: Callable[..., Any], context: DecoderContext) -> Callable[..., Any]:
    """The rule with the tokenizer that it may need; draws by weight, whose law has a bound, as decoders know them."""
    if particles.rule_of(final) is finals.weighted:
        return particles.weighted
    return lambda population, choose: final(population, choose, context.decode)


def _with_ends(propose: Callable[..., Any], context: DecoderContext, separator: str | None) -> Callable[..., Any]:
    if separator is None:
        return propose
    target = propose.target if isinstance(propose, Part) else propose
    if "ends" not in inspect.signature(target).parameters:
        raise RecipeError(f"decoder.separator: the steps of {target.__name__} do not end with a text; leave it out")
    return functools.partial(propose, ends=context.ends(separator))
