"""The forward passes that a recipe needs, found by calling its parts once on a small made-up batch.

A part need not declare what it reads. An expensive pass (reference log-probs, entropies) is made only if some part
reads its result. A part that fails or returns the wrong shape is found before any model is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Batch, Finish, Outputs
from posttrain.decoding.checks import law_is_known
from posttrain.errors import RecipeError
from posttrain.recipe.part import Part
from posttrain.training.recipe import Recipe

_FIELDS = frozenset(f.name for f in fields(Batch)) | frozenset(f.name for f in fields(Outputs))


@dataclass
class _Log:
    """Names of the fields and dataset columns that parts have read."""

    seen: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)  # dataset columns that were read
    paused: bool = False


_log = _Log()


def _read(self: Any, name: str) -> Any:
    """Attribute access that notes which field is read."""
    if name in _FIELDS and not _log.paused:
        _log.seen.add(f"outputs.{name}" if isinstance(self, Outputs) else name)
    return object.__getattribute__(self, name)


@contextmanager
def _unobserved() -> Iterator[None]:
    """Inside, nothing that is read is noted."""
    before, _log.paused = _log.paused, True
    try:
        yield
    finally:
        _log.paused = before


class _ProbeBatch(Batch):
    """A batch that notes which of its fields are read. Copying it does not count as reading."""

    __slots__ = ()
    __getattribute__ = _read

    def set(self, **changes: Any) -> Batch:
        with _unobserved():
            return replace(self, **changes)

    def _map(self, tensor: Callable[[Tensor], Tensor], column: Callable[[tuple], tuple]) -> Batch:
        with _unobserved():
            return Batch._map(self, tensor, column)


class _ProbeOutputs(Outputs):
    """Outputs that note which of their fields are read."""

    __slots__ = ()
    __getattribute__ = _read


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
    batch = _probe_batch(every_next=_has_q_head(recipe), baseline=recipe.baseline is not None)
    before: set[str] = set()
    _log.columns = set()
    for slot, part in _before_update(recipe):
        arguments = (batch.advantage, batch) if slot == "shape" else (batch,)
        before |= _observe(slot, part, arguments, _shapes(slot, batch))
    in_policy_loss = _observe_losses("loss", recipe.loss, batch, recipe)
    in_value_loss = _observe_losses("value_loss", recipe.value_loss, batch, recipe)
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
        columns=tuple(sorted(_log.columns)),
        groups="group" in during,
    )
    _refuse_unfilled(recipe, required, before | during)
    return required


def _refuse_unfilled(recipe: Recipe, required: RequiredPasses, read: set[str]) -> None:
    """Raises an error for a field that nothing fills, before the models are loaded."""
    if recipe.decoder is not None and "logp_sampler" in read and not law_is_known(recipe.decoder):
        raise RecipeError(
            f"decoder: {recipe.decoder.name} draws from a law whose log-probs are not known in closed form, and a part "
            "of the recipe makes importance weights of the sampler's log-probs: leave that part out (such as `weights: "
            "[{use: truncated_importance}]`), or take a decoder that knows its law, such as shaped"
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


def _before_update(recipe: Recipe) -> Iterator[tuple[str, Part]]:
    yield from (("reward", part) for part in recipe.reward)
    yield from (("select", part) for part in recipe.select)
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
    one_each = dict.fromkeys(("select", "compare", "keep", "baseline", "regroup"), [(n,)])
    return {"reward": [(n,), (n, columns)], **one_each}.get(slot, [(n, columns)])


def _observe_losses(slot: str, terms: Sequence[Part], batch: Batch, recipe: Recipe) -> set[str]:
    seen: set[str] = set()
    outputs = _probe_outputs(batch, recipe)
    for i, term in enumerate(terms):
        seen |= _observe(f"{slot}.{i}", term, (outputs, batch), _shapes(slot, batch))
        for weight in term.weights:
            seen |= _observe(f"{slot}.{i}.weights", weight, (outputs, batch), _shapes(slot, batch))
    return seen


def _observe(slot: str, part: Part, arguments: tuple, allowed: list[tuple[int, ...]]) -> set[str]:
    if (declared := getattr(part.call, "needs", None)) is not None:
        return set(declared())  # a model or a service computes it, and is not called with made-up tokens
    _log.seen = set()
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
    return set(_log.seen)


def _branches(recipe: Recipe) -> bool:
    return recipe.value is not None and recipe.value.branches is not None


def _has_q_head(recipe: Recipe) -> bool:
    head = recipe.value.head if recipe.value is not None else None
    return head is not None and head.type == "per_token"


class _AnyRow(dict[str, float]):
    """A dataset row that has every column."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> float:
        _log.columns.add(name)
        return 0.5


def _probe_batch(*, every_next: bool = False, baseline: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    n, columns, prompt = 8, 6, 2
    length = torch.tensor([6, 4, 5, 6, 3, 6, 5, 4])
    column = torch.arange(columns)
    mask = (column >= prompt) & (column < length[:, None])
    logp = -torch.rand(n, columns, generator=generator) * mask
    score = torch.tensor([1.0, 0, 0, 0, 1, 0, 1, 1])
    noise = torch.randn(n, columns, generator=generator) * mask
    return _ProbeBatch(
        tokens=torch.randint(0, 9, (n, columns), generator=generator),
        mask=mask,
        length=length,
        group=torch.arange(2).repeat_interleave(4),
        finish=torch.tensor([int(Finish.STOPPED), int(Finish.LENGTH)] * 4),
        logp_sampler=logp,
        version=torch.zeros(n, dtype=torch.long),
        step_id=torch.where(mask, 0, -1),
        baseline_only=torch.tensor([False, False, False, True] * 2),
        rows=tuple(_AnyRow() for _ in range(n)),
        texts=tuple("" for _ in range(n)),
        score=score,
        reward=score.clone(),
        step_reward=0.1 * noise,
        logp_old=logp,
        logp_ref=logp + 0.1 * noise,
        entropy=noise.abs(),
        value=torch.rand(n, columns, generator=generator),
        value_next=torch.rand(n, columns, generator=generator) if every_next else None,
        advantage=noise,
        loss_share=mask / mask.sum(),
        baseline=torch.zeros(n) if baseline else None,
        target=torch.rand(n, columns, generator=generator),
        value_share=mask / mask.sum(),
    )


def _probe_outputs(batch: Batch, recipe: Recipe) -> Outputs:
    """Made-up outputs like those of the recipe's models. The head of a saved value model is not known yet."""
    with _unobserved():
        assert batch.logp_old is not None and batch.entropy is not None and batch.value is not None
        logp = (batch.logp_old + 0.05).where(batch.mask, 0.0).requires_grad_()
        entropy, value = batch.entropy.clone().requires_grad_(), batch.value.clone().requires_grad_()
        noise = 0.1 * batch.entropy
        made = _ProbeOutputs(
            logp=logp, entropy=entropy, value=value, kl_ref=noise.clone().requires_grad_(), collision=-noise
        )
        head = recipe.value.head if recipe.value else None
        unknown = head is None and recipe.value is not None and recipe.value.model is not None
        if not unknown and (head is None or head.type in ("scalar", "per_token")):
            return made
        outputs = {"bernoulli": 1, "implicit": 1}.get(head.type, head.bins) if head else 11
        logits = torch.zeros(*batch.mask.shape, outputs, requires_grad=True)
        low, high = (head.low, head.high) if head else (-1.0, 2.0)
        support = torch.linspace(low, high, outputs) if head is None or head.type == "categorical" else None
        return replace(made, value_logits=logits, support=support)
