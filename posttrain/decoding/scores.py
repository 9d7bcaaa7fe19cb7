"""Scores of prefixes as parts of a recipe: ``(DecoderContext) -> PrefixScore``. Models are named by path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from posttrain.data.steps import step_numbers
from posttrain.decoding import prefix_scores
from posttrain.decoding.base import Conflict
from posttrain.decoding.candidate_cache import value_score
from posttrain.decoding.context import DecoderContext, ModelPath, TextReward, VerifierOption
from posttrain.decoding.from_recipe import score_part
from posttrain.decoding.model_scores import Distribution, LogRatio, StepScore, ValueScore, model_distribution
from posttrain.decoding.prefixes import PrefixScore
from posttrain.engines.base import Sampling
from posttrain.errors import RecipeError
from posttrain.models.implicit_value import ImplicitValue
from posttrain.models.load import load_model
from posttrain.models.value_files import load_value
from posttrain.option_types import Breadth, Inner, NonNegative, Option, Positive, PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.part import Part

ScoreMaker = Annotated[Callable[[DecoderContext], PrefixScore], Inner("posttrain.decoding.scores", ("context",))]
"""A score as an option of a score, to be made with the context."""

OptionalScoreMaker = Annotated[
    Callable[[DecoderContext], PrefixScore] | None, Inner("posttrain.decoding.scores", ("context",))
]


def value(context: DecoderContext, *, model: ModelPath) -> PrefixScore:
    """The value of a prefix by a value, reward or process model, in reward units.

    It reads the policy's token ids, so its tokenizer must be the policy's. A per-token head scores all next tokens by
    one forward pass. Kind, temperature and scale are those that it was trained for.

    Args:
        model: hub name or local folder.
    """
    loaded: Any = context.loaded("value", model, lambda: load_value(model, dtype=context.dtype))
    if isinstance(loaded, ImplicitValue):
        return ValueScore(loaded, kind=loaded.spec.kind, beta=loaded.spec.beta, scale=loaded.spec.scale)
    return value_score(loaded)


def values(context: DecoderContext, *, models: tuple[ModelPath, ...]) -> PrefixScore:
    """Sum Σ_k V_k of the value models of several rounds, each trained on top of those before it (a moving anchor).

    π_k(a | s) ∝ π_(k-1)(a | s) exp(λ V_k(s a)) = p0(a | s) exp(λ Σ_j≤k V_j(s a)). Liu et al. 2025 (IVO), algorithm 1,
    arXiv:2503.02368.

    Args:
        models: hub names or local folders.

    Raises:
        RecipeError: for none.
    """
    if not models:
        raise RecipeError("decoder: values needs `models`, one at least")
    return prefix_scores.sum_scores(*((1.0, value(context, model=model)) for model in models))


def process(
    context: DecoderContext,
    *,
    model: ModelPath,
    separator: str = "\n",
    aggregate: Literal["product", "min", "mean", "last"] = "product",
) -> PrefixScore:
    """A process model's values of the steps so far, each read at its last token, as one number.

    Lightman et al. 2023, arXiv:2305.20050 (product: the probability that all are right); Wang et al. 2023
    (Math-Shepherd), arXiv:2312.08935 (min); Snell et al. 2024, arXiv:2408.03314 (last).

    Args:
        model: hub name or local folder of a process model that reads the policy's token ids.
        separator: what a step ends with.
        aggregate: of the steps' values.
    """
    loaded: Any = context.loaded("value", model, lambda: load_value(model, dtype=context.dtype))
    steps = functools.partial(step_numbers, decode=context.decode, separator=separator)
    return StepScore(loaded, steps, aggregate, scale=loaded.spec.scale)


def log_ratio(
    context: DecoderContext, *, plus: ModelPath | None = None, minus: ModelPath | None = None, scale: float = 1.0
) -> PrefixScore:
    """Log-ratio of two language models, scale · Σ_t (log p⁺(token_t) - log p⁻(token_t)), over the generated tokens.

    GenARM, Xu et al. 2024, arXiv:2410.08193 (plus: an autoregressive reward model); proxy tuning, Liu et al. 2024,
    arXiv:2401.08565 (a tuned and an untuned model); contrastive decoding, Li et al. 2022, arXiv:2210.15097 (minus: an
    amateur). Vocabularies must be the policy's.

    Raises:
        RecipeError: without either model.
    """
    if plus is None and minus is None:
        raise RecipeError("decoder: a log_ratio needs `plus`, `minus` or both: models with the policy's tokenizer")
    return LogRatio(
        plus=_distribution(context, plus, "plus"), minus=_distribution(context, minus, "minus"), scale=scale
    )


def _distribution(context: DecoderContext, model: str | None, name: str) -> Distribution | None:
    if model is None:
        return None
    place = f"decoder: log_ratio {name}"
    source = sections.PolicySection(model=model)
    loaded = context.loaded("language", model, lambda: load_model(source, dtype=context.dtype, place=place))
    return model_distribution(loaded)


def rollout(
    context: DecoderContext,
    *,
    reward: ScoreMaker,
    max_tokens: PositiveCount,
    policy: ModelPath | None = None,
    completions: Breadth = 1,
    horizon: PositiveCount | None = None,
    temperature: NonNegative = 1.0,
    tilt: OptionalScoreMaker = None,
    kind: Literal["mean", "soft", "max"] = "mean",
    beta: Positive | None = None,
    engine: Literal["auto", "vllm", "transformers"] = "auto",
) -> PrefixScore:
    """Reward of rollouts: Q(s) = Σ_j w_j r_j / Σ_j w_j over K completions, with w_j = exp(tilt_j), or 1 without a tilt.

    TQ*, Chakraborty et al. 2024, arXiv:2405.20495; one greedy completion is SVDD-PM's guess, Li et al. 2024,
    arXiv:2408.08252. See :class:`posttrain.decoding.prefix_scores.RolloutScore`.

    Args:
        reward: of completions: a score such as that of a reward model.
        max_tokens: longest completion, of which the prefix is a part: the recipe's ``sampling.max_tokens``.
        policy: what rolls out, a language model of the same vocabulary; default: the policy itself, on its own engine.
        completions: K, of a prefix.
        horizon: tokens after which a rollout is scored as it is; TQ*'s code takes 20.
        temperature: of the rollouts; 0 is greedy.
        tilt: log of a completion's weight, where the rollouts are of another policy than the one whose value is meant.
        kind: ``soft`` is β log Σ w exp(r / β) / Σ w, ``max`` the largest reward.
        beta: temperature of ``soft``, in units of reward.
        engine: of ``policy``.

    Raises:
        RecipeError: for a soft value without ``beta``, or where there is no engine to roll out with.
    """
    if kind == "soft" and beta is None:
        raise RecipeError("decoder: a rollout of kind soft needs `beta`, its temperature in units of reward")
    if context.engine is None:
        raise RecipeError("decoder: a rollout needs the engine of a decoder such as shaped, population or tree")
    if policy is None and context.within_step and getattr(context.engine, "library", "") == "vllm":
        raise RecipeError(
            "decoder: shaped asks for rollouts while vLLM draws a token, when it cannot sample anything else: name the "
            "rollout's `policy`, which has an engine of its own, or set engine.use: transformers"
        )
    return prefix_scores.RolloutScore(
        engine=context.engine if policy is None else context.engine_of(policy, engine),
        reward=reward(context),
        sampling=Sampling(temperature=temperature, max_tokens=max_tokens),
        completions=completions,
        horizon=horizon,
        tilt=None if tilt is None else tilt(context),
        kind=kind,
        beta=beta,
    )


def _rollout_conflicts(options: Option, sampling: sections.SamplingSection) -> Iterator[Conflict]:
    if options["max_tokens"] > sampling.max_tokens:
        yield ("max_tokens",), f"a completion ends after `sampling.max_tokens: {sampling.max_tokens}`"


rollout.conflicts = _rollout_conflicts  # type: ignore[attr-defined]


def text(context: DecoderContext, *, of: TextReward) -> PrefixScore:
    """The score of prompt and completion as text, by a judge or a reward model with a tokenizer of its own.

    Args:
        of: a part of ``reward_models`` that reads texts: ``outcome`` or ``judge``.

    Raises:
        RecipeError: for one that does not.
    """
    reward: Any = of.call if isinstance(of, Part) else of
    if not hasattr(reward, "of_texts"):
        raise RecipeError(f"decoder: text: {type(reward).__name__} does not read texts; outcome and judge do")
    return prefix_scores.TextScore(function=reward.of_texts, decode=context.decode)


def verifier(context: DecoderContext, *, of: VerifierOption) -> PrefixScore:
    """A verifier's score of the completion so far, such as its form or length.

    Args:
        of: a verifier that answers at once; what it reads of a data set must be given as an option, for there is no row
            behind a prefix.
    """
    return prefix_scores.VerifierScore(verifier=of, decode=context.decode)


path_logp = score_part(prefix_scores.PathLogp, "path_logp", __name__)
logarithm = score_part(prefix_scores.Logarithm, "logarithm", __name__)


def weighted_sum(
    context: DecoderContext, *, terms: tuple[ScoreMaker, ...], weights: tuple[float, ...] | None = None
) -> PrefixScore:
    """Weighted sum Σ_i weight_i · score_i: several rewards at once. Mudgal et al. 2023, arXiv:2310.17022.

    Args:
        weights: one for each of ``terms``; default: all 1.

    Raises:
        RecipeError: for another number of weights than of terms.
    """
    return prefix_scores.sum_scores(*_pairs(context, terms, weights, "weights"))


def product(
    context: DecoderContext, *, terms: tuple[ScoreMaker, ...], exponents: tuple[float, ...] | None = None
) -> PrefixScore:
    """Product Π_i score_i ^ exponent_i of scores that are not negative, such as probabilities that a step is right.

    Args:
        exponents: one for each of ``terms``; default: all 1.

    Raises:
        RecipeError: for another number of exponents than of terms.
    """
    return prefix_scores.Product(_pairs(context, terms, exponents, "exponents"))


def _pairs(
    context: DecoderContext, terms: tuple[ScoreMaker, ...], numbers: tuple[float, ...] | None, name: str
) -> list[tuple[float, PrefixScore]]:
    numbers = (1.0,) * len(terms) if numbers is None else numbers
    if len(numbers) != len(terms):
        raise RecipeError(f"decoder: {len(terms)} `terms` have {len(numbers)} `{name}`: give one for each")
    return [(number, term(context)) for number, term in zip(numbers, terms, strict=True)]
