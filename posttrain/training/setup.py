"""Sets up what a training run needs: data, folder, models, optimiser, engine."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.data import PromptSampler, Rows
from posttrain.data.examples.columns import read_numbers
from posttrain.data.examples.dataset_examples import DatasetExamples, Examples
from posttrain.data.for_policy import load_prompts, refuse_ids_without_weights
from posttrain.data.left_out import LeftOut
from posttrain.decoding.mixture import Mixture
from posttrain.engines.base import Engine, ShapingEngine
from posttrain.engines.for_policy import LengthBudget, policy_engine
from posttrain.errors import DataError, UserError
from posttrain.models.joint import JointModel
from posttrain.models.load import DTYPES, check_tokens, load_model
from posttrain.models.policy import Policy, build_policy
from posttrain.models.value import ValueKind, target_copy
from posttrain.models.value_files import build_value
from posttrain.output.run_folder import RunFolder, changed_settings, open_run
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.recipe.sections import ValueSection
from posttrain.rollout.collect import CompletionSource, index_chunks
from posttrain.system.processes import Processes
from posttrain.training.learner import Learner
from posttrain.training.optimiser import Group, Optimiser
from posttrain.training.other_policies import OtherPolicies, adapted_copy, check_twins
from posttrain.training.recipe import Recipe
from posttrain.training.reference_cache import schedule_of, uses_cache, with_reference
from posttrain.training.required_passes import RequiredPasses


@dataclass(frozen=True)
class Material:
    """The data of a run: prompts to sample from or completions from the dataset, and held-out data to measure on."""

    rows: Rows | None  # prompts; None if the completions come from the dataset
    examples: Examples | None  # completions from the dataset; None if they are sampled
    evaluation_rows: Rows | None  # held-out prompts
    evaluation_examples: Examples | None = None  # held-out completions

    @property
    def dropped(self) -> dict[str, tuple[LeftOut, ...]]:
        """Rows of the training and evaluation data that are not used, with the reasons."""
        training, held_out = self.rows or self.examples, (self.evaluation_rows, self.evaluation_examples)
        dropped = {"data": training.dropped if training is not None else ()}
        dropped |= {"evaluate": sum((data.dropped for data in held_out if data is not None), ())}
        return {name: entries for name, entries in dropped.items() if entries}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the training data."""
        training = self.rows or self.examples
        return "" if training is None else training.fingerprint()

    def __len__(self) -> int:
        """Number of prompts, or of groups of completions from the dataset."""
        return len(self.rows if self.rows is not None else self.examples or ())


@dataclass
class TrainingRun:
    """The state of a run: everything that lives from its first step to its last."""

    recipe: Recipe
    processes: Processes
    folder: RunFolder
    learner: Learner
    tokenizer: Any
    material: Material
    sampler: PromptSampler
    source: CompletionSource
    step: int = 0  # number of steps of the loop that are done
    unlogged: dict[str, float] | None = None  # metrics of a step that is done but neither evaluated nor logged
    bad_steps: int = 0  # consecutive steps whose loss or gradient was not finite
    weights_version: int = -1  # version of the policy's weights in the engine; -1: none yet
    policy_waits: bool = False  # True until the value model is good enough
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics by time: "before" and "after"


def load_material(recipe: Recipe, tokenizer: Any, numbers: Sequence[str] = ()) -> Material:
    """Loads training and evaluation data, and checks that the columns which verifiers and other parts read are there.

    Args:
        numbers: columns of numbers that parts other than verifiers read.
    """
    base = recipe.path.parent if recipe.path else None
    rows = examples = held_out = held_out_examples = None
    if recipe.examples is not None:
        examples = load_examples(recipe.examples, recipe.data, recipe.policy, tokenizer, base, numbers)
    else:
        rows = load_prompts(recipe.data, recipe.policy, recipe.verify, tokenizer=tokenizer, base=base)
        for name in numbers:
            read_numbers(rows, name)
    if recipe.evaluate is not None and recipe.evaluate.data is not None:
        with errors_of("evaluate.data"):
            asked = recipe.evaluate.data
            held_out = load_prompts(asked, recipe.policy, recipe.verify, tokenizer=tokenizer, base=base)
    if recipe.evaluate is not None and recipe.evaluate.examples is not None and recipe.examples is not None:
        with errors_of("evaluate.examples"):
            asked = recipe.evaluate.examples
            held_out_examples = load_examples(recipe.examples, asked, recipe.policy, tokenizer, base, numbers)
    return Material(rows, examples, held_out, held_out_examples)


@contextmanager
def errors_of(section: str) -> Iterator[None]:
    """Names the section that a dataset was read for in its errors, which call every section ``data``.

    Raises:
        DataError: the same error, with ``evaluate.data.path`` in place of ``data.path`` and the like.
    """
    try:
        yield
    except DataError as error:
        raise DataError(
            re.sub(r"(?<![\w.])data\.(?=[a-z_]+\b)", f"{section}.", text) for text in error.problems
        ) from error


def load_examples(
    part: Part,
    data: sections.DataSection,
    policy: sections.PolicySection,
    tokenizer: Any,
    base: Path | None,
    numbers: Sequence[str],
) -> Examples:
    """Loads completions from the dataset, and checks their tokens and the columns of numbers that parts read."""
    examples = part(data, tokenizer, base)
    refuse_ids_without_weights(examples, policy, tokenizer)
    if isinstance(examples, DatasetExamples):
        examples.check_numbers(numbers)
    return examples


def refuse_uneven_prompts(recipe: Recipe, processes: Processes) -> None:
    """Checks that every rank can take an equal share of the prompts of a step.

    Raises:
        UserError: if not, with the next number that works.
    """
    if recipe.prompts_per_step % processes.world:
        better = -(-recipe.prompts_per_step // processes.world) * processes.world
        raise UserError(
            f"prompts_per_step: {recipe.prompts_per_step} prompts cannot be shared equally by {processes.world} "
            f"processes; --prompts_per_step={better} can"
        )


def run_folder(recipe: Recipe) -> Path:
    """Path of the run's folder."""
    return Path(recipe.run.folder or Path("runs") / recipe.name)


def open_folder(recipe: Recipe, resume: bool) -> tuple[RunFolder, Path | None]:
    """Opens the run's folder, rewound to its newest checkpoint if the run is resumed."""
    path = run_folder(recipe)
    folder = RunFolder(path)
    if resume and folder.recipe.exists():
        harmless = ("steps:", "run.")
        changed = [line for line in changed_settings(folder.recipe, recipe.resolved) if not line.startswith(harmless)]
        if changed:
            print("resuming with other settings than before, so not repeating that run exactly:", *changed, sep="\n  ")
    return open_run(path, recipe.resolved, resume=resume, keep=recipe.run.keep)


def build_learner(recipe: Recipe, required: RequiredPasses, processes: Processes) -> Learner:
    """Builds the models of a run. Those with a loss are prepared for training; others are loaded only if needed."""
    torch.manual_seed(recipe.seed)  # adapters and heads of several members start from random weights
    policy = build_policy(recipe.policy)
    other_policies = build_other_policies(recipe, required, processes, policy)
    value = slow = None
    if required.value_model:
        value = build_value(recipe.value or ValueSection(), recipe.policy, policy, value_kind(recipe))
    if value is not None and recipe.value is not None and recipe.value.target_rate is not None:
        slow = target_copy(value)
    groups: list[Group] = []
    learns = value.own_parameters() if value is not None and recipe.value_loss else {}
    value_parameters = [parameter for parameter in learns.values() if parameter.requires_grad]
    if not recipe.loss:
        freeze_policy(policy, learns)
    if recipe.loss:
        value_ids = {id(parameter) for parameter in value_parameters}
        policy_parameters = [p for p in policy.parameters() if p.requires_grad and id(p) not in value_ids]
        groups.append(Group(policy_parameters, recipe.optimizer))
    if value_parameters:
        groups.append(Group(value_parameters, (recipe.value or ValueSection()).optimizer))
    trained = JointModel(policy if recipe.loss else None, value if recipe.value_loss else None)
    optimiser = Optimiser(processes, trained, groups)
    for model in (policy, value, slow):
        if model is not None:
            model.to(processes.device)
    return Learner(recipe, processes, optimiser, policy, other_policies, value, slow, required)


def freeze_policy(policy: Policy, learns: Mapping[str, nn.Parameter]) -> None:
    """Switches off the gradients of a policy without a loss, but not those of ``learns``.

    ``learns`` are a value model's adapters on the policy's weights. Data-parallel wrappers would wait for the gradients
    of adapters that the loss does not reach.
    """
    learning = {id(parameter) for parameter in learns.values()}
    for parameter in policy.parameters():
        if id(parameter) not in learning:
            parameter.requires_grad_(False)


def build_other_policies(
    recipe: Recipe, required: RequiredPasses, processes: Processes, policy: Policy
) -> OtherPolicies:
    """Builds the policies beside the one that learns: the reference, and the average that the opponent may need.

    Raises:
        UserError: if a reference should move that nothing reads or that cannot move; if extragradient steps are asked
            for under DeepSpeed, whose sharded optimiser state cannot be restored.
    """
    if recipe.extragradient and processes.uses_deepspeed:
        raise UserError("extragradient: DeepSpeed's sharded optimiser cannot go back a step; launch without DeepSpeed")
    opponent = recipe.opponent
    average = None
    if opponent is not None and opponent.average is not None:
        average = Policy(copy.deepcopy(policy.model)).requires_grad_(False).eval().to(processes.device)
    reference = build_reference(recipe, required, processes, policy)
    if reference is not None and recipe.reference.every is not None:
        check_twins(reference, policy)
    return OtherPolicies(policy, reference, average, recipe)


def build_reference(recipe: Recipe, required: RequiredPasses, processes: Processes, policy: Policy) -> Policy | None:
    """Builds the reference policy if one is needed; None if the policy without its adapters is the reference.

    Raises:
        UserError: if it should move and nothing reads it.
    """
    other, moves = recipe.reference.model, recipe.reference.every is not None
    plays = recipe.opponent is not None and recipe.opponent.average is None
    if other is None and uses_cache(recipe, required):
        return None  # it is read before the first step only, when the policy is the reference
    needed = required.logp_ref or required.kl_ref or (required.value_next and bool(recipe.loss)) or plays
    if moves and not needed:
        raise UserError("reference.every: no part of the recipe reads the reference; leave it out")
    if moves and policy.has_adapters:
        return adapted_copy(policy)
    if not needed or (other is None and policy.has_adapters):
        return None
    # Load it in the same dtype as the policy, so that equal weights give bit-equal log-probs and a KL of exactly 0.
    # Base weights under adapters have the recipe's dtype, as have all weights under DeepSpeed; else they are float32.
    in_recipe_dtype = policy.has_adapters or processes.uses_deepspeed
    dtype = DTYPES[recipe.policy.dtype] if in_recipe_dtype else torch.float32
    if other is not None:
        check_tokens(recipe.policy, other, "reference.model", kind="reference")
    model = load_model(recipe.policy, dtype=dtype, model=other, place="reference.model" if other else "policy.model")
    return Policy(model).requires_grad_(False).eval().to(processes.device)


def with_cached_reference(learner: Learner, material: Material) -> Material:
    """Takes the reference's log-probs from the cache if it can hold them, and then frees the reference model.

    Called before the first step.
    """
    if material.examples is None or not uses_cache(learner.recipe, learner.required):
        return material
    examples = with_reference(learner, material.examples, schedule_of(learner.recipe, len(material)))
    held_out: Examples | None = material.evaluation_examples
    if held_out is not None:
        held_out = with_reference(learner, held_out, index_chunks(len(held_out), learner.recipe.prompts_per_step))
    learner.other_policies.reference = None
    return replace(material, examples=examples, evaluation_examples=held_out)


def value_kind(recipe: Recipe) -> ValueKind | None:
    """The kind and temperature of the values that a recipe trains, which their checkpoint records.

    Without a target nothing is learned, and a saved value model keeps its kind.
    """
    if recipe.target is None:
        return None
    chosen = recipe.target.every_option
    soft = next((part for part in (*recipe.value_loss, recipe.target) if part.fact("soft_value")), None)
    if soft is not None:
        return ValueKind("soft", soft.every_option[soft.fact("soft_value")])
    kind = chosen.get("backup", "mean")
    return ValueKind(kind, chosen.get("beta") if kind == "soft" else None)


def build_opponent(learner: Learner, engine: Engine | None) -> Engine | None:
    """Builds the engine that samples the opponent's completions; None if the recipe has no opponent."""
    chosen = learner.recipe.opponent
    if chosen is None or engine is None:
        return None
    assert isinstance(engine, ShapingEngine)
    other_policies = learner.other_policies
    other = other_policies.average or other_policies.reference
    return Mixture(engine, other or other_policies.policy, share=chosen.share, without_adapters=other is None)


@contextmanager
def engine_for(recipe: Recipe, material: Material, tokenizer: Any) -> Iterator[Engine | None]:
    """The engine of a run, closed at its end; None if nothing is sampled."""
    if material.rows is None and material.evaluation_rows is None:
        yield None
        return
    with closing(build_engine(recipe, material, tokenizer)) as engine:
        yield engine


def build_engine(recipe: Recipe, material: Material, tokenizer: Any) -> Engine:
    """Builds an engine that is long enough for the longest prompt and completion.

    Raises:
        UserError: if that is more than ``engine.max_model_len`` or than the model's positions.
    """
    needed: list[LengthBudget] = []
    if material.rows is not None:
        needed.append(
            LengthBudget(material.rows.longest_prompt, recipe.sampling.max_tokens, place=material.rows.longest_place)
        )
    if recipe.evaluate is not None and material.evaluation_rows is not None:
        most = recipe.evaluate.sampling.max_tokens
        needed.append(LengthBudget(material.evaluation_rows.longest_prompt, most, "evaluate.sampling.max_tokens"))
    return policy_engine(recipe.policy, recipe.engine, needed, tokenizer=tokenizer, seed=recipe.seed)
