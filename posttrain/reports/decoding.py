"""Measures decoders: reward against KL, against generated tokens and against scorer calls."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from posttrain.data import Rows
from posttrain.decoding.build import check_models
from posttrain.errors import DataError
from posttrain.output.kept_completions import keep_completions, kept_rows
from posttrain.output.kept_work import KeptWork, begin, finish, kept_report, say_finished, saying_what_is_kept
from posttrain.output.progress import TABLE_WIDTH
from posttrain.recipe.sampling import plain_settings
from posttrain.reports.decoding_plots import draw_frontiers
from posttrain.reports.decoding_suite import PLAIN, Comparison, DecodeSuite, Variant, as_yaml
from posttrain.reports.metrics_file import write_metrics
from posttrain.reports.page import document, embedded_picture, html_table
from posttrain.rollout.session import session
from posttrain.system.files import check_output_folder, json_number, writing
from posttrain.system.processes import Processes
from posttrain.system.versions import versions

KlKind = Literal["exact", "bound", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Measurements of a decoder at one strength. Means are over completions, standard errors over prompts."""

    method: str
    knob: str | None
    value: Any
    reward: float
    reward_error: float
    kl: float | None  # KL divergence from plain samples, nats a sequence
    kl_error: float | None
    kl_per_token: float | None  # KL divergence in nats for each token of the completions
    kl_kind: KlKind
    tokens: float  # tokens of a completion
    generated: float  # tokens generated for a completion, discarded ones included
    scored: float  # prefixes scored for a completion
    seconds: float  # seconds for all completions
    completions: int
    unscored: int  # number of completions that no verifier applied to


HEADINGS = {
    "method": "decoder",
    "setting": "setting",
    "reward": "reward",
    "kl": "KL, nats",
    "kl_per_token": "KL a token",
    "tokens": "tokens kept",
    "generated": "generated",
    "scored": "scorer calls",
    "seconds": "seconds",
}
NOTES = (
    "Means over completions, with standard errors over prompts. KL is the divergence from plain samples at the same "
    "sampling settings, in nats a sequence. It is exact (the sum of the divergences of each token's distribution), an "
    "upper bound if marked by ≤, or unknown (-).",
    "Generated tokens and scorer calls are counted for each completion, discarded tokens included.",
)


def measure_decoders(comparison: Comparison, *, resume: bool = False) -> Path:
    """Completes the prompts with every variant on all ranks; the main one writes the report.

    Args:
        resume: go on with the completions that are kept.

    Returns:
        The report's folder: ``metrics.json``, ``table.csv``, pictures and ``index.html``.

    Raises:
        UserError: if models, data or verifiers do not fit together; the message says what to change.
        Stopped: after a signal; the message says what is kept.
    """
    suite, variants = comparison
    check_output_folder(suite.folder, "report.folder")
    work = kept_report(suite.folder, plain_settings(suite, "report"), resume=resume, key="report.folder")
    if work.finished:
        return say_finished(work)
    for variant in variants:
        check_models(variant.decoder)

    def begin_work(processes: Processes, rows: Rows) -> None:
        begin(work, processes, rows.fingerprint())

    with saying_what_is_kept(work), session(suite, begin_work) as on:
        points: list[Point] = []
        decoders = [(f"variant{number}", variant.decoder) for number, variant in enumerate(variants)]
        for name, variant in zip(keep_completions(suite, decoders, on, work), variants, strict=True):
            on.processes.from_main(partial(_add_point, points, suite, variant, name, len(on.rows), work))
        return on.processes.from_main(lambda: write_report(suite, points, work))


def _add_point(points: list[Point], suite: DecodeSuite, variant: Variant, name: str, size: int, work: KeptWork) -> None:
    """Adds the point of a variant whose completions are kept, and prints its reward."""
    rows, seconds = kept_rows(suite, name, size, work)
    groups = [rows[i : i + suite.completions] for i in range(0, len(rows), suite.completions)]
    points.append(to_point(variant, groups, seconds))
    print(f"  {variant.label}: reward {points[-1].reward:.3f}", flush=True)


def to_point(variant: Variant, groups: Sequence[Sequence[Mapping[str, Any]]], seconds: float) -> Point:
    """Averages what was measured of a variant's completions.

    Args:
        groups: the rows of each prompt's completions.
        seconds: seconds that they took.

    Raises:
        DataError: if no completion has a score.
    """
    rows = [row for group in groups for row in group]
    scores = [[row["score"] for row in group if row["score"] is not None] for group in groups]
    reward, reward_error = grouped_mean(scores)
    if math.isnan(reward):
        raise DataError("no completion has a score: none of the verifiers applied to any of them")
    kind, divergences = kl_of(variant, groups)
    kl, kl_error = grouped_mean(divergences)
    tokens = _mean(rows, "tokens")
    return Point(
        method=variant.method,
        knob=variant.knob,
        value=variant.value,
        reward=reward,
        reward_error=reward_error,
        kl=json_number(kl),
        kl_error=json_number(kl_error),
        kl_per_token=json_number(kl / tokens),
        kl_kind=kind,
        tokens=tokens,
        generated=_mean(rows, "generated"),
        scored=_mean(rows, "scored"),
        seconds=seconds,
        completions=len(rows),
        unscored=len(rows) - sum(map(len, scores)),
    )


def kl_of(variant: Variant, groups: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[KlKind, list[list[float]]]:
    """Returns how exactly the KL divergence is known, and a number for each completion whose mean is the divergence.

    The numbers are grouped by prompt; the list is empty if the divergence is unknown.
    """
    if variant.decoder is None:
        return "exact", [[0.0] * len(group) for group in groups]
    kinds: tuple[tuple[KlKind, str], ...] = (("exact", "kl"), ("bound", "kl_bound"))
    for kind, name in kinds:
        if all(row.get(name) is not None for group in groups for row in group):
            return kind, [[row[name] for row in group] for group in groups]
    return "unknown", []


def grouped_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the mean of all numbers and its standard error, NaN if unknown; numbers of a group depend on each other.

    The mean is a ratio of two means over groups, of their sums and of their sizes; its error is linearised.
    """
    filled = [group for group in groups if group]
    size = sum(map(len, filled))
    if not size:
        return math.nan, math.nan
    mean = sum(map(sum, filled)) / size
    if len(filled) == 1:
        return mean, math.nan
    residuals = [sum(group) - mean * len(group) for group in filled]
    variance = len(filled) / (len(filled) - 1) * sum(residual**2 for residual in residuals)
    return mean, math.sqrt(variance) / size


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows) / len(rows)


def write_report(suite: DecodeSuite, points: Sequence[Point], work: KeptWork) -> Path:
    """Prints the table, writes all files of the report, and returns the folder."""
    Console(width=TABLE_WIDTH).print(points_table(points))
    with writing(suite.folder, "report.folder"):
        page = _write_files(suite, points, suite.folder)
    finish(work)
    print(f"report: {page}")
    return suite.folder


def _write_files(suite: DecodeSuite, points: Sequence[Point], folder: Path) -> Path:
    plain = [dataclasses.asdict(point) for point in points]
    settings = yaml.safe_dump(suite.resolved, sort_keys=False, allow_unicode=True, width=120)
    report = {"date": datetime.date.today().isoformat(), "versions": versions(), "points": plain, "suite": settings}
    write_metrics(folder, report)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(plain[0]))
        writer.writeheader()
        writer.writerows(plain)
    pictures = draw_frontiers(plain, folder)
    return write_page(folder, suite, settings, points, pictures)


def cells(point: Point) -> dict[str, str]:
    """Formats a point as the cells of its row in the table."""
    bound = "≤ " if point.kl_kind == "bound" else ""
    return {
        "method": point.method,
        "setting": "" if point.knob is None else f"{point.knob} {as_yaml(point.value)}",
        "reward": with_error(point.reward, point.reward_error),
        "kl": "-" if point.kl is None else bound + with_error(point.kl, point.kl_error),
        "kl_per_token": "-" if point.kl_per_token is None else f"{bound}{point.kl_per_token:.4f}",
        "tokens": f"{point.tokens:.1f}",
        "generated": f"{point.generated:.1f}",
        "scored": f"{point.scored:.1f}",
        "seconds": f"{point.seconds:.1f}",
    }


def with_error(mean: float, error: float | None) -> str:
    """Formats a mean with its standard error, as in ``0.912 ± 0.013``."""
    return f"{mean:.3f}" if error is None or math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def points_table(points: Sequence[Point]) -> Table:
    """Makes the table of all points for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, heading in HEADINGS.items():
        table.add_column(heading, justify="left" if name in ("method", "setting") else "right", no_wrap=True)
    for point in points:
        table.add_row(*cells(point).values())
    return table


def write_page(
    folder: Path, suite: DecodeSuite, settings: str, points: Sequence[Point], pictures: Mapping[str, str]
) -> Path:
    """Writes ``index.html``, with its pictures embedded."""
    size = f"{points[0].completions} completions of each decoder, beside {PLAIN} of {suite.policy.model}"
    body = [
        "<h2>Figures</h2>",
        html_table(list(HEADINGS.values()), [list(cells(point).values()) for point in points], words=2),
        "<h2>Pictures</h2>",
        *(embedded_picture(folder / name, title) for name, title in pictures.items()),
    ]
    path = folder / "index.html"
    title = f"Decoding report: {suite.name}"
    path.write_text(document(title, [size, *NOTES], body, settings), encoding="utf-8")
    return path
