"""The self-check of a run before its first step: each model against itself, and the engine against the trainer.

Log-probs that are wrong make a run wrong without a word. So every model of a run is compared with its own forward pass
on a short batch (:mod:`posttrain.models.self_check`), and the engine's log-probs with the trainer's. It takes a part of
a second for a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from posttrain.batch import pad
from posttrain.engines.base import Completion, Engine, Sampling, WeightMismatch
from posttrain.errors import RecipeError
from posttrain.models.policy import Policy
from posttrain.models.self_check import Rows, check_policy, check_value, random_states_kept, stirred
from posttrain.training.learner import Learner
from posttrain.training.other_policies import AdaptedCopy
from posttrain.training.recipe import Recipe
from posttrain.training.setup import TrainingRun

EXACT = 0.01
"""Largest mean difference of the engine's log-probs from the trainer's where both compute in float32, in nats."""

ROUNDED = 0.2
"""The largest where one of them computes in bfloat16, whose rounding differs from kernel to kernel."""

SAMPLED = 8
"""Tokens that the engine samples for the check, for each of two prompts."""


def check_models(learner: Learner) -> None:
    """Compares policy, reference and value model with their own forward passes. Called on all ranks.

    Raises:
        RecipeError: if one differs; names its family, the difference and what to set.
    """
    learner.processes.together(lambda: _check_models(learner))


def _check_models(learner: Learner) -> None:
    section, recipe = learner.recipe.policy, learner.recipe
    random_modes = section.dropout or (section.lora is not None and section.lora.dropout > 0)
    check_policy(learner.policy, trained=bool(recipe.loss), random_modes=random_modes)
    others = {"reference.model": learner.reference, "opponent.average": learner.other_policies.average}
    for place, other in others.items():
        if other is not None:
            check_policy(other, trained=False, always_adapted=isinstance(other, AdaptedCopy), place=place)
    if learner.value is not None:
        lora = recipe.value.lora if recipe.value is not None else None
        drops = random_modes or (lora is not None and lora.dropout > 0)
        check_value(learner.value, trained=bool(recipe.value_loss), random_modes=drops)


def check_engine(run: TrainingRun, load: Callable[[], None]) -> None:
    """Loads the policy into the engine and compares log-probs of tokens that it samples. Called on all ranks.

    Where there is an adapter, which does nothing when it is new, weights with a random one are loaded meanwhile.

    Args:
        load: loads the policy's weights, for the first time in this run.

    Raises:
        RecipeError: if the engine cannot hold the weights or fails, or if log-probs differ by more than
            ``engine.max_difference``.
    """
    engine = run.source.engine
    if engine is not None:
        run.processes.together(lambda: _check_engine(run, engine, load))


def _check_engine(run: TrainingRun, engine: Engine, load: Callable[[], None]) -> None:
    policy = run.learner.policy
    try:
        load()
        measured = _differences(run, engine)
    except WeightMismatch as error:
        remedy = "" if "engine.use" in str(error) else "; set engine.use: transformers"
        family = type(policy.base).__name__
        raise RecipeError(f"engine: {family}: its weights cannot be loaded: {error}{remedy}") from error
    _judge(run.recipe, policy, measured, "a short batch before the first step")


def _differences(run: TrainingRun, engine: Engine) -> float:
    """The largest of :func:`sampled_difference`, with the policy's own adapter and with a random one."""
    policy = run.learner.policy
    with run.learner.other_policies.one_step_ahead():
        measured = sampled_difference(policy, engine, run)
        if policy.has_adapters:
            with stirred(policy):
                engine.load(policy.weights(), version=run.step)
                measured = max(measured, sampled_difference(policy, engine, run))
            engine.load(policy.weights(), version=run.step)
    return measured


@torch.no_grad()
def sampled_difference(policy: Policy, engine: Engine, run: TrainingRun) -> float:
    """Mean difference between the engine's and the trainer's log-probs of tokens that the engine samples, in nats."""
    device = next(policy.parameters()).device
    rows = Rows(policy.base.config, device)
    limit = getattr(engine, "max_model_len", rows.tokens.shape[1] + SAMPLED)
    longest = max(1, min(rows.tokens.shape[1] - SAMPLED, limit - SAMPLED))
    prompts = [rows.tokens[0, :longest].tolist(), rows.tokens[1, : max(1, longest // 2)].tolist()]
    sampling = Sampling(max_tokens=min(SAMPLED, limit - longest), ignore_eos=True)
    with random_states_kept():
        completions = [samples[0] for samples in engine.generate(prompts, sampling, seeds=[1, 2])]
    tokens, mask, sampler = _joined(prompts, completions)
    policy.eval()
    with run.processes.autocast():
        logp = policy(tokens.to(device), mask.to(device))[0].cpu()
    return float((logp - sampler)[mask].abs().mean())


def _joined(prompts: list[list[int]], completions: list[Completion]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and the engine's log-probs of prompts with their completions, each ``[N, L]``."""
    pairs = list(zip(prompts, completions, strict=True))
    tokens = pad([[*prompt, *completion.tokens] for prompt, completion in pairs], dtype=torch.long)
    mask = pad([[0] * len(p) + [1] * len(c.tokens) for p, c in pairs], dtype=torch.bool)
    return tokens, mask, pad([[0.0] * len(p) + list(c.logps) for p, c in pairs], dtype=torch.float32)


def check_first_step(run: TrainingRun, metrics: Mapping[str, float]) -> None:
    """Checks ``sampler/difference`` of the first step, where it compares the sampler with the same policy.

    It does not where a decoder or an opponent writes, where the trainer's pass has dropout, and with ``extragradient``,
    whose second steps learn from completions of the policy one step ahead.

    Raises:
        RecipeError: if it is more than ``engine.max_difference``.
    """
    recipe, measured = run.recipe, metrics.get("sampler/difference", float("nan"))
    other_sampler = recipe.decoder is not None or recipe.others_write or recipe.extragradient
    if run.source.engine is None or other_sampler or recipe.policy.dropout:
        return
    if measured == measured:  # not NaN, which completions of a dataset have
        _judge(recipe, run.learner.policy, measured, "the completions of the first step")


def largest_difference(recipe: Recipe) -> float:
    """The limit of the mean difference between sampler and trainer, in nats."""
    if recipe.engine.max_difference is not None:
        return recipe.engine.max_difference
    computed = {recipe.policy.dtype, recipe.policy.dtype if recipe.engine.dtype == "auto" else recipe.engine.dtype}
    return EXACT if computed == {"float32"} else ROUNDED


def _judge(recipe: Recipe, policy: Policy, measured: float, where: str) -> None:
    limit = largest_difference(recipe)
    if not measured <= limit:  # NaN too
        family = type(policy.base).__name__
        targets = " Or an adapter is the cause: take other layers (policy.lora.targets)." if policy.has_adapters else ""
        raise RecipeError(
            f"engine: {family}: on {where} the log-probs of the engine differ from the trainer's by {measured:.3g} "
            f"nats on average; at most {limit:g} are allowed. The engine does not compute this family as Transformers "
            f"does: set engine.use: transformers, or the same dtype for policy and engine.{targets} To accept the "
            "difference, set engine.max_difference"
        )
