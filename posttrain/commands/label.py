"""``posttrain label recipes/label/math_shepherd.yaml``: labels the reasoning steps of completions by sampling."""

from __future__ import annotations

import math
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
from posttrain.option_types import Breadth
from posttrain.recipe import sections
from posttrain.recipe.loading import run_file
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.yaml_reader import Location, Overrides
from posttrain.rollout.branches import BUCKETS
from posttrain.rollout.collect import CompletionSource, complete_all
from posttrain.rollout.rollouts import single_turn
from posttrain.rollout.step_labels import StepLabels, make_step_labels, to_row
from posttrain.system.files import check_output, write_rows
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
    rollouts: str | None = None
    """Stored rollouts, instead of sampling: a file, a run's folder, or a folder of them."""
    verify: tuple[InstanceOf[Part], ...]
    completions: Breadth = 4
    """Number of completions of a prompt."""
    label: StepLabels = field(default_factory=StepLabels)
    output: str = "step_labels.jsonl"
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
    """A rank's share of the completions to label: stored already, or still to be sampled."""

    longest_prompt: int
    complete: Callable[[CompletionSource], Batch]  # returns the completions; samples them if they are not stored


def run_labels(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the label recipe in a YAML file, prints a summary, and returns the file of labels.

    Raises:
        UserError: if the file or its data are wrong; the message says where and what to change.
    """
    return run_file(LabelRecipe, path, overrides, label)


def label(recipe: LabelRecipe) -> Path:
    """Labels completions on all ranks; the main one writes them as JSON lines in TRL's stepwise format.

    ``examples: {use: stepwise}`` reads them. A row has TRL's columns and those of the dataset, ``estimates`` and
    ``branches`` (for each step the share of right branches after it, and their number), and ``reward``.

    Raises:
        UserError: if policy, data or verifiers do not fit together, or no completion can be labelled.
    """
    check_output(Path(recipe.output), "output")
    tokenizer = load_tokenizer(recipe.policy)
    if recipe.data is not None:
        share_of = _sampled(recipe, recipe.data, tokenizer)
    else:
        share_of = _stored(recipe, str(recipe.rollouts), tokenizer)
    decode = completion_text(recipe.policy, tokenizer)
    with Processes(dtype=recipe.policy.dtype) as processes:
        share = share_of(processes)
        with (
            VerifierPool(recipe.verify, plain_text=text_of(tokenizer)) as pool,
            closing(_engine(recipe, tokenizer, share.longest_prompt)) as engine,
        ):
            source = CompletionSource(engine=engine, verifiers=pool, rollout=Part.of(single_turn), decode=decode)
            batch = share.complete(source)
            sampling = Sampling.of(recipe.sampling)
            make = partial(make_step_labels, source, batch, decode, recipe.label, sampling, seed=recipe.seed)
            labelled = processes.together(make)
        rows = [to_row(solution, recipe.label.threshold) for solution in labelled]
        shares = processes.gather((len(batch), rows))
    completions, rows = sum(size for size, _ in shares), [row for _, part in shares for row in part]
    if not rows:
        raise UserError(f"not one of {completions} completions ended and has a score: there is no step to label")
    path = Path(recipe.output)
    if processes.is_main:
        write_rows(path, rows)
        print(label_summary(completions, rows), f"  {path}", sep="\n")
    return path


def _sampled(recipe: LabelRecipe, data: sections.DataSection, tokenizer: Any) -> Callable[[Processes], ToLabel]:
    """Reads the prompts, and returns the function that gives a rank its share of them."""
    rows = load_prompts(data, recipe.policy, recipe.verify, tokenizer=tokenizer, base=recipe.base)
    return lambda processes: ToLabel(rows.longest_prompt, partial(complete_all, recipe, rows, processes=processes))


def _stored(recipe: LabelRecipe, path: str, tokenizer: Any) -> Callable[[Processes], ToLabel]:
    """Reads stored rollouts, and returns the function that gives a rank its share of them."""
    find_rollouts(path, recipe.base)  # checked here, so that the error names this recipe's key
    examples = rollouts(sections.DataSection(path=path), tokenizer, recipe.base)
    refuse_ids_without_weights(examples, recipe.policy, tokenizer)

    def share(processes: Processes) -> ToLabel:
        batch = examples.batch(processes.every_nth(len(examples), "rollouts"))
        return ToLabel(int(batch.prompt_length.max()), lambda source: batch)

    return share


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
