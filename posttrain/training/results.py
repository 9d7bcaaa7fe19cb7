"""The results of a run on disk and on the screen: stored rollouts, trained models, first and last message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Bool
from torch import Tensor

from posttrain.batch import Batch
from posttrain.data.rollout_files import RolloutKind, write_rollouts
from posttrain.engines.ends import ends_message
from posttrain.models.load import DTYPES
from posttrain.models.policy import describe, save_model
from posttrain.models.value_files import save_value
from posttrain.output.run_folder import step_name, step_of
from posttrain.rollout.collect import Collected
from posttrain.system.versions import engine_name
from posttrain.training.model_card import write_model_card
from posttrain.training.setup import TrainingRun


def store_rollouts(run: TrainingRun, batch: Batch, kept: Bool[Tensor, " N"], collected: Collected) -> None:
    """Writes the step's completions to Parquet files, one file a rank for each kind that ``run.rollouts_of`` names.

    Args:
        kept: completions that the update learned from.
    """
    every, kinds = run.recipe.run.rollouts_every, run.recipe.run.rollouts_of
    if not every or run.step % every:
        return
    if "training" in kinds:
        used = (kept | batch.baseline_only).tolist()
        used_for = ["training" if each else "dropped" for each in used]
        write_batch(run, run.folder.rollouts(run.step, run.processes.rank), batch, collected.values, used_for)
    if "dropped" in kinds and collected.dropped is not None:
        store_others(run, "dropped", collected.dropped, collected.dropped_values)


def store_others(run: TrainingRun, kind: RolloutKind, batch: Batch, values: dict[str, list[float | None]]) -> None:
    """Writes completions that no update learns from to a folder of their own, unless ``run`` says to store none."""
    if run.recipe.run.rollouts_every and kind in run.recipe.run.rollouts_of:
        path = run.folder.rollouts(run.step, run.processes.rank, kind)
        write_batch(run, path, batch, values, [kind] * len(batch))


def dump_batch(run: TrainingRun, batch: Batch, collected: Collected) -> None:
    """Writes the batch of a step that went wrong to the run's dump folder, one file a rank."""
    path = run.folder.dump / f"{step_name(run.step)}-rank-{run.processes.rank}.parquet"
    write_batch(run, path, batch, collected.values)


def write_batch(
    run: TrainingRun,
    path: Path,
    batch: Batch,
    values: dict[str, list[float | None]],
    used_for: Sequence[str] | None = None,
) -> None:
    """Writes a batch with its prompts as text, the values of each verifier, and what each completion was used for."""
    lengths = batch.prompt_length.tolist()
    prompts = [run.tokenizer.decode(row[:length].tolist()) for row, length in zip(batch.tokens, lengths, strict=True)]
    write_rollouts(path, batch, prompts, values, used_for)


def start_message(run: TrainingRun) -> str:
    """A few lines that say what is about to run: models, processes, data, engine, folder."""
    recipe, material = run.recipe, run.material
    ends = ends_message(recipe.policy, run.tokenizer)
    processes = "1 process" if run.processes.world == 1 else f"{run.processes.world} processes"
    models = describe(run.learner.policy)
    if run.learner.value is not None:
        models += f", values from {describe(run.learner.value)}"
    if material.examples is None:
        size = f"{len(material):,} prompts, {recipe.prompts_per_step} x {recipe.completions} completions a step"
    else:
        size = f"{len(material):,} examples, {recipe.prompts_per_step} a step"
    engine = "no engine" if run.source.engine is None else f"engine {engine_name(run.source.engine)}"
    return (
        f"{recipe.name}: {models}, {processes} on {run.processes.device.type}\n"
        f"  {size}, {recipe.steps} steps\n"
        + "".join(f"  {entry}\n" for entries in material.dropped.values() for entry in entries)
        + ("" if ends is None else f"  {ends}\n")
        + f"  {engine}, run folder {run.folder.path}"
    )


def stop_message(run: TrainingRun) -> str:
    """Says at which step a run was stopped, and from which one it can go on."""
    latest = run.folder.latest_checkpoint()
    return f"stopped at step {run.step}; --resume goes on from step {step_of(latest) if latest else 0}"


def save_models(run: TrainingRun) -> None:
    """Saves the trained models in the Hugging Face format, each with a model card."""
    recipe, learner = run.recipe, run.learner
    if run.processes.is_main:
        engine = "" if run.source.engine is None else engine_name(run.source.engine)
        if recipe.loss:
            save_model(learner.policy, run.tokenizer, run.folder.model, DTYPES[recipe.policy.dtype])
        if recipe.value_loss and learner.value is not None:
            save_value(learner.value, run.tokenizer, run.folder.value, step=run.step)
        folders = {run.folder.model: False} if recipe.loss else {}
        folders |= {run.folder.value: True} if recipe.value_loss else {}
        for folder, of_value in folders.items():
            write_model_card(
                folder,
                recipe,
                before=run.evaluations.get("before"),
                after=run.evaluations.get("after"),
                steps=run.step,
                engine=engine,
                of_value=of_value,
            )
    run.processes.barrier()
