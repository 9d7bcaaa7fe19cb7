"""Step labels from a YAML file: ``posttrain label recipes/value/labels.yaml`` samples, verifies, branches, writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass

from posttrain.batch import Batch
from posttrain.data import check_columns, load_rows
from posttrain.data.examples import rollouts
from posttrain.engines.base import Engine, Sampling
from posttrain.engines.for_policy import LengthBudget, policy_engine
from posttrain.errors import UserError
from posttrain.models.load import load_tokenizer
from posttrain.option_types import PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.yaml_reader import Location, Overrides
from posttrain.rollout.branches import BUCKETS
from posttrain.rollout.collect import CompletionSource, complete_all
from posttrain.rollout.rollouts import single_turn
from posttrain.rollout.step_labels import StepLabels, make_step_labels, to_row
from posttrain.system.files import write_rows
from posttrain.system.processes import Processes
from posttrain.verify import VerifierPool


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class LabelRecipe(SamplingRecipe):
    """Which completions are labelled step by step, how, and where the labels go."""

    modules: ClassVar[Mapping[str, str]] = {"verify": "posttrain.verify.functions"}

    policy: sections.PolicySection  # samples the branches, and the completions unless they are stored
    data: sections.DataSection | None = None  # prompts to sample completions of
    rollouts: str | None = None  # what a run stored, instead: a file, or a folder of them
    verify: tuple[InstanceOf[Part], ...]
    completions: PositiveCount = 4  # a prompt
    label: StepLabels = field(default_factory=StepLabels)
    output: str = "step_labels.jsonl"

    name: str = "labels"

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        if self.data is not None and self.rollouts is not None:
            yield ("data",), "completions come from `rollouts`, prompts and columns with them: leave one of both out"
        if self.data is None and self.rollouts is None:
            yield (), "nothing says which completions to label: give `data` (prompts to sample from) or `rollouts`"
        if not self.verify:
            yield ("verify",), "is empty: nothing says which branches are right"
        if self.sampling.temperature == 0:
            yield ("sampling", "temperature"), "0 decodes greedily: all branches of a step are equal; use 1.0"


def run_labels(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the label recipe in a YAML file, prints what came of it, and returns the file of labels.

    Raises:
        UserError: for what a person can mend.
    """
    return label(load_as(LabelRecipe, path, overrides))


def label(recipe: LabelRecipe) -> Path:
    """Labels completions on all ranks; the main one writes them as JSON lines in TRL's stepwise format.

    ``examples: {use: stepwise}`` reads them. Beside TRL's columns a row has those of the data set, ``estimates`` and
    ``branches`` (the share of right branches after each step, and how many there were), and ``reward``.

    Raises:
        UserError: for what a person can mend.
    """
    tokenizer = load_tokenizer(recipe.policy)
    rows = None if recipe.data is None else load_rows(recipe.data, tokenizer=tokenizer, base=recipe.base)
    if rows is not None:
        check_columns(rows, recipe.verify)

    def decode(ids: Any) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    with Processes(dtype=recipe.policy.dtype) as processes:
        stored = _stored(recipe, tokenizer, processes)
        longest = rows.longest_prompt if rows is not None else int(stored.mask.int().argmax(-1).max())  # type: ignore
        with VerifierPool(recipe.verify) as pool, closing(_engine(recipe, longest)) as engine:
            source = CompletionSource(engine=engine, verifiers=pool, rollout=Part.of(single_turn), decode=decode)
            batch = stored if rows is None else complete_all(recipe, rows, source, processes)
            assert batch is not None
            sampling = Sampling.of(recipe.sampling)
            make = partial(make_step_labels, source, batch, decode, recipe.label, sampling, seed=recipe.seed)
            labelled = processes.together(make)
        found = [to_row(each, recipe.label.threshold) for each in labelled]
        counts = processes.gather((len(batch), found))
    return _write(
        recipe, sum(size for size, _ in counts), [row for _, part in counts for row in part], processes.is_main
    )


def _write(recipe: LabelRecipe, completions: int, rows: list[dict[str, Any]], is_main: bool) -> Path:
    path = Path(recipe.output)
    if not rows:
        raise UserError(f"not one of {completions} completions ended and has a score: there is no step to label")
    if is_main:
        write_rows(path, rows)
        print(summary(completions, rows), f"  {path}", sep="\n")
    return path


def summary(completions: int, rows: list[dict[str, Any]]) -> str:
    """What the labels are, in two lines."""
    labels = [label for row in rows for label in row["labels"] if label is not None]
    wrong, mean = sum(row["reward"] == 0 for row in rows), sum(labels) / len(labels)
    return (
        f"{len(rows)} of {completions} completions labelled, {wrong} of them wrong; the others did not end\n"
        f"  {sum(len(row['labels']) for row in rows)} steps, {len(labels)} with a label, mean {mean:.3f}"
    )


def _stored(recipe: LabelRecipe, tokenizer: Any, processes: Processes) -> Batch | None:
    """This rank's share of the stored completions."""
    if recipe.rollouts is None:
        return None
    examples = rollouts(sections.DataSection(path=recipe.rollouts), tokenizer, recipe.base)
    return examples.batch(processes.every_nth(len(examples), "rollouts"))


def _engine(recipe: LabelRecipe, longest_prompt: int) -> Engine:
    """The engine, with room for what exceeds a branch's own limit in a call for several."""
    most = recipe.sampling.max_tokens
    budget = LengthBudget(longest_prompt, most, branches=math.ceil(most / BUCKETS))
    return policy_engine(recipe.policy, recipe.engine, [budget], seed=recipe.seed)
