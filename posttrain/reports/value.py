"""The evaluation of a value model: completions, values, figures, pictures, page."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Batch, Finish
from posttrain.data import Rows, check_columns, load_rows
from posttrain.data.rollout_files import read_rollouts
from posttrain.data.steps import Decode, pieces, steps_by_text
from posttrain.engines.base import Engine, Sampling
from posttrain.engines.for_policy import LengthBudget, policy_engine
from posttrain.errors import DataError, UserError
from posttrain.micro_batches import length_groups
from posttrain.models.load import load_tokenizer
from posttrain.models.value import ValueModel
from posttrain.models.value_files import load_value
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.reports.page import Example, figure, write_page
from posttrain.reports.value_plots import PICTURES, draw_all
from posttrain.reports.value_suite import ValueSuite
from posttrain.rollout.branches import BUCKETS, BranchPoint, branch_scores, choose_branch_points, value_at
from posttrain.rollout.collect import CompletionSource, complete_all
from posttrain.rollout.rollouts import single_turn
from posttrain.system.processes import Processes
from posttrain.system.versions import versions
from posttrain.training import value_metrics as values
from posttrain.verify import VerifierPool

OF_SAMPLED = {
    "max": "This model's values are of the best continuation, outcomes are of sampled ones: expect them to lie below.",
    "greedy": "This model's values are of the greedy continuation, outcomes are of sampled ones: they need not agree.",
    "soft": "This model's values are soft, beta log E exp(r / beta): values and outcomes are compared as "
    "exp((r - top) / beta), on which scale a soft value is a mean; top is the highest outcome.",
}


def evaluate_value(suite: ValueSuite) -> Path:
    """Runs a suite on all ranks; the main one writes ``metrics.json``, the pictures and ``index.html``.

    Returns:
        The report's folder.

    Raises:
        UserError: for what a person can mend.
    """
    policy = suite.policy or sections.PolicySection(model=suite.value.model)
    tokenizer = load_tokenizer(policy)
    rows = _rows(suite, tokenizer)
    with Processes(dtype=policy.dtype) as processes:
        model = load_value(suite.value.model, place="value.model").eval().requires_grad_(False).to(processes.device)
        batch = None if rows is not None else stored_batch(suite, processes)
        prefixes, scores = [], torch.zeros(0, suite.branches.completions)
        if batch is None or suite.branches.prompts:
            batch, prefixes, scores = sample(suite, rows, batch, tokenizer, processes)
        batch = batch.set(all_sum=processes.all_sum)
        if suite.report.separator is not None:
            batch = batch.set(step_id=steps_by_text(batch, decoder(tokenizer), suite.report.separator))
        value = predict(model, batch, processes, suite.micro_batch_tokens)
        report = make_report(suite, model, batch, value, prefixes, scores)
        return processes.from_main(lambda: write_report(suite, report, batch, value, tokenizer))


def decoder(tokenizer: Any, *, special: bool = True) -> Decode:
    """Token ids to text, with or without special tokens."""
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=not special))


def _rows(suite: ValueSuite, tokenizer: PreTrainedTokenizerBase) -> Rows | None:
    if suite.data is None:
        return None
    rows = load_rows(suite.data, tokenizer=tokenizer, base=suite.base)
    check_columns(rows, suite.verify)
    return rows


def stored_batch(suite: ValueSuite, processes: Processes) -> Batch:
    """This rank's share of the stored completions, a group of each file being a prompt of its own.

    Raises:
        DataError: where there are none, or none has a score.
    """
    assert suite.rollouts is not None
    place = Path(suite.rollouts).expanduser()
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"rollouts: there is no Parquet file in {place}")
    batches, groups = [], 0
    for file in files:
        batch = read_rollouts(file)
        _, group = batch.group.unique(return_inverse=True)
        batches.append(_sampled_fields(batch).set(group=group + groups))
        groups += int(group.max()) + 1 if len(group) else 0
    whole = Batch.concatenate(batches)
    if not torch.isfinite(whole.score).any():
        raise DataError(f"rollouts: no completion in {place} has a score")
    mine = torch.tensor(processes.every_nth(groups, "rollouts"))
    return whole[torch.isin(whole.group, mine)].trim()


def _sampled_fields(batch: Batch) -> Batch:
    """Without what the run filled in beside the rollout: files of one run may differ in it."""
    optional = [f.name for f in dataclasses.fields(batch) if f.default is None]
    return batch.set(**dict.fromkeys(optional), step=0)


def sample(
    suite: ValueSuite, rows: Rows | None, batch: Batch | None, tokenizer: Any, processes: Processes
) -> tuple[Batch, list[BranchPoint], Float[Tensor, "P K"]]:
    """Completions of this rank's prompts, unless ``batch`` holds some, and scores of continuations."""
    longest = 0 if rows is None else rows.longest_prompt
    longest = longest if batch is None else int(batch.mask.int().argmax(-1).max())
    sampling, few = Sampling.of(suite.sampling), suite.branches
    with VerifierPool(suite.verify) as pool, closing(_engine(suite, longest)) as engine:
        source = CompletionSource(
            engine=engine,
            verifiers=pool,
            rollout=Part.of(single_turn),
            decode=decoder(tokenizer, special=False),
        )
        if batch is None:
            assert rows is not None
            batch = complete_all(suite, rows, source, processes)
        prefixes = choose_branch_points(batch, prompts=few.prompts, per_prompt=few.prefixes, seed=suite.seed)
        scores = processes.together(partial(branch_scores, source, prefixes, few.completions, sampling))
    return batch, prefixes, scores


def _engine(suite: ValueSuite, longest_prompt: int) -> Engine:
    assert suite.policy is not None
    most = suite.sampling.max_tokens
    budget = LengthBudget(longest_prompt, most, branches=math.ceil(most / BUCKETS) if suite.branches.prompts else 0)
    return policy_engine(suite.policy, suite.engine, [budget], seed=suite.seed)


@torch.no_grad()
def predict(model: ValueModel, batch: Batch, processes: Processes, micro_batch_tokens: int) -> Float[Tensor, "N L"]:
    """The model's value at every state, NaN elsewhere, in micro-batches of completions of like length.

    A per-token head knows the states that end with a chosen token, not the prompt.

    Raises:
        UserError: where a token is not in the model's vocabulary.
    """
    embeddings: Any = model.decoder.get_input_embeddings()
    known = embeddings.weight.shape[0]
    if len(batch) and int(batch.tokens.max()) >= known:
        raise UserError(
            f"value.model: knows {known} tokens, and the completions hold token {int(batch.tokens.max())}: it was made "
            "for another tokenizer than the policy's"
        )
    value = torch.zeros_like(batch.logp_sampler)
    for rows in length_groups(batch.length, micro_batch_tokens):
        part = batch[rows].trim().to(processes.device)
        with processes.autocast():
            its, _ = model(part.tokens, part.states)
        value[rows, : its.shape[1]] = its.float().cpu()
    known_at = batch.mask if model.spec.head.type == "per_token" else batch.states
    return value.masked_fill(~known_at, math.nan)


def make_report(
    suite: ValueSuite,
    model: ValueModel,
    batch: Batch,
    value: Float[Tensor, "N L"],
    prefixes: Sequence[BranchPoint],
    scores: Float[Tensor, "P K"],
) -> dict[str, Any]:
    """Everything that the page shows, as plain data without NaN."""
    spec, share = model.spec, batch.all_sum
    known = batch.score[torch.isfinite(batch.score)]
    top = float(values.global_quantiles(known, [1.0], share))
    if math.isnan(top):
        raise UserError("no completion has a score: none of the verifiers applied to any of them")
    scaled = partial(values.on_mean_scale, kind=spec.kind, beta=spec.beta or 1.0, top=top)
    predicted, bins = scaled(value.double()), suite.report.bins
    states = values.states_of(batch, predicted, scaled(batch.score.double()), torch.isfinite(value))
    calibration = values.calibration(states, bins)
    report: dict[str, Any] = {
        "metrics": values.summary(states, calibration),
        "unit": "exp((reward - top) / beta)" if spec.kind == "soft" else "reward",
        "notes": [OF_SAMPLED[spec.kind]] if spec.kind in OF_SAMPLED else [],
        "calibration": dataclasses.asdict(calibration),
        "by_position": dataclasses.asdict(values.by_position(states, bins)),
        "bands": values.value_bands(states, bins),
        "by_step": dataclasses.asdict(values.by_step(states)),
        "errors": values.error_histogram(states),
    }
    if suite.branches.prompts:
        of_prefix, outcomes = value_at(predicted, prefixes), scaled(scores.double())
        report["metrics"] |= values.agreement(of_prefix, outcomes, share)
        report["branches"] = _points(of_prefix, outcomes)  # the main rank's, to draw
    report |= {"date": datetime.date.today().isoformat(), "versions": versions(), "kind": spec.kind}
    report["suite"] = yaml.safe_dump(suite.resolved, sort_keys=False, allow_unicode=True, width=120)
    return _without_nan(report)


def _points(value: Float[Tensor, " P"], outcomes: Float[Tensor, "P K"]) -> dict[str, Any]:
    count = torch.isfinite(outcomes).sum(-1)
    kept = (count >= 2) & torch.isfinite(value)
    mean = outcomes[kept].nanmean(-1)
    noise = ((outcomes[kept] - mean[:, None]).square().nansum(-1) / (count[kept] - 1) / count[kept]).sqrt()
    plain = {"value": value[kept].tolist(), "mean": mean.tolist(), "standard_error": noise.tolist()}
    return plain | {"completions": outcomes.shape[1]}


def _without_nan(data: Any) -> Any:
    """None for numbers that JSON has no word for."""
    if isinstance(data, dict):
        return {name: _without_nan(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_report(
    suite: ValueSuite, report: dict[str, Any], batch: Batch, value: Float[Tensor, "N L"], tokenizer: Any
) -> Path:
    """The report's folder with all in it; prints the figures."""
    folder = suite.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in PICTURES:  # of the report that was there
        (folder / name).unlink(missing_ok=True)
    pictures = draw_all(report, folder)
    examples = [_example(batch, value, row, tokenizer) for row in choose_examples(batch, suite.report.shown)]
    page = write_page(folder, f"Value report: {suite.value.model}", report, pictures, examples)
    print_figures(report, page)
    return folder


def choose_examples(batch: Batch, most: int) -> list[int]:
    """Rows to show: of different prompts as far as there are, the highest and the lowest outcomes in turn."""
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
    mask, tokens = batch.mask[row], batch.tokens[row]
    start, end = int(mask.int().argmax()), int(batch.length[row])
    return Example(
        prompt=tokenizer.decode(tokens[:start].tolist()),
        pieces=pieces(tokens[start:end].tolist(), decoder(tokenizer)),
        start=float(value[row, start - 1]),
        values=value[row, start:end].tolist(),
        outcome=float(batch.score[row]),
        finish=Finish(int(batch.finish[row])).name.lower(),
    )


def print_figures(report: dict[str, Any], page: Path) -> None:
    """A short table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, number in report["metrics"].items():
        table.add_row(name, figure(number))
    console = Console()
    console.print(table)
    for note in report["notes"]:
        console.print(note)
    console.print(f"report: {page}", soft_wrap=True)
