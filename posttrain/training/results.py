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
from posttrain.models.text import text_of
from posttrain.models.value_files import save_value
from posttrain.output.run_folder import RunFolder, note_finished, step_name, step_of
from posttrain.rollout.collect import Collected
from posttrain.system.files import whole_folder
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
    decode = text_of(run.tokenizer, special=True)
    prompts = [decode(row[:length].tolist()) for row, length in zip(batch.tokens, lengths, strict=True)]
    write_rollouts(path, batch, prompts, values, used_for)


def start_message(run: TrainingRun) -> str:
    """A few lines that say what is about to run: models, processes, data, engine, folder."""
    recipe, material = run.recipe, run.material
    # an engine says it itself
    ends = None if run.source.engine is not None else ends_message(recipe.policy, run.tokenizer)
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
        + resume_message(run.folder, run.step, recipe.steps)
    )


def resume_message(folder: RunFolder, step: int, steps: int) -> str:
    """Says where a resumed run goes on; empty for a new run."""
    latest = folder.latest_checkpoint()
    if latest is not None:
        return f"\n  resuming at step {step} of {steps} from {latest}"
    aside = sorted(folder.path.glob("stopped-*"))
    if not aside:
        return ""
    return f"\n  starting at step 0: there was no checkpoint. What was written before is in {aside[-1]}"


def stop_message(run: TrainingRun) -> str:
    """Says at which step a run was stopped, and from which one it can go on."""
    return f"stopped at step {run.step} of {run.recipe.steps}; {go_on_message(run.folder)}"


def go_on_message(folder: RunFolder) -> str:
    """Says where ``--resume`` goes on."""
    latest = folder.latest_checkpoint()
    return f"--resume goes on from step {step_of(latest) if latest else 0}"


def save_models(run: TrainingRun) -> None:
    """Saves the trained models in the Hugging Face format, each with a model card."""
    recipe, learner = run.recipe, run.learner
    if run.processes.is_main:
        engine = "" if run.source.engine is None else engine_name(run.source.engine)
        if recipe.loss:
            with whole_folder(run.folder.model) as folder:
                save_model(learner.policy, run.tokenizer, folder, DTYPES[recipe.policy.dtype])
                write_card(run, folder, engine, of_value=False)
        if recipe.value_loss and learner.value is not None:
            with whole_folder(run.folder.value) as folder:
                save_value(learner.value, run.tokenizer, folder, step=run.step)
                write_card(run, folder, engine, of_value=True)
        note_finished(run.folder, run.step, recipe.run.keep_finished)
    run.processes.barrier()


def write_card(run: TrainingRun, folder: Path, engine: str, *, of_value: bool) -> None:
    """Writes the model card of a trained model into its folder."""
    write_model_card(
        folder,
        run.recipe,
        before=run.evaluations.get("before"),
        after=run.evaluations.get("after"),
        steps=run.step,
        engine=engine,
        of_value=of_value,
    )
