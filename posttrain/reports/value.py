"""Measures a value model: gets completions, predicts their values, and writes numbers, pictures and a page."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from posttrain.batch import Batch, Finish
from posttrain.data import Rows
from posttrain.data.for_policy import load_prompts
from posttrain.data.rollout_files import find_rollouts, read_rollouts
from posttrain.data.steps import pieces, steps_by_text
from posttrain.engines.base import Engine
from posttrain.engines.ends import completion_text
from posttrain.engines.for_policy import LengthBudget, policy_engine
from posttrain.errors import DataError, UserError
from posttrain.micro_batches import length_groups
from posttrain.models.load import configuration_of, embedding_rows, load_tokenizer
from posttrain.models.text import text_of
from posttrain.models.value import ValueModel
from posttrain.models.value_files import load_value
from posttrain.output.kept_work import KeptWork, begin, finish, kept_report, say_finished, saying_what_is_kept
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import plain_settings
from posttrain.reports.kept_value import keep_batches, keep_branches
from posttrain.reports.metrics_file import without_nan, write_metrics
from posttrain.reports.page import Example, figure, write_page
from posttrain.reports.value_plots import PICTURES, draw_all
from posttrain.reports.value_suite import ValueSuite
from posttrain.rollout.branches import BUCKETS, BranchPoint, choose_branch_points, value_at
from posttrain.rollout.collect import CompletionSource
from posttrain.rollout.rollouts import single_turn
from posttrain.system.files import check_output_folder, hash_of_files, writing
from posttrain.system.processes import Processes
from posttrain.system.versions import versions
from posttrain.training import value_metrics as metrics
from posttrain.verify import VerifierPool

NOTES = {
    "max": "This model predicts the best continuation, and the outcomes are of sampled ones: expect lower outcomes.",
    "greedy": "This model predicts the greedy continuation, and the outcomes are of sampled ones: they need not agree.",
    "soft": "This model's values are soft, beta log E exp(r / beta): values and outcomes are compared as "
    "exp((r - top) / beta), on which scale a soft value is a mean; top is the highest outcome.",
}
"""Notes for the page, by kind of value: why values and outcomes may differ."""


class Branches(NamedTuple):
    """Prefixes of completions, with the scores of continuations sampled from each."""

    points: Sequence[BranchPoint]
    scores: Float[Tensor, "P K"]


def evaluate_value(suite: ValueSuite, *, resume: bool = False) -> Path:
    """Runs a suite on all ranks; the main one writes ``metrics.json``, the pictures and ``index.html``.

    Args:
        resume: go on with the completions and branches that are kept.

    Returns:
        The report's folder.

    Raises:
        UserError: if models, data or verifiers do not fit together; the message says what to change.
        Stopped: after a signal; the message says what is kept.
    """
    check_output_folder(suite.folder, "report.folder")
    work = kept_report(suite.folder, plain_settings(suite, "report"), resume=resume, key="report.folder")
    if work.finished:
        return say_finished(work)
    configuration_of("value.model", suite.value.model)
    policy = suite.policy or sections.PolicySection(model=suite.value.model)
    tokenizer = load_tokenizer(policy)
    rows = None
    if suite.data is not None:
        rows = load_prompts(suite.data, policy, suite.verify, tokenizer=tokenizer, base=suite.base)
    with saying_what_is_kept(work), Processes(dtype=policy.dtype) as processes:
        model = load_value(suite.value.model, place="value.model").eval().requires_grad_(False).to(processes.device)
        begin(work, processes, _fingerprint(suite, rows))
        batch, branches = completions_and_branches(suite, policy, rows, tokenizer, processes, work)
        batch = batch.set(all_sum=processes.all_sum)
        if suite.report.separator is not None:
            text = text_of(tokenizer, special=True)
            batch = batch.set(step_id=steps_by_text(batch, text, suite.report.separator))
        value = predict(model, batch, processes, suite.micro_batch_tokens)
        report = make_report(suite, model, batch, value, branches)
        return processes.from_main(lambda: write_report(suite, report, batch, value, tokenizer, work))


def _fingerprint(suite: ValueSuite, rows: Rows | None) -> str:
    """Hash of the prompts, or of the stored rollouts."""
    return hash_of_files(find_rollouts(str(suite.rollouts), suite.base)) if rows is None else rows.fingerprint()


def completions_and_branches(
    suite: ValueSuite,
    policy: sections.PolicySection,
    rows: Rows | None,
    tokenizer: Any,
    processes: Processes,
    work: KeptWork,
) -> tuple[Batch, Branches]:
    """Samples or reads this rank's completions, and samples branches from prefixes of them if the suite asks for any.

    Args:
        rows: prompts to complete; None: the suite's stored rollouts are read.
        work: keeps completions and branches block by block.
    """
    batch = stored_batch(str(suite.rollouts), suite.base, processes) if rows is None else None
    if batch is not None and (largest := int(batch.tokens.max())) >= (size := embedding_rows(policy)):
        raise DataError(
            f"rollouts: they have token ids up to {largest}, and {policy.model!r} has weights for {size} tokens. "
            "Use rollouts of a model with the same vocabulary"
        )
    if batch is not None and not suite.branches.prompts:
        return batch, Branches([], torch.zeros(0, suite.branches.completions))
    longest_prompt = rows.longest_prompt if rows is not None else int(batch.prompt_length.max()) if batch else 0
    with (
        VerifierPool(suite.verify, plain_text=text_of(tokenizer)) as pool,
        closing(_engine(suite, policy, tokenizer, longest_prompt)) as engine,
    ):
        source = CompletionSource(
            engine=engine,
            verifiers=pool,
            rollout=Part.of(single_turn),
            decode=completion_text(policy, tokenizer),
        )
        if rows is not None:
            batch = keep_batches(suite, rows, source, processes, work)
        assert batch is not None
        size = suite.branches
        points = choose_branch_points(batch, prompts=size.prompts, per_prompt=size.prefixes, seed=suite.seed)
        scores = keep_branches(suite, points, source, processes, work)
    return batch, Branches(points, scores)


def stored_batch(path: str, base: Path | None, processes: Processes) -> Batch:
    """Reads this rank's share of stored completions. Groups of different files are different prompts.

    Raises:
        DataError: if there are no rollouts, or none has a score.
    """
    batches, groups = [], 0
    for file in find_rollouts(path, base):
        batch = read_rollouts(file)
        _, group = batch.group.unique(return_inverse=True)
        batches.append(_sampled_fields(batch).set(group=group + groups))
        groups += int(group.max()) + 1 if len(group) else 0
    whole = Batch.concatenate(batches)
    if not torch.isfinite(whole.score).any():
        raise DataError(f"rollouts: no completion in {path} has a score")
    share = torch.tensor(processes.every_nth(groups, "rollouts"))
    return whole[torch.isin(whole.group, share)].trim()


def _sampled_fields(batch: Batch) -> Batch:
    """Drops what the run computed after sampling: files of one run may differ in it."""
    optional = [f.name for f in dataclasses.fields(batch) if f.default is None]
    return batch.set(**dict.fromkeys(optional), step=0)


def _engine(suite: ValueSuite, policy: sections.PolicySection, tokenizer: Any, longest_prompt: int) -> Engine:
    """Builds the policy's engine, with room for the excess of a branch over its own limit (see ``branch_scores``)."""
    most = suite.sampling.max_tokens
    excess = math.ceil(most / BUCKETS) if suite.branches.prompts else 0
    budget = LengthBudget(longest_prompt, most, branches=excess)
    return policy_engine(policy, suite.engine, [budget], tokenizer=tokenizer, seed=suite.seed)


@torch.no_grad()
def predict(model: ValueModel, batch: Batch, processes: Processes, micro_batch_tokens: int) -> Float[Tensor, "N L"]:
    """Returns the model's value at every state, NaN elsewhere; runs micro-batches of completions of similar length.

    A per-token head has values of the states that end with a chosen token, not of the prompt.

    Raises:
        UserError: if a token is not in the model's vocabulary.
    """
    embeddings: Any = model.decoder.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    if len(batch) and int(batch.tokens.max()) >= vocabulary:
        raise UserError(
            f"value.model: has a vocabulary of {vocabulary} tokens, and the completions contain token "
            f"{int(batch.tokens.max())}: it was trained with another tokenizer than the policy's"
        )
    value = torch.zeros_like(batch.logp_sampler)
    for rows in length_groups(batch.length, micro_batch_tokens):
        part = batch[rows].trim().to(processes.device)
        with processes.autocast():
            predicted, _ = model(part.tokens, part.states)
        value[rows, : predicted.shape[1]] = predicted.float().cpu()
    has_value = batch.mask if model.spec.head.type == "per_token" else batch.states
    return value.masked_fill(~has_value, math.nan)


def make_report(
    suite: ValueSuite, model: ValueModel, batch: Batch, value: Float[Tensor, "N L"], branches: Branches
) -> dict[str, Any]:
    """Computes everything that the page shows, as plain data without NaN.

    Raises:
        UserError: if no completion has a score.
    """
    spec, all_sum = model.spec, batch.all_sum
    scores = batch.score[torch.isfinite(batch.score)]
    top = float(metrics.global_quantiles(scores, [1.0], all_sum))
    if math.isnan(top):
        raise UserError("no completion has a score: none of the verifiers applied to any of them")
    scaled = partial(metrics.on_mean_scale, kind=spec.kind, beta=spec.beta or 1.0, top=top)
    predicted, bins = scaled(value.double()), suite.report.bins
    states = metrics.states_of(batch, predicted, scaled(batch.score.double()), torch.isfinite(value))
    calibration = metrics.calibration(states, bins)
    report: dict[str, Any] = {
        "metrics": metrics.summary(states, calibration),
        "unit": "exp((reward - top) / beta)" if spec.kind == "soft" else "reward",
        "notes": [NOTES[spec.kind]] if spec.kind in NOTES else [],
        "calibration": dataclasses.asdict(calibration),
        "by_position": dataclasses.asdict(metrics.by_position(states, bins)),
        "bands": metrics.value_bands(states, bins),
        "by_step": dataclasses.asdict(metrics.by_step(states)),
        "errors": metrics.error_histogram(states),
    }
    if suite.branches.prompts:
        at_points, outcomes = value_at(predicted, branches.points), scaled(branches.scores.double())
        report["metrics"] |= metrics.agreement(at_points, outcomes, all_sum)
        report["branches"] = _points_to_draw(at_points, outcomes)  # the main rank's share of them
    report |= {"date": datetime.date.today().isoformat(), "versions": versions(), "kind": spec.kind}
    report["suite"] = yaml.safe_dump(suite.resolved, sort_keys=False, allow_unicode=True, width=120)
    return without_nan(report)


def _points_to_draw(value: Float[Tensor, " P"], outcomes: Float[Tensor, "P K"]) -> dict[str, Any]:
    """Lists value, mean outcome and its standard error of each prefix that has a value and two outcomes or more."""
    count = torch.isfinite(outcomes).sum(-1)
    usable = (count >= 2) & torch.isfinite(value)
    mean = outcomes[usable].nanmean(-1)
    noise = ((outcomes[usable] - mean[:, None]).square().nansum(-1) / (count[usable] - 1) / count[usable]).sqrt()
    plain = {"value": value[usable].tolist(), "mean": mean.tolist(), "standard_error": noise.tolist()}
    return plain | {"completions": outcomes.shape[1]}


def write_report(
    suite: ValueSuite, report: dict[str, Any], batch: Batch, value: Float[Tensor, "N L"], tokenizer: Any, work: KeptWork
) -> Path:
    """Prints the figures, writes all files of the report, and returns the folder."""
    print_figures(report)
    with writing(suite.folder, "report.folder"):
        page = _write_files(suite, report, batch, value, tokenizer)
    finish(work)
    print(f"report: {page}")
    return suite.folder


def _write_files(
    suite: ValueSuite, report: dict[str, Any], batch: Batch, value: Float[Tensor, "N L"], tokenizer: Any
) -> Path:
    folder = suite.folder
    write_metrics(folder, report)
    for name in PICTURES:  # pictures of an earlier report
        (folder / name).unlink(missing_ok=True)
    pictures = draw_all(report, folder)
    examples = [_example(batch, value, row, tokenizer) for row in choose_examples(batch, suite.report.shown)]
    return write_page(folder, f"Value report: {suite.value.model}", report, pictures, examples)


def choose_examples(batch: Batch, most: int) -> list[int]:
    """Chooses rows to show, highest and lowest outcomes in turn; a prompt comes twice only after every prompt came."""
    scored = [
        row for row, score in enumerate(batch.score.tolist()) if math.isfinite(score) and not batch.baseline_only[row]
    ]
    ranked = sorted(scored, key=lambda row: -float(batch.score[row]))
    in_turn = [row for pair in zip(ranked, reversed(ranked), strict=True) for row in pair]
    first_of_prompt: dict[int, int] = {}
    for row in in_turn:
        first_of_prompt.setdefault(int(batch.group[row]), row)
    order = dict.fromkeys([*first_of_prompt.values(), *in_turn])
    return list(order)[:most]


def _example(batch: Batch, value: Float[Tensor, "N L"], row: int, tokenizer: Any) -> Example:
    tokens, start, end = batch.tokens[row], int(batch.prompt_length[row]), int(batch.length[row])
    decode = text_of(tokenizer, special=True)
    return Example(
        prompt=decode(tokens[:start].tolist()),
        pieces=pieces(tokens[start:end].tolist(), decode),
        start=float(value[row, start - 1]),
        values=value[row, start:end].tolist(),
        outcome=float(batch.score[row]),
        finish=Finish(int(batch.finish[row])).name.lower(),
    )


def print_figures(report: dict[str, Any]) -> None:
    """Prints the metrics as a short table, and the notes."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, number in report["metrics"].items():
        table.add_row(name, figure(number))
    console = Console()
    console.print(table)
    for note in report["notes"]:
        console.print(note)
