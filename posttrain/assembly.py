"""Puts together what a run needs: data, folder, models, engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.collect import Source
from posttrain.data import PromptSampler, Rows, check_columns, load_rows
from posttrain.engines import make_engine
from posttrain.engines.base import Engine
from posttrain.errors import UserError
from posttrain.learner import Learner
from posttrain.models import DTYPES, Policy, build_policy, context_length, load_model
from posttrain.needs import Needs
from posttrain.recipe import Recipe
from posttrain.run_folder import RunFolder, changed_settings, open_run
from posttrain.runtime import Runtime


@dataclass
class Online:
    """Everything that lives as long as a run."""

    recipe: Recipe
    runtime: Runtime
    folder: RunFolder
    learner: Learner
    tokenizer: Any
    rows: Rows
    sampler: PromptSampler
    source: Source
    evaluation_rows: Rows | None = None
    step: int = 0  # steps of the loop that are done
    bad_steps: int = 0  # consecutive steps whose loss or gradient was not finite
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # "before" and "after"


def load_all_rows(recipe: Recipe, tokenizer: Any) -> tuple[Rows, Rows | None]:
    """Training and evaluation rows, each with the columns that the verifiers ask for."""
    base = recipe.path.parent if recipe.path else None
    rows = load_rows(recipe.data, tokenizer=tokenizer, base=base)
    check_columns(rows, recipe.verify)
    if recipe.evaluate is None:
        return rows, None
    held_out = load_rows(recipe.evaluate.data, tokenizer=tokenizer, base=base)
    check_columns(held_out, recipe.verify)
    return rows, held_out


def refuse_uneven_prompts(recipe: Recipe, runtime: Runtime) -> None:
    """Every rank takes an equal share of the prompts of a step.

    Raises:
        UserError: with the nearest number that works.
    """
    if recipe.prompts_per_step % runtime.world:
        better = -(-recipe.prompts_per_step // runtime.world) * runtime.world
        raise UserError(
            f"prompts_per_step: {recipe.prompts_per_step} prompts cannot be shared equally by {runtime.world} "
            f"processes; --prompts_per_step={better} can"
        )


def open_folder(recipe: Recipe, resume: bool) -> tuple[RunFolder, Path | None]:
    """The run's folder, rewound to its newest checkpoint if the run is resumed."""
    path = Path(recipe.run.folder or Path("runs") / recipe.name)
    folder = RunFolder(path)
    if resume and folder.recipe.exists():
        harmless = ("steps:", "run.")
        changed = [line for line in changed_settings(folder, recipe.resolved) if not line.startswith(harmless)]
        if changed:
            print("resuming with other settings than before, so not repeating that run exactly:", *changed, sep="\n  ")
    return open_run(path, recipe.resolved, resume=resume)


def build_models(recipe: Recipe, needs: Needs, runtime: Runtime) -> tuple[Policy, Policy | None]:
    """The policy, prepared for training, and the reference policy where one is needed beside it."""
    policy = build_policy(recipe.policy)
    other = recipe.reference.model
    reference = None
    if needs.logp_ref and (other is not None or not policy.has_adapters):
        # Held as the policy is: of equal weights the log-probs are then equal to the bit, and their KL is 0. Adapters
        # stand on weights in the recipe's dtype, and DeepSpeed puts all weights into it; else they are float32.
        in_recipe_dtype = policy.has_adapters or runtime.uses_deepspeed
        dtype = DTYPES[recipe.policy.dtype] if in_recipe_dtype else torch.float32
        model = load_model(recipe.policy, dtype=dtype, model=other)
        reference = Policy(model).requires_grad_(False).eval().to(runtime.device)
    runtime.prepare(policy, recipe.optimizer)
    return policy, reference


def build_engine(recipe: Recipe, rows: Rows, evaluation_rows: Rows | None) -> Engine:
    """The engine, with room for the longest prompt and completion.

    Raises:
        UserError: where that is more than ``engine.max_model_len`` or the model's positions.
    """
    needed = [(rows.longest_prompt, recipe.sampling.max_tokens, "sampling.max_tokens")]
    if recipe.evaluate is not None and evaluation_rows is not None:
        of_evaluation = (recipe.evaluate.sampling.max_tokens, "evaluate.sampling.max_tokens")
        needed.append((evaluation_rows.longest_prompt, *of_evaluation))
    prompt, completion, name = max(needed, key=lambda each: each[0] + each[1])
    length, limit = recipe.engine.max_model_len or prompt + completion, context_length(recipe.policy)
    for room, whose in ((length, "engine.max_model_len"), (limit, recipe.policy.model)):
        if room is not None and prompt + completion > room:
            raise UserError(
                f"the longest prompt ({prompt} tokens) and {name} ({completion}) need {prompt + completion} positions; "
                f"{whose} has {room}. Lower {name} or set data.max_prompt_tokens."
            )
    if limit is not None and length > limit:
        raise UserError(f"engine.max_model_len: {length} is more than the {limit} positions of {recipe.policy.model}")
    dtype = recipe.policy.dtype if recipe.engine.dtype == "auto" else recipe.engine.dtype
    return make_engine(recipe.policy.model, recipe.engine, dtype=dtype, max_model_len=length, seed=recipe.seed)
