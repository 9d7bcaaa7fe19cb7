"""The training loop: complete, verify, score, reward, compare, advantages, targets, update, load.

``train`` sets a run up, ``loop`` goes through its steps, ``run_step`` is one step: read that one first. Completions are
sampled from an engine or come from a dataset; everything after that is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Batch
from posttrain.decoding.build import build_decoder
from posttrain.engines.base import Engine, Sampling
from posttrain.engines.ends import completion_text, stop_tokens
from posttrain.errors import OUT_OF_TIME, Abandoned, CannotWrite, NothingSelected, Stopped, VerifierError
from posttrain.models.ends import name_ends
from posttrain.models.load import load_tokenizer
from posttrain.models.text import text_of
from posttrain.models.token_ids import continuations, ended
from posttrain.output.progress import Progress
from posttrain.output.run_folder import RunFolder, finished_steps, note_finished, step_of, write_left_out
from posttrain.output.tracking import Trackers, check_trackers
from posttrain.recipe.part import Part
from posttrain.rollout.branches import branch_values
from posttrain.rollout.collect import Collected, CompletionSource, collect, draw_examples
from posttrain.rollout.rollouts import single_turn
from posttrain.seeds import sample_seed
from posttrain.system.interrupts import arrived, interruptible, postponed
from posttrain.system.memory import resident_bytes
from posttrain.system.processes import Processes
from posttrain.system.time_limit import seconds_of, seconds_since_start
from posttrain.training.apply_parts import (
    add_advantages,
    add_baselines,
    add_rewards,
    compare_completions,
    kept_for_update,
)
from posttrain.training.checkpoints import load_checkpoint, run_state, save_checkpoint
from posttrain.training.display import columns_of
from posttrain.training.evaluate import evaluate_completions, evaluate_examples
from posttrain.training.learner import Learner, add_value_targets, score, update
from posttrain.training.memory_facts import say_memory
from posttrain.training.place_checks import check_places
from posttrain.training.ranking import ranking_by_value
from posttrain.training.recipe import Recipe
from posttrain.training.required_passes import RequiredPasses, find_required_passes
from posttrain.training.results import (
    dump_batch,
    save_models,
    start_message,
    stop_message,
    store_others,
    store_rollouts,
    write_batch,
)
from posttrain.training.save_check import check_saving
from posttrain.training.self_check import check_engine, check_first_step, check_models
from posttrain.training.setup import (
    TrainingRun,
    build_learner,
    build_opponent,
    engine_for,
    load_material,
    open_folder,
    refuse_uneven_prompts,
    run_folder,
    with_cached_reference,
)
from posttrain.training.step_metrics import Clock, step_metrics
from posttrain.training.step_warnings import StepWarnings
from posttrain.training.value_metrics import value_metrics
from posttrain.verify import VerifierPool


class StepResult(NamedTuple):
    """One step of the loop, as metrics and stored rollouts need it."""

    metrics: dict[str, float]
    batch: Batch  # as the update saw it
    kept: Bool[Tensor, " N"]  # completions that the update learned from
    collected: Collected


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Runs a recipe to its last step.

    Mistakes in recipe, data and launch are found before a model is loaded.

    Args:
        recipe: from :func:`posttrain.load_recipe`, or built in Python.
        resume: go on from the newest checkpoint in the run folder; the result is that of a run that was never stopped.

    Returns:
        The folder of the trained model, in the Hugging Face format; of the value model if only that is trained.

    Raises:
        UserError: if the recipe, the data or the launch is wrong; the message says what to change.
        VerifierError: if a verifier fails and is not told to be skipped; a checkpoint is saved first.
        Stopped: after a signal (see :func:`posttrain.system.interrupts.end_by_signals`; in Python by default only
            Ctrl-C) or at ``run.stop_after``. A checkpoint was saved if there was time; engine and workers have ended.
        RuntimeError: if the loss or a gradient is not finite in too many steps in a row; the last batch is written to
            the run's ``dump`` folder first.
    """
    check_trackers(recipe.run.trackers)
    finished = RunFolder(run_folder(recipe))
    if resume and finished_steps(finished) == recipe.steps:
        print(f"{finished.path} is finished: all {recipe.steps} steps are done; more can be asked for with --steps=N")
        note_finished(finished, recipe.steps, recipe.run.keep_finished)
        return result_of(recipe, finished)
    required = find_required_passes(recipe)
    tokenizer = load_tokenizer(recipe.policy)
    check_places(recipe, required)
    material = load_material(recipe, tokenizer, required.columns)
    with Processes(dtype=recipe.policy.dtype) as processes:
        refuse_uneven_prompts(recipe, processes)
        folder, checkpoint = processes.from_main(lambda: open_folder(recipe, resume))
        with VerifierPool(recipe.verify, plain_text=text_of(tokenizer)) as pool:
            program = resident_bytes()
            learner = checked_learner(recipe, required, processes, tokenizer)
            say_memory(learner, material, program)
            material = with_cached_reference(learner, material)
            with engine_for(recipe, material, tokenizer) as engine:
                run = TrainingRun(
                    recipe=recipe,
                    processes=processes,
                    folder=folder,
                    learner=learner,
                    tokenizer=tokenizer,
                    material=material,
                    sampler=recipe.prompts.call(size=len(material), seed=recipe.seed),
                    source=source_of(recipe, processes, learner, tokenizer, engine, pool),
                    policy_waits=recipe.value is not None and recipe.value.ready_at is not None,
                )
                if checkpoint is not None:
                    load_checkpoint(run, checkpoint)
                with (
                    saying_where_to_go_on(run),
                    postponed(grace=recipe.run.grace, last_words=partial(stop_message, run)),
                ):
                    loop(run)
                    save_models(run)
    return result_of(recipe, folder)


def checked_learner(
    recipe: Recipe, required: RequiredPasses, processes: Processes, tokenizer: PreTrainedTokenizerBase
) -> Learner:
    """Loads the models, and compares them with themselves, in memory and after a trial of saving.

    Raises:
        UserError: if a model does not load, or differs.
    """
    learner = build_learner(recipe, required, processes)
    name_ends(learner.policy.base, stop_tokens(recipe.policy, tokenizer))
    check_models(learner)
    check_saving(learner, tokenizer)
    return learner


def source_of(
    recipe: Recipe,
    processes: Processes,
    learner: Learner,
    tokenizer: Any,
    engine: Engine | None,
    verifiers: VerifierPool,
) -> CompletionSource:
    """Makes the source of a run's completions: the engine with the recipe's decoder, opponent and verifiers."""
    return CompletionSource(
        engine=engine,
        verifiers=verifiers,
        rollout=recipe.rollout,
        decode=completion_text(recipe.policy, tokenizer),
        decoder=build_decoder(recipe.decoder, engine, tokenizer, processes, recipe.policy),
        opponent=build_opponent(learner, engine),
        encode=ids_of(tokenizer),
    )


def result_of(recipe: Recipe, folder: RunFolder) -> Path:
    """The folder of the trained model; of the value model if only that is trained."""
    return folder.model if recipe.loss else folder.value


@contextmanager
def saying_where_to_go_on(run: TrainingRun) -> Iterator[None]:
    """Adds to signals and failed writes how far the run is, and where ``--resume`` goes on."""
    try:
        yield
    except KeyboardInterrupt as raised:
        code = raised.code if isinstance(raised, Stopped) else Stopped().code
        raise Stopped(stop_message(run), code) from None
    except CannotWrite as error:
        raise CannotWrite(error.problems, f"  {stop_message(run)}, once there is room") from error


def ids_of(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    """A function from a completion's text to its token ids, with the token at which sampling stops.

    Its second argument says whether the chat template rendered the prompt.
    """
    return lambda text, chat: ended(continuations([text], tokenizer)[0].ids, tokenizer, chat=chat)


def loop(run: TrainingRun) -> None:
    """Goes through the steps that the recipe still has, with evaluations, metrics and checkpoints between them."""
    recipe, processes = run.recipe, run.processes
    check_engine(run, lambda: load_policy_into_engine(run))
    first = run.step + 1
    with (
        Trackers(
            recipe.run.trackers,
            run.folder.path,
            recipe.run.project,
            recipe.resolved,
            start=run.step,
            active=processes.is_main,
        ) as trackers,
        Progress(recipe.steps, run.step, active=processes.is_main, columns=columns_of(recipe)) as progress,
    ):
        if processes.is_main:
            write_left_out(run.folder, run.material.dropped)
            progress.note(start_message(run))
        warnings = StepWarnings(recipe, progress.note)
        if recipe.evaluate is not None and run.step == 0:
            run.evaluations["before"] = evaluate_run(run)
            trackers.log(0, run.evaluations["before"])
            progress.update(0, run.evaluations["before"])
        if run.unlogged is not None:
            finish_step(run, run.unlogged, trackers, progress)
        while run.step < recipe.steps:
            metrics, batch, kept, collected = guarded_step(run)
            if run.step == first:
                check_first_step(run, metrics)
            store_rollouts(run, batch, kept, collected)
            finish_step(run, metrics, trackers, progress)
            warnings.look(run.step, metrics)
            stop_if_broken(run, metrics, batch, collected)
            save_between_steps(run)
        warnings.summarise()


def finish_step(run: TrainingRun, metrics: dict[str, float], trackers: Trackers, progress: Progress) -> None:
    """Evaluates after a step if it is time, and logs its metrics.

    If the evaluation is interrupted or a verifier fails in it, the metrics go into a checkpoint, and a resumed run
    begins with the evaluation.
    """
    options = run.recipe.evaluate
    if options is not None and (run.step == run.recipe.steps or run.step % options.every == 0):
        run.unlogged = metrics
        state = run_state(run)
        try:
            with interruptible():
                run.evaluations["after"] = evaluate_run(run)
        except Abandoned:
            raise
        except (VerifierError, Stopped):
            save_checkpoint(run, state)
            raise
        metrics |= run.evaluations["after"]
        run.unlogged = None
    trackers.log(run.step, metrics)
    progress.update(run.step, metrics)


def save_between_steps(run: TrainingRun) -> None:
    """Saves a checkpoint if it is time, or if the run must stop.

    Raises:
        Stopped: on all ranks, if a signal has arrived on one of them or the time of ``run.stop_after`` is over.
    """
    recipe, last = run.recipe, run.step == run.recipe.steps
    limit = recipe.run.stop_after
    out_of_time = OUT_OF_TIME if limit is not None and seconds_since_start() > seconds_of(limit) else 0
    code = run.processes.all_max(arrived() or out_of_time)
    if last or code or run.step % recipe.run.save_every == 0:
        save_checkpoint(run, run_state(run))
    if code and not (last and code == OUT_OF_TIME):
        raise Stopped(code=code)


def guarded_step(run: TrainingRun) -> StepResult:
    """Runs a step. If it ends before the update, saves the state before the step and raises the error.

    It does so if a verifier fails, nothing is selected, or a signal arrives.
    """
    state_before = run_state(run)
    try:
        return run_step(run)
    except Abandoned:
        raise  # it may have ended within the update
    except (VerifierError, NothingSelected, Stopped) as error:
        if isinstance(error, NothingSelected) and error.drawn is not None:
            path = run.folder.rollouts(run.step + 1, run.processes.rank, "dropped")
            write_batch(run, path, *error.drawn, ["dropped"] * len(error.drawn[0]))
        latest = run.folder.latest_checkpoint()
        needless = run.step == 0 and isinstance(error, Stopped)
        if not needless and (latest is None or step_of(latest) != run.step):
            save_checkpoint(run, state_before)
        raise


def run_step(run: TrainingRun) -> StepResult:
    """Runs one step of the loop, in the order in which the data flows."""
    recipe, clock = run.recipe, Clock()
    collected = next_completions(run)
    with clock("score"), interruptible_alone(run):
        batch = add_branch_values(run, collected.batch)  # recipes with `value.branches`
        batch = score(run.learner, batch)  # the log-probs, entropies and values that some part reads
        batch = add_rewards(recipe, batch)
        batch = compare_completions(recipe, batch)
        batch = add_advantages(recipe, batch)
        batch = add_baselines(recipe, batch)
        batch = add_value_targets(run.learner, batch)
        kept = kept_for_update(recipe, batch)
        quality = value_quality(run, batch)
    with clock("update"):
        learned = update_models(run, batch, kept)
    with clock("load"):
        load_policy_into_engine(run)
    metrics = step_metrics(run, batch, kept, collected, quality | learned, clock)
    return StepResult(metrics, batch, kept, collected)


def interruptible_alone(run: TrainingRun) -> AbstractContextManager[None]:
    """Lets signals raise in what one process does before its update; several would wait for each other."""
    return interruptible() if run.processes.world == 1 else nullcontext()


def next_completions(run: TrainingRun) -> Collected:
    """The completions that the next step learns from, sampled and verified or from the dataset."""
    recipe, material = run.recipe, run.material
    run.source.verifiers.failures.clear()
    with interruptible_alone(run):
        if material.examples is not None:
            return draw_examples(recipe, run.processes, material.examples, run.sampler, run.step)
        assert material.rows is not None
        return collect(recipe, run.processes, run.source, material.rows, run.sampler, run.step)


def add_branch_values(run: TrainingRun, batch: Batch) -> Batch:
    """Fills ``batch.value`` from branches (continuations sampled from each step), if the recipe asks for them."""
    branches = run.recipe.value.branches if run.recipe.value is not None else None
    if branches is None:
        return batch
    sampling, seed = Sampling.of(run.recipe.sampling), sample_seed(run.recipe.seed, run.step)
    return run.processes.together(lambda: branch_values(run.source, batch, branches, sampling, seed))


def value_quality(run: TrainingRun, batch: Batch) -> dict[str, float]:
    """Metrics of the values before the update. The policy stops waiting once they are good enough."""
    support = run.learner.value.support if run.learner.value is not None else None
    quality = value_metrics(batch, run.processes, support=support)
    if run.recipe.examples is not None:
        quality |= ranking_by_value([batch], run.processes)
    run.policy_waits = run.policy_waits and not critic_is_ready(run.recipe, quality)
    return quality


def critic_is_ready(recipe: Recipe, quality: dict[str, float]) -> bool:
    """True if the value model explains as much of the returns as ``value.ready_at`` asks for."""
    threshold = recipe.value.ready_at if recipe.value is not None else None
    return threshold is None or quality["value/explained_variance"] >= threshold


def update_models(run: TrainingRun, batch: Batch, kept: Bool[Tensor, " N"]) -> dict[str, float]:
    """Takes the optimiser steps on a batch, and moves the reference and the opponent where they follow the policy."""
    with undo_first_of_pair(run):
        metrics = update(run.learner, batch, kept, run.step, policy_waits=run.policy_waits)
        run.step += 1
    run.learner.other_policies.after(run.step)
    run.bad_steps = run.bad_steps + 1 if metrics["skipped"] else 0
    return metrics


@contextmanager
def undo_first_of_pair(run: TrainingRun) -> Iterator[None]:
    """Undoes the first of every two extragradient steps after it has looked ahead. Without extragradient: does nothing.

    Extragradient steps come in pairs. The first only looks ahead: afterwards the weights and the optimiser state are
    restored, and the next completions are sampled from the policy that it led to. The second one counts.

    Korpelevich 1976. For preferences: Zhou et al. 2025 (EGPO), arXiv:2503.08942.
    """
    other_policies, optimizer = run.learner.other_policies, run.learner.optimiser.optimizer
    if not run.recipe.extragradient or run.step % 2:
        yield
        other_policies.ahead = {}
        return
    moments = copy.deepcopy(optimizer.state_dict())
    other_policies.remember()
    yield
    other_policies.go_back()
    optimizer.load_state_dict(moments)


def load_policy_into_engine(run: TrainingRun) -> None:
    """Gives the engine the weights that the next step samples with, unless it has them already."""
    engine = run.source.engine
    if engine is not None and (run.recipe.loss or run.weights_version < 0):
        with run.learner.other_policies.one_step_ahead():
            engine.load(run.learner.policy.weights(), version=run.step)
        run.weights_version = run.step


def evaluate_run(run: TrainingRun) -> dict[str, float]:
    """Evaluates the policy as it is now, on the evaluation prompts and on the held-out examples."""
    rows, examples = run.material.evaluation_rows, run.material.evaluation_examples
    metrics = {} if examples is None else evaluate_examples(run.learner, examples)
    if rows is None:
        return metrics
    assert run.recipe.evaluate is not None
    source = replace(run.source, rollout=Part.of(single_turn)) if run.recipe.others_write else run.source
    if run.recipe.evaluate.guided:
        source = replace(source, engine=source.decoder)

    def store(batch: Batch, values: dict[str, list[float | None]]) -> None:
        store_others(run, "evaluation", batch.set(step=run.step), values)

    options, seed = run.recipe.evaluate, run.recipe.seed
    return metrics | evaluate_completions(options, run.processes, source, rows, seed=seed, store=store)


def stop_if_broken(run: TrainingRun, metrics: dict[str, float], batch: Batch, collected: Collected) -> None:
    """Stops a run whose loss or gradients stay non-finite.

    Raises:
        RuntimeError: after the batch of the step was written to the dump folder.
    """
    if run.bad_steps <= run.recipe.run.max_bad_steps:
        return
    dump_batch(run, batch, collected)
    run.processes.barrier()  # the first rank to stop ends the others
    norms = ", ".join(f"{name} {value}" for name, value in metrics.items() if name.endswith("grad_norm"))
    raise RuntimeError(
        f"the loss or a gradient was not finite in {run.bad_steps} steps in a row (loss {metrics['loss']}, {norms}). "
        f"The weights are those of before these steps. The last batch is in {run.folder.dump}. Try first: a lower "
        "optimizer.learning_rate, float32, a look at the rewards in that batch."
    )
