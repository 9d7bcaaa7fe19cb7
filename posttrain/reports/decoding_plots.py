"""Pictures of a decoding report: reward against its cost, a line for each decoder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from posttrain.reports.value_plots import STYLE

COLOURS = ("#1b4f72", "#b9770e", "#7b241c", "#117864", "#6c3483", "#5d6d7e")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


class Picture(NamedTuple):
    """The horizontal axis of a picture, and its title."""

    field: str
    title: str
    label: str
    logarithmic: bool


PICTURES = {
    "reward_kl.png": Picture("kl", "Reward against divergence from the policy", "KL, nats a sequence", False),
    "reward_tokens.png": Picture(
        "generated", "Reward against generated tokens", "tokens generated for a completion", True
    ),
    "reward_calls.png": Picture("scored", "Reward against scorer calls", "prefixes scored for a completion", True),
}


def draw_frontiers(points: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """Draws reward against KL, generated tokens and scorer calls; a picture needs two points or more.

    Args:
        points: points of the report as plain data, plain samples first.
        folder: folder of the PNG files; those of an earlier report are replaced or removed.

    Returns:
        File name -> title of the picture.
    """
    drawn: dict[str, str] = {}
    for name, picture in PICTURES.items():
        (folder / name).unlink(missing_ok=True)
        shown = [p for p in points if p[picture.field] is not None and (p[picture.field] > 0 or picture.field == "kl")]
        if len(shown) < 2:
            continue
        with plt.rc_context({**STYLE, "figure.figsize": (5.6, 4.6)}):
            figure, axes = plt.subplots()
            draw_frontier(axes, points, shown, picture)
            figure.savefig(folder / name, metadata={"Software": None})
            plt.close(figure)
        drawn[name] = picture.title
    return drawn


def draw_frontier(
    axes: Axes, points: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]], picture: Picture
) -> None:
    """Draws a line for each decoder, with 95 % intervals; hollow marks are upper bounds of a KL divergence."""
    looks = itertools.cycle(zip(itertools.cycle(MARKS), itertools.cycle(COLOURS)))
    for method in dict.fromkeys(point["method"] for point in points):
        mark, colour = next(looks)
        line = sorted((p for p in shown if p["method"] == method), key=lambda p: p[picture.field])
        if not line:
            continue
        bound = picture.field == "kl" and line[0]["kl_kind"] == "bound"
        axes.errorbar(
            [p[picture.field] for p in line],
            [p["reward"] for p in line],
            yerr=[1.96 * (p["reward_error"] or 0.0) for p in line],
            color=colour,
            marker=mark,
            markersize=5,
            markerfacecolor="white" if bound else colour,
            linestyle="--" if bound else "-",
            linewidth=1,
            elinewidth=0.7,
            capsize=2,
            label=f"{method} (KL at most)" if bound else method,
        )
    if picture.logarithmic:
        axes.set_xscale("log")
    axes.set_title(picture.title)
    axes.set_xlabel(picture.label)
    axes.set_ylabel("reward, 95 % interval")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)
