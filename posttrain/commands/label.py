"""``posttrain label recipes/label/math_shepherd.yaml``: labels the reasoning steps of completions by sampling."""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass

from posttrain.batch import Batch
from posttrain.data.examples import rollouts
from posttrain.data.for_policy import load_prompts, refuse_ids_without_weights
from posttrain.data.rollout_files import find_rollouts
from posttrain.engines.base import Engine, Sampling
from posttrain.engines.ends import completion_text
from posttrain.engines.for_policy import LengthBudget, policy_engine
from posttrain.errors import UserError
from posttrain.models.load import load_tokenizer
from posttrain.models.text import text_of
from posttrain.option_types import Breadth, OutputPath, PlaceName
from posttrain.output.kept_work import (
    KeptWork,
    begin,
    finish,
    kept_work,
    record_of,
    say_finished,
    saying_what_is_kept,
    write_piece,
)
from posttrain.recipe import sections
from posttrain.recipe.loading import run_file
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe, plain_settings
from posttrain.recipe.yaml_reader import Location, Overrides
from posttrain.rollout.branches import BUCKETS
from posttrain.rollout.collect import CompletionSource, complete_some, own_share
from posttrain.rollout.rollouts import single_turn
from posttrain.rollout.session import forget_prefixes
from posttrain.rollout.step_labels import StepLabels, make_step_labels, to_row
from posttrain.system.files import check_output, join_files, read_rows, write_rows
from posttrain.system.long_work import LongWork
from posttrain.system.processes import Processes
from posttrain.verify import VerifierPool


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class LabelRecipe(SamplingRecipe):
    """Settings of step labels: which completions are labelled, how, and where the labels go."""

    modules: ClassVar[Mapping[str, str]] = {"verify": "posttrain.verify.functions"}

    policy: sections.PolicySection
    """Policy that samples the branches, and the completions unless they are stored."""
    data: sections.DataSection | None = None
    """Prompts to sample completions of."""
    rollouts: PlaceName | None = None
    """Stored rollouts, instead of sampling: a file, a run's folder, or a folder of them."""
    verify: tuple[InstanceOf[Part], ...]
    completions: Breadth = 4
    """Number of completions of a prompt."""
    label: StepLabels = field(default_factory=StepLabels)
    output: OutputPath = "step_labels.jsonl"
    """File of the labels."""

    name: str = "labels"

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Yields settings that contradict each other, with their places."""
        if self.data is not None and self.rollouts is not None:
            yield ("data",), "and `rollouts` both say where completions come from: leave one of them out"
        if self.data is None and self.rollouts is None:
            yield (), "nothing says which completions to label: give `data` (prompts to sample from) or `rollouts`"
        if not self.verify:
            yield ("verify",), "is empty: nothing says which branches are right"
        if self.sampling.temperature == 0:
            yield ("sampling", "temperature"), "0 decodes greedily: all branches of a step are equal; use 1.0"


class ToLabel(NamedTuple):
    """The completions to label: stored already, or still to be sampled."""

    longest_prompt: int
    fingerprint: str  # hash of the data
    starts: list[int]  # number of completions before each prompt, and of all
    complete: Callable[[Sequence[int], CompletionSource], Batch]  # samples those of some prompts if they are not stored


def run_labels(path: str | Path, overrides: Overrides = (), *, resume: bool = False) -> Path:
    """Runs the label recipe in a YAML file, prints a summary, and returns the file of labels.

    Args:
        resume: go on with the labels that are kept.

    Raises:
        UserError: if the file or its data are wrong; the message says where and what to change.
    """
    return run_file(LabelRecipe, path, overrides, partial(label, resume=resume))


def label(recipe: LabelRecipe, *, resume: bool = False) -> Path:
    """Labels completions on all ranks; the main one writes them as JSON lines in TRL's stepwise format.

    ``examples: {use: stepwise}`` reads them. A row has TRL's columns and those of the dataset, ``estimates`` and
    ``branches`` (for each step the share of right branches after it, and their number), and ``reward``. Until all are
    written, those of each block of prompts are kept (:mod:`posttrain.output.kept_work`).

    Args:
        resume: go on with the labels that are kept.

    Raises:
        UserError: if policy, data or verifiers do not fit together, or no completion can be labelled.
        Stopped: after a signal; the message says what is kept.
    """
    file = Path(recipe.output)
    check_output(file, "output")
    work = kept_work(file, plain_settings(recipe, "output"), record=record_of(file), resume=resume)
    if work.finished:
        return say_finished(work)
    tokenizer = load_tokenizer(recipe.policy)
    share = _sampled(recipe, recipe.data, tokenizer) if recipe.data is not None else _stored(recipe, tokenizer)
    with saying_what_is_kept(work), Processes(dtype=recipe.policy.dtype) as processes:
        size = len(share.starts) - 1
        processes.every_nth(size, "data" if recipe.data is not None else "rollouts")
        begin(work, processes, share.fingerprint)
        with (
            VerifierPool(recipe.verify, plain_text=text_of(tokenizer)) as pool,
            closing(_engine(recipe, tokenizer, share.longest_prompt)) as engine,
        ):
            decode = completion_text(recipe.policy, tokenizer)
            source = CompletionSource(engine=engine, verifiers=pool, rollout=Part.of(single_turn), decode=decode)
            keep_labels(recipe, share, source, processes, work)
        processes.from_main(lambda: _finish(work, share.starts[-1]))
    return file


def keep_labels(
    recipe: LabelRecipe, share: ToLabel, source: CompletionSource, processes: Processes, work: KeptWork
) -> None:
    """Labels block by block; blocks that are kept already are not labelled again."""
    blocks = recipe.blocks(len(share.starts) - 1)
    paths = {block: work.piece("prompts", block.start, ".jsonl") for block in blocks}
    kept = [block for block in blocks if processes.from_main(paths[block].is_file)]
    work.total, work.done = len(share.starts) - 1, sum(map(len, kept))
    counting = LongWork("prompts", work.total, work.done)
    for block in blocks:
        if block in kept:
            continue
        labelled = processes.together(partial(_labelled, recipe, share, own_share(block, processes), source))
        pairs = sorted((pair for part in processes.gather(labelled) for pair in part), key=lambda pair: pair[0])
        rows = [row for _, row in pairs]
        processes.from_main(partial(write_piece, paths[block], partial(write_rows, rows=rows)))
        work.done += len(block)
        counting.count(len(block))
        counting.batch_ended()


def _labelled(
    recipe: LabelRecipe, share: ToLabel, index: Sequence[int], source: CompletionSource
) -> list[tuple[int, dict[str, Any]]]:
    """Number and row of each completion of these prompts that can be labelled."""
    if not index:
        return []
    assert source.engine is not None
    forget_prefixes(source.engine)
    batch = share.complete(index, source)
    numbers = [number for i in index for number in range(share.starts[i], share.starts[i + 1])]
    sampling = Sampling.of(recipe.sampling)
    labelled = make_step_labels(source, batch, recipe.label, sampling, seed=recipe.seed, numbers=numbers)
    return [(each.solution.number, to_row(each, recipe.label.threshold)) for each in labelled]


def _finish(work: KeptWork, completions: int) -> None:
    """Joins the kept labels to the file, and prints the summary."""
    pieces = work.pieces()
    rows = [row for piece in pieces for row in read_rows(piece)]
    if not rows:
        shutil.rmtree(work.folder)
        raise UserError(f"not one of {completions} completions ended and has a score: there is no step to label")
    finish(work, partial(join_files, pieces))
    print(label_summary(completions, rows), f"  {work.output}", sep="\n")


def _sampled(recipe: LabelRecipe, data: sections.DataSection, tokenizer: Any) -> ToLabel:
    """Reads the prompts whose completions are sampled."""
    rows = load_prompts(data, recipe.policy, recipe.verify, tokenizer=tokenizer, base=recipe.base)
    starts = [number * recipe.completions for number in range(len(rows) + 1)]

    def complete(index: Sequence[int], source: CompletionSource) -> Batch:
        work = LongWork("completions", len(index) * recipe.completions)
        return complete_some(recipe, rows, index, source, work)

    return ToLabel(rows.longest_prompt, rows.fingerprint(), starts, complete)


def _stored(recipe: LabelRecipe, tokenizer: Any) -> ToLabel:
    """Reads stored rollouts."""
    path = str(recipe.rollouts)
    find_rollouts(path, recipe.base)  # checked here, so that the error names this recipe's key
    examples = rollouts(sections.DataSection(path=path), tokenizer, recipe.base)
    refuse_ids_without_weights(examples, recipe.policy, tokenizer)
    everything = examples.batch(range(len(examples)))
    sizes = everything.group.bincount().tolist()
    scores = hashlib.blake2b(everything.score.numpy().tobytes(), digest_size=16).hexdigest()
    return ToLabel(
        int(everything.prompt_length.max()),
        examples.fingerprint() + scores,
        [0, *itertools.accumulate(sizes)],
        lambda index, source: examples.batch(index),
    )


def _engine(recipe: LabelRecipe, tokenizer: Any, longest_prompt: int) -> Engine:
    """Builds the policy's engine, with room for the excess of a branch over its own limit (see ``branch_scores``)."""
    most = recipe.sampling.max_tokens
    budget = LengthBudget(longest_prompt, most, branches=math.ceil(most / BUCKETS))
    return policy_engine(recipe.policy, recipe.engine, [budget], tokenizer=tokenizer, seed=recipe.seed)


def label_summary(completions: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """Summary of the labels in two lines: how many completions, steps and labels, and their mean."""
    labels = [label for row in rows for label in row["labels"] if label is not None]
    wrong, mean = sum(row["reward"] == 0 for row in rows), sum(labels) / len(labels)
    return (
        f"{len(rows)} of {completions} completions labelled, {wrong} of them wrong; the rest did not end\n"
        f"  {sum(len(row['labels']) for row in rows)} steps, {len(labels)} with a label, mean {mean:.3f}"
    )
