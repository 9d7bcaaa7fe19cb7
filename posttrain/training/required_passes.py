"""The forward passes that a recipe needs, found by calling its parts once on a small made-up batch.

A part need not declare what it reads. An expensive pass (reference log-probs, entropies) is made only if some part
reads its result. A part that fails or returns the wrong shape is found before any model is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from posttrain.batch import Batch, RewardColumns
from posttrain.errors import RecipeError
from posttrain.recipe.part import Part
from posttrain.training.apply_parts import with_reward
from posttrain.training.probe import ReadLog, probe_batch, probe_outputs
from posttrain.training.recipe import Recipe
from posttrain.verify.pool import numbered_names


@dataclass(frozen=True)
class RequiredPasses:
    """The forward passes that the loop must make, and what else the parts ask for."""

    logp_old: bool  # log-probs before the update; without them a single update takes the current ones
    logp_ref: bool  # log-probs of the reference policy
    entropy: bool  # entropy of the policy before the update
    entropy_gradient: bool  # Outputs.entropy, which a loss term reads
    value: bool = False  # values before the update
    value_next: bool = False  # values of a Q head, backed up over every next token
    value_model: bool = False  # a value model, because some part reads or trains values
    kl_ref: bool = False  # Outputs.kl_ref: KL from the reference over the vocabulary
    collision: bool = False  # Outputs.collision
    columns: tuple[str, ...] = ()  # dataset columns that parts read; they must hold numbers
    groups: bool = False  # groups that must stay whole in a micro-batch, because a loss compares their completions

    @property
    def scoring_pass(self) -> bool:
        """True if the policy needs a forward pass before the update."""
        return self.logp_old or self.entropy


def find_required_passes(recipe: Recipe) -> RequiredPasses:
    """Finds the forward passes that the parts of a recipe need.

    Raises:
        RecipeError: if a part fails on the made-up batch, returns something of the wrong shape, or reads a field that
            nothing in the recipe fills.
    """
    log = ReadLog()
    batch = probe_batch(log, every_next=_has_q_head(recipe), baseline=recipe.baseline is not None)
    before: set[str] = set()
    for slot, part in _before_update(recipe):
        if slot == "combine":  # after the rewards, each of which has been tried
            batch = _with_reward_columns(recipe, batch)
        arguments = (batch.advantage, batch) if slot == "shape" else (batch,)
        before |= _observe(log, slot, part, arguments, _shapes(slot, batch))
    in_policy_loss = _observe_losses(log, "loss", recipe.loss, batch, recipe)
    in_value_loss = _observe_losses(log, "value_loss", recipe.value_loss, batch, recipe)
    during = in_policy_loss | in_value_loss
    required = RequiredPasses(
        logp_old="logp_old" in before
        or bool(recipe.loss and recipe.epochs * recipe.minibatches > 1)
        or ("outputs.logp" in in_value_loss and not recipe.loss),
        logp_ref="logp_ref" in before | during,
        entropy="entropy" in before | during,
        entropy_gradient="outputs.entropy" in in_policy_loss,
        value=("value" in before | during or bool(recipe.value_loss)) and not _branches(recipe),
        value_next=_has_q_head(recipe) and "value_next" in before | during,
        value_model=bool(recipe.value_loss) or ("value" in before | during and not _branches(recipe)),
        kl_ref="outputs.kl_ref" in in_policy_loss,
        collision="outputs.collision" in in_policy_loss,
        columns=tuple(sorted(log.columns)),
        groups="group" in during,
    )
    _refuse_unfilled(recipe, required, before | during)
    return required


def _refuse_unfilled(recipe: Recipe, required: RequiredPasses, read: set[str]) -> None:
    """Raises an error for a field that nothing fills, before the models are loaded."""
    if recipe.decoder is not None and "logp_sampler" in read and not recipe.decoder.fact("exact_logp"):
        raise RecipeError(
            f"decoder: {recipe.decoder.name} samples from a distribution whose log-probs are not known, and a part of "
            "the recipe makes importance weights of the sampler's log-probs: leave that part out (such as `weights: "
            "[{use: truncated_importance}]`), or take a decoder with exact log-probs, such as shaped"
        )
    if recipe.advantage is None and "advantage" in read:
        raise RecipeError("a part reads the advantage, but the recipe has no `advantage:`")
    value = recipe.value
    if required.value_model and not recipe.value_loss and not (value is not None and value.frozen):
        raise RecipeError(
            "a part reads values, but nothing trains them: add `value_loss: [{use: mse}]` and `target: {use: "
            "lambda_return}`, or take a trained value model as it is: `value: {model: ..., frozen: true}`"
        )
    if value is not None and not required.value_model and not (_branches(recipe) and "value" in read):
        raise RecipeError("value: no part of the recipe reads or trains values; leave the section out")


def _with_reward_columns(recipe: Recipe, batch: Batch) -> Batch:
    """The made-up batch with a column of rewards for each verifier and each reward of whole completions.

    A reward model is not called. It gets a column, as if it gave one number a completion.
    """
    names = ("score",) if recipe.examples is not None else numbered_names(recipe.verify)
    weights = (1.0,) if recipe.examples is not None else tuple(part.weight for part in recipe.verify)
    first = batch.score[:, None].repeat(1, len(names))
    batch = batch.set(rewards=first, reward_columns=RewardColumns(names, weights, verifiers=len(names)))
    for part in recipe.reward:
        value = batch.score if hasattr(part.call, "needs") else copy.deepcopy(part.call)(batch)
        if isinstance(value, Tensor) and value.shape == batch.score.shape:
            batch = with_reward(batch, part, value)
    return batch


def _before_update(recipe: Recipe) -> Iterator[tuple[str, Part]]:
    yield from (("reward", part) for part in recipe.reward)
    yield from (("select", part) for part in recipe.select)
    yield "combine", recipe.combine
    if recipe.compare is not None:
        yield "compare", recipe.compare
    if recipe.advantage is not None:
        yield "advantage", recipe.advantage
    yield from (("shape", part) for part in recipe.shape)
    yield from (("keep", part) for part in recipe.keep)
    yield from ((name, part) for name in ("baseline", "regroup") if (part := getattr(recipe, name)) is not None)
    yield "normaliser", recipe.normaliser
    yield from (("normaliser", term.normaliser) for term in recipe.loss if term.normaliser is not None)
    if recipe.target is not None:
        yield "target", recipe.target


def _shapes(slot: str, batch: Batch) -> list[tuple[int, ...]]:
    """Shapes that a part of a slot may return."""
    n, columns = batch.mask.shape
    one_each = dict.fromkeys(("select", "combine", "compare", "keep", "baseline", "regroup"), [(n,)])
    return {"reward": [(n,), (n, columns)], **one_each}.get(slot, [(n, columns)])


def _observe_losses(log: ReadLog, slot: str, terms: Sequence[Part], batch: Batch, recipe: Recipe) -> set[str]:
    seen: set[str] = set()
    outputs = probe_outputs(log, batch, recipe)
    for i, term in enumerate(terms):
        seen |= _observe(log, f"{slot}.{i}", term, (outputs, batch), _shapes(slot, batch))
        for weight in term.weights:
            seen |= _observe(log, f"{slot}.{i}.weights", weight, (outputs, batch), _shapes(slot, batch))
    return seen


def _observe(log: ReadLog, slot: str, part: Part, arguments: tuple, allowed: list[tuple[int, ...]]) -> set[str]:
    if (declared := getattr(part.call, "needs", None)) is not None:
        return set(declared())  # a model or a service computes it, and is not called with made-up tokens
    log.seen = set()
    call = copy.deepcopy(part.call)  # a part with memory must not remember the made-up batch
    try:
        result = call(*arguments)
    except Exception as error:
        raise RecipeError(
            f"{slot}: {part.name} failed on a small made-up batch: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, Tensor) or tuple(result.shape) not in allowed:
        returned = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        expected = " or ".join("[N, L]" if len(shape) == 2 else "[N]" for shape in allowed)
        raise RecipeError(
            f"{slot}: {part.name} returned {returned} for a batch of {list(allowed[-1])}; expected {expected}"
        )
    return set(log.seen)


def _branches(recipe: Recipe) -> bool:
    return recipe.value is not None and recipe.value.branches is not None


def _has_q_head(recipe: Recipe) -> bool:
    head = recipe.value.head if recipe.value is not None else None
    return head is not None and head.type == "per_token"
