"""The figures of a suite in one drawing: a bar from 1 to each ratio, its spread, and the bound of its target."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, NullFormatter

from jobs.benchmarks.figure import Figure

MET, MISSED, FREE = "#0d9f7b", "#d9480f", "#7c8794"
LEAST = 1e-3  # a smaller ratio is drawn as this one, on an axis that has no 0
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "oml_ray", "text.parse_math": False, "font.size": 9}


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Write an SVG.

    Args:
        figures: in the order of their bars; one without a ratio has its reason in the place of the bar.
        path: of the file.
    """
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        drawing = Drawing(figsize=(9, 1.2 + 0.3 * len(figures)), layout="constrained")
        axes = drawing.add_subplot()
        axes.set_xscale("log")
        for place, figure in enumerate(figures):
            _draw(axes, place, figure)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(figures)), [f"{_short(figure.name)} ({figure.unit})" for figure in figures])
        axes.set_ylim(len(figures) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(
            "ours / theirs: median and spread; black marks are targets, green ones are met, red ones missed"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.2)
        drawing.savefig(path, format="svg", metadata={"Date": None})


def _draw(axes: Axes, place: int, figure: Figure) -> None:
    """One row: bar, spread and target."""
    if not figure.ratios:
        axes.text(1, place, f" {figure.reason}", va="center", color=MISSED)
        return
    low, ratio, high = (max(LEAST, of(figure.ratios)) for of in (min, statistics.median, max))
    axes.barh(place, ratio - 1, left=1, height=0.6, color=_color(figure, ratio))
    axes.errorbar(ratio, place, xerr=[[ratio - low], [high - ratio]], color="black", capsize=2, elinewidth=0.8)
    if figure.bound:
        axes.plot([figure.bound[0]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)


def _color(figure: Figure, ratio: float) -> str:
    if figure.bound is None:
        return FREE
    bound, more_is_better = figure.bound
    return MET if (ratio >= bound if more_is_better else ratio <= bound) else MISSED


def _short(name: str) -> str:
    return textwrap.shorten(name, 48, placeholder="…")
