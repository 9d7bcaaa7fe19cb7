"""Pictures of a value report, drawn from its numbers; they can be read in black and white."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws without a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE: Any = {
    "figure.figsize": (5.2, 4.0),
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
}
DARK, LIGHT = "#1b4f72", "#b9770e"  # two colours of different lightness; marks and dashes differ too


def draw_all(report: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draws every picture that the report has numbers for.

    Args:
        report: numbers of the report, as in ``metrics.json``.
        folder: folder of the PNG files.

    Returns:
        File name -> title of the picture.
    """
    drawn: dict[str, str] = {}
    unit = report["unit"]
    for name, (title, draw) in PICTURES.items():
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots()
            if draw(axes, report, unit):
                axes.set_title(title)
                _save(figure, folder / name)
                drawn[name] = title
            plt.close(figure)
    return drawn


def draw_calibration(axes: Axes, report: Mapping[str, Any], unit: str) -> bool:
    """Draws the reliability curve with 95 % intervals, and the line of a perfect model."""
    curve = report["calibration"]
    value, outcome = curve["value"], curve["outcome"]
    _diagonal(axes, [*value, *outcome])
    axes.errorbar(
        value,
        outcome,
        yerr=[1.96 * _number(error) for error in curve["standard_error"]],
        color=DARK,
        marker="o",
        capsize=3,
        label="mean of a bin, 95 % interval",
    )
    axes.set_xlabel(f"predicted value ({unit})")
    axes.set_ylabel(f"mean outcome ({unit})")
    _legend(axes, f"calibration error {report['metrics']['value/calibration_error']:.3f}")
    return True


def draw_position(axes: Axes, report: Mapping[str, Any], unit: str) -> bool:
    """Draws median and quartiles of the value along the completion, by whether its outcome is above the mean."""
    curve, bands = report["by_position"], report["bands"]
    centre = [50 * (low + high) for low, high in zip(curve["low"], curve["high"], strict=True)]
    looks = {
        "above": ("outcome above the mean", DARK, "-", "o", None),
        "below": ("outcome below the mean", LIGHT, "--", "s", "////"),
    }
    for name, (label, colour, line, mark, hatch) in looks.items():
        low, middle, high = ([_number(triple[i]) for triple in bands[name]] for i in range(3))
        axes.plot(centre, middle, line, color=colour, marker=mark, markersize=4, label=f"{label}: median, quartiles")
        axes.fill_between(centre, low, high, facecolor=colour, edgecolor=colour, hatch=hatch, alpha=0.2, linewidth=0)
    axes.plot(centre, [_number(o) for o in curve["outcome"]], ":", color="black", label="mean outcome of all")
    axes.set_xlim(0, 100)
    axes.set_xlabel("position in the completion (% of its tokens)")
    axes.set_ylabel(f"value ({unit})")
    _legend(axes)
    return True


def draw_steps(axes: Axes, report: Mapping[str, Any], unit: str) -> bool:
    """Draws mean value, outcome and error by reasoning step, if completions have several steps."""
    curve = report["by_step"]
    if len(curve["low"]) <= 2:
        return False
    step = [low + 1 for low in curve["low"]]
    axes.plot(step, [_number(v) for v in curve["value"]], "-o", color=DARK, label="mean value")
    axes.plot(step, [_number(o) for o in curve["outcome"]], "--s", color=LIGHT, label="mean outcome")
    axes.plot(step, [_number(e) for e in curve["rmse"]], ":^", color="black", label="root mean square error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("reasoning step (0: the prompt; the last point holds all later steps)")
    axes.set_ylabel(f"value, outcome, error ({unit})")
    _legend(axes)
    return True


def draw_errors(axes: Axes, report: Mapping[str, Any], unit: str) -> bool:
    """Draws the histogram of value - outcome."""
    edges, count = report["errors"]["edges"], report["errors"]["count"]
    total = max(1.0, sum(count))
    axes.stairs([100 * c / total for c in count], edges, fill=True, facecolor="0.75", edgecolor=DARK)
    bias = report["metrics"]["value/bias"]
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(bias, color=DARK, linestyle="--", label=f"mean {bias:+.3f}")
    axes.set_xlabel(f"predicted value - outcome ({unit})")
    axes.set_ylabel("states (%)")
    _legend(axes)
    return True


def draw_branches(axes: Axes, report: Mapping[str, Any], unit: str) -> bool:
    """Draws the predicted value of each prefix against the mean outcome of its continuations, with standard errors."""
    branches = report.get("branches")
    if not branches or not branches["value"]:
        return False
    value, means = branches["value"], branches["mean"]
    _diagonal(axes, [*value, *means])
    axes.errorbar(
        value,
        means,
        yerr=[_number(error) for error in branches["standard_error"]],
        fmt="o",
        color=DARK,
        ecolor="0.6",
        markersize=4,
        elinewidth=0.8,
        label="a prefix, one standard error",
    )
    correlation = report["metrics"]["branches/correlation"]
    ceiling = report["metrics"]["branches/correlation_ceiling"]
    axes.set_xlabel(f"predicted value ({unit})")
    axes.set_ylabel(f"mean of {branches['completions']} continuations ({unit})")
    _legend(axes, f"correlation {correlation:.2f}, at most {ceiling:.2f} with this many")
    return True


def _legend(axes: Axes, title: str | None = None) -> None:
    """Puts the legend below the axes, where it hides nothing."""
    axes.figure.legend(loc="outside lower center", ncols=2, title=title, title_fontsize=9, fontsize=8)


def _diagonal(axes: Axes, points: Sequence[float | None]) -> None:
    finite = [p for p in map(_number, points) if math.isfinite(p)]
    ends = [min(finite, default=0.0), max(finite, default=1.0)]
    axes.plot(ends, ends, ":", color="black", linewidth=1, label="perfect")


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # the report has None in place of NaN, as JSON needs


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})


PICTURES: dict[str, tuple[str, Callable[[Axes, Mapping[str, Any], str], bool]]] = {
    "calibration.png": ("Outcome against predicted value, in bins of equally many states", draw_calibration),
    "position.png": ("Value along the completion, by how it ended", draw_position),
    "steps.png": ("Value and outcome by reasoning step", draw_steps),
    "errors.png": ("Errors of all states", draw_errors),
    "branches.png": ("Value against Monte-Carlo continuations of the same prefixes", draw_branches),
}
"""File name -> title and function that draws; the function returns False if the report has no numbers for it."""
