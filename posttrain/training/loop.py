"""The loop: rollout (or given examples), verify, select, score, reward, advantage, target, update."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain.batch import Batch
from posttrain.data.rollout_files import write_rollouts
from posttrain.decoding.build import build_decoder
from posttrain.errors import NothingSelected, Stopped, VerifierError
from posttrain.models.load import DTYPES, load_tokenizer
from posttrain.models.policy import describe, save_model
from posttrain.models.value_files import save_value
from posttrain.output.progress import Progress
from posttrain.output.run_folder import step_name, step_of, write_left_out
from posttrain.output.tracking import Trackers, check_trackers
from posttrain.recipe.part import Part
from posttrain.rollout.branches import branch_values
from posttrain.rollout.collect import Collected, Source, collect, draw_examples, sampling_of, verifier_means
from posttrain.rollout.rollouts import single_turn
from posttrain.seeds import sample_seed
from posttrain.system.processes import Processes
from posttrain.system.versions import engine_name
from posttrain.training.apply_parts import compared, credit, reward_batch, with_baseline
from posttrain.training.checkpoints import load_checkpoint, save_checkpoint, states
from posttrain.training.evaluate import evaluate, judge
from posttrain.training.learner import score, set_targets, update
from posttrain.training.metrics import peak_memory_mb, rollout_metrics
from posttrain.training.model_card import write_model_card
from posttrain.training.recipe import Recipe
from posttrain.training.required_passes import find_needs
from posttrain.training.setup import (
    TrainingRun,
    build_learner,
    build_opponent,
    engine_for,
    load_material,
    open_folder,
    refuse_uneven_prompts,
    with_cached_reference,
)
from posttrain.training.value_metrics import value_metrics
from posttrain.verify import VerifierPool


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Runs a recipe to its last step.

    What can be wrong with recipe, data and launch is found before a model is loaded.

    Args:
        recipe: from :func:`posttrain.load_recipe`, or built in Python.
        resume: go on from the newest checkpoint in the run folder; the result is that of a run never stopped.

    Returns:
        The folder of the trained model, in the Hugging Face format.

    Raises:
        UserError: for what a person can mend.
        VerifierError: if a verifier fails and is not told to be skipped; a checkpoint is saved first.
        Stopped: on Ctrl-C, when engine and workers are gone.
        RuntimeError: if too many steps in a row are not finite; the batch lies in the run's ``dump`` folder.
    """
    check_trackers(recipe.run.trackers)
    needs = find_needs(recipe)
    tokenizer = load_tokenizer(recipe.policy)
    material = load_material(recipe, tokenizer, needs.columns)
    with Processes(dtype=recipe.policy.dtype) as processes:
        refuse_uneven_prompts(recipe, processes)
        folder, checkpoint = processes.from_main(lambda: open_folder(recipe, resume))
        with VerifierPool(recipe.verify) as pool:
            learner = build_learner(recipe, needs, processes)
            material = with_cached_reference(learner, material)
            with engine_for(recipe, material) as engine:
                run = TrainingRun(
                    recipe=recipe,
                    processes=processes,
                    folder=folder,
                    learner=learner,
                    tokenizer=tokenizer,
                    material=material,
                    sampler=recipe.prompts.call(size=len(material), seed=recipe.seed),
                    source=Source(
                        engine=engine,
                        verifiers=pool,
                        rollout=recipe.rollout,
                        decode=text_of(tokenizer),
                        decoder=build_decoder(recipe.decoder, engine, tokenizer, processes, recipe.policy),
                        opponent=build_opponent(learner, engine),
                        encode=ids_of(tokenizer),
                    ),
                    policy_waits=recipe.value is not None and recipe.value.ready_at is not None,
                )
                if checkpoint is not None:
                    load_checkpoint(run, checkpoint)
                try:
                    loop(run)
                    finish(run)
                except KeyboardInterrupt:
                    raise Stopped(standing(run)) from None
    return folder.model if recipe.loss else folder.value


def text_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text, special tokens left out."""
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def ids_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A completion as token ids, with the end-of-sequence token behind it."""

    def encode(text: str) -> list[int]:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]

    return encode


def loop(run: TrainingRun) -> None:
    """Steps until the recipe has all of them, with what goes around a step: metrics, evaluation, checkpoints."""
    recipe, processes = run.recipe, run.processes
    hand_over(run)
    with (
        Trackers(
            recipe.run.trackers,
            run.folder.path,
            recipe.run.project,
            recipe.resolved,
            start=run.step,
            active=processes.is_main,
        ) as trackers,
        Progress(recipe.steps, run.step, active=processes.is_main) as progress,
    ):
        if processes.is_main:
            write_left_out(run.folder, run.material.dropped)
            progress.note(introduction(run))
        if recipe.evaluate is not None and run.step == 0:
            run.evaluations["before"] = measure(run)
            trackers.log(0, run.evaluations["before"])
            progress.update(0, run.evaluations["before"])
        while run.step < recipe.steps:
            metrics, batch, collected = guarded_step(run)
            last = run.step == recipe.steps
            if recipe.run.rollouts_every and run.step % recipe.run.rollouts_every == 0:
                store_rollouts(run, batch, collected)
            if recipe.evaluate and (last or run.step % recipe.evaluate.every == 0):
                try:
                    run.evaluations["after"] = measure(run)
                except VerifierError:
                    trackers.log(run.step, metrics)
                    save_checkpoint(run, states(run))
                    raise
                metrics |= run.evaluations["after"]
            trackers.log(run.step, metrics)
            progress.update(run.step, metrics)
            stop_if_broken(run, metrics, batch, collected)
            if last or run.step % recipe.run.save_every == 0:
                save_checkpoint(run, states(run))


def guarded_step(run: TrainingRun) -> tuple[dict[str, float], Batch, Collected]:
    """A step; if a verifier fails or nothing is selected, the state before it is saved and then the error goes on."""
    before = states(run)
    try:
        return run_step(run)
    except (VerifierError, NothingSelected):
        latest = run.folder.latest_checkpoint()
        if latest is None or step_of(latest) != run.step:
            save_checkpoint(run, before)
        raise


def run_step(run: TrainingRun) -> tuple[dict[str, float], Batch, Collected]:
    """One step of the loop: its metrics, the batch as the update saw it, and what was collected."""
    recipe, processes = run.recipe, run.processes
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    run.source.verifiers.failures.clear()
    collected = take(run)
    with timed(seconds, "score"):
        batch = compared(recipe, reward_batch(recipe, score(run.learner, with_branches(run, collected.batch))))
        batch = set_targets(run.learner, with_baseline(recipe, with_credit(recipe, batch)))
        support = run.learner.value.support if run.learner.value is not None else None
        judged = value_metrics(batch, processes, support=support)
        run.policy_waits = run.policy_waits and not good_enough(recipe, judged)
    with timed(seconds, "update"), looking_ahead(run):
        learned = update(run.learner, batch, run.step, policy_waits=run.policy_waits)
        run.step += 1
    run.learner.players.after(run.step)
    with timed(seconds, "load"):
        hand_over(run)
    run.bad_steps = run.bad_steps + 1 if learned["skipped"] else 0
    metrics = rollout_metrics(batch, processes) | judged | learned | verifier_means(collected.values, processes)
    metrics |= {"policy/waits": float(run.policy_waits)} if recipe.value and recipe.value.ready_at is not None else {}
    metrics |= {"prompts/drawn": float(collected.prompts_drawn), "prompts/rounds": float(collected.rounds)}
    metrics |= failures(run)
    tokens = float(processes.all_sum(torch.tensor(collected.tokens)))
    whole = time.perf_counter() - start
    seconds |= collected.seconds
    seconds |= {"other": whole - sum(seconds.values()), "step": whole}
    metrics |= {f"time/{name}": value for name, value in seconds.items()}
    metrics |= {"time/tokens_per_second": tokens / whole, "time/peak_memory_mb": peak_memory_mb()}
    return metrics, batch, collected


def take(run: TrainingRun) -> Collected:
    """What a step learns from: sampled completions, or given ones."""
    recipe, material = run.recipe, run.material
    if material.examples is not None:
        return draw_examples(recipe, run.processes, material.examples, run.sampler, run.step)
    assert material.rows is not None
    return collect(recipe, run.processes, run.source, material.rows, run.sampler, run.step)


def with_branches(run: TrainingRun, batch: Batch) -> Batch:
    """The batch with values from branches, if the recipe takes them from there."""
    branches = run.recipe.value.branches if run.recipe.value is not None else None
    if branches is None:
        return batch
    sampling, seed = sampling_of(run.recipe.sampling), sample_seed(run.recipe.seed, run.step)
    return run.processes.together(lambda: branch_values(run.source, batch, branches, sampling, seed))


def with_credit(recipe: Recipe, batch: Batch) -> Batch:
    """The batch with its advantages, if the recipe has any."""
    return batch if recipe.advantage is None else batch.set(advantage=credit(recipe, batch))


def good_enough(recipe: Recipe, judged: dict[str, float]) -> bool:
    """Whether the value model explains as much of the returns as the policy waits for."""
    threshold = recipe.value.ready_at if recipe.value is not None else None
    return threshold is None or judged["value/explained_variance"] >= threshold


def hand_over(run: TrainingRun) -> None:
    """Gives the engine the weights that the next step samples with, unless it has them already."""
    engine = run.source.engine
    if engine is not None and (run.recipe.loss or run.weights_version < 0):
        with run.learner.players.one_step_ahead():
            engine.load(run.learner.policy.weights(), version=run.step)
        run.weights_version = run.step


@contextmanager
def looking_ahead(run: TrainingRun) -> Iterator[None]:
    """Of every two steps of an extragradient the first is undone after its end: weights and optimiser are as before.

    Korpelevich 1976. For preferences: Zhou et al. 2025 (EGPO), algorithm 1, arXiv:2503.08942.
    """
    players, optimizer = run.learner.players, run.learner.optimiser.optimizer
    if not run.recipe.extragradient or run.step % 2:
        yield
        players.ahead = {}
        return
    moments = copy.deepcopy(optimizer.state_dict())
    players.remember()
    yield
    players.go_back()
    optimizer.load_state_dict(moments)


def failures(run: TrainingRun) -> dict[str, float]:
    """Verifier calls of this step that failed under ``on_error: skip``, on all ranks."""
    counted, of = run.source.verifiers.failures, run.source.verifiers.names
    totals = run.processes.all_sum(torch.tensor([float(counted[name]) for name in of])).tolist()
    return {f"failures/{name}": total for name, total in zip(of, totals, strict=True) if total}


def measure(run: TrainingRun) -> dict[str, float]:
    """How the policy as it is does on the evaluation rows, and how it judges the held-out examples."""
    rows, examples = run.material.evaluation_rows, run.material.evaluation_examples
    found = {} if examples is None else judge(run.learner, examples)
    if rows is None:
        return found
    assert run.recipe.evaluate is not None
    source = replace(run.source, rollout=Part.of(single_turn)) if run.recipe.others_write else run.source
    if run.recipe.evaluate.guided:
        source = replace(source, engine=source.decoder)
    return found | evaluate(run.recipe.evaluate, run.processes, source, rows, seed=run.recipe.seed)


def stop_if_broken(run: TrainingRun, metrics: dict[str, float], batch: Batch, collected: Collected) -> None:
    """Stops a run whose loss or gradients stay non-finite.

    Raises:
        RuntimeError: after the batch of the step was written to the dump folder.
    """
    if run.bad_steps <= run.recipe.run.max_bad_steps:
        return
    write_batch(run, run.folder.dump / f"{step_name(run.step)}-rank-{run.processes.rank}.parquet", batch, collected)
    run.processes.barrier()  # the first rank to stop ends the others
    raise RuntimeError(
        f"the loss or a gradient was not finite in {run.bad_steps} steps in a row (loss {metrics['loss']}, gradient "
        f"norm {metrics['grad_norm']}); weights are those of before. The last batch lies in {run.folder.dump}. A lower "
        "optimizer.learning_rate, float32, or a look at the rewards in that batch are the first things to try."
    )


def store_rollouts(run: TrainingRun, batch: Batch, collected: Collected) -> None:
    """The step's completions as a Parquet file, one file a rank."""
    write_batch(run, run.folder.rollouts(run.step, run.processes.rank), batch, collected)


def write_batch(run: TrainingRun, path: Path, batch: Batch, collected: Collected) -> None:
    """A batch with its prompts as text and each verifier's values."""
    starts = batch.mask.int().argmax(-1).tolist()
    prompts = [run.tokenizer.decode(row[:start].tolist()) for row, start in zip(batch.tokens, starts, strict=True)]
    write_rollouts(path, batch, prompts, collected.values)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent inside to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def introduction(run: TrainingRun) -> str:
    """What is about to run, in a few lines."""
    recipe, material = run.recipe, run.material
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
        + f"  {engine}, run folder {run.folder.path}"
    )


def standing(run: TrainingRun) -> str:
    """How far a run is that was stopped, and where it can go on."""
    latest = run.folder.latest_checkpoint()
    return f"stopped at step {run.step}; --resume goes on from step {step_of(latest) if latest else 0}"


def finish(run: TrainingRun) -> None:
    """The trained models in the Hugging Face format, with their cards."""
    recipe, learner = run.recipe, run.learner
    if run.processes.is_main:
        engine = "" if run.source.engine is None else engine_name(run.source.engine)
        if recipe.loss:
            save_model(learner.policy, run.tokenizer, run.folder.model, DTYPES[recipe.policy.dtype])
        if recipe.value_loss and learner.value is not None:
            save_value(learner.value, run.tokenizer, run.folder.value, step=run.step)
        made = {run.folder.model: False} if recipe.loss else {}
        made |= {run.folder.value: True} if recipe.value_loss else {}
        for folder, of_value in made.items():
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
