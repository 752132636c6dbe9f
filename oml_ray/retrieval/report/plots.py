"""The plots of the report, as SVG to be put inside an HTML page.

Text and axes take the colour of the text around them (`currentColor`), so one drawing reads on a light and on a dark
page; the colours of the data are chosen to be told apart on both. Equal input gives equal bytes.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

MAX_POINTS = 500  # of one line: a page must not grow with the length of the training
MAX_BARS = 30
NUM_BINS = 60
COLORS = ("#3b82d6", "#d97706", "#0d9f7b", "#b45ec4", "#7c8794")
INK = "#010203"  # drawn by matplotlib, replaced by `currentColor` in the SVG
WIDTH = 4.4  # inches; small, so that a phone shows the text at nearly its own size

_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
_STYLE: Any = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",
    "svg.hashsalt": "oml_ray",
    "text.parse_math": False,  # a category may be called "$5 - $10"
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


@dataclass(frozen=True)
class Line:
    """One line of `lines`: a name for the legend and equally many x and y; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Bar:
    """One bar of `bars`: a value and, where known, its 95% interval."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Point:
    """One point of `pareto`: a short name beside it, recall of the exact neighbors, queries/s, and whether no other
    point has at least as much of both."""

    name: str
    recall: float
    queries_per_s: float
    is_pareto: bool


def lines(title: str, x_label: str, drawn: Sequence[Line]) -> str:
    """Draws lines over a common axis, such as the loss over steps.

    Args:
        title: above the plot; also what a screen reader says.
        x_label: the unit of x, such as `step`.
        drawn: the lines; of one longer than `MAX_POINTS`, consecutive points are averaged.

    Returns:
        An `<svg>` element.
    """
    with _plot(title, 2.7) as (axes, svg):
        for i, line in enumerate(drawn):
            x, y = _thinned(line)
            marker = "o" if len(x) <= 30 else None
            color = COLORS[i % len(COLORS)]
            axes.plot(x, y, label=_printable(line.name), color=color, marker=marker, markersize=3, linewidth=1.4)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len(drawn) > 1:
            axes.legend(loc="best")
    return svg[0]


def bars(title: str, drawn: Sequence[Bar], overall: float | None = None) -> str:
    """Draws horizontal bars with their intervals, the lowest value on top, at most `MAX_BARS` of them.

    Args:
        title: above the plot; also what a screen reader says.
        drawn: at least one bar.
        overall: a value to compare with, drawn as a dashed line.

    Returns:
        An `<svg>` element.
    """
    shown = sorted(drawn, key=lambda bar: bar.value)[:MAX_BARS]
    values = np.array([bar.value for bar in shown])
    # errors: (2, bars), lengths to the left and to the right of the value; none where no interval is known
    ends = [(bar.value, bar.value) if bar.interval is None else bar.interval for bar in shown]
    errors = np.array([[bar.value - low, high - bar.value] for bar, (low, high) in zip(shown, ends, strict=True)]).T
    with _plot(title, 0.8 + 0.24 * len(shown)) as (axes, svg):
        places = np.arange(len(shown))
        axes.barh(places, values, height=0.66, color=COLORS[0], alpha=0.75)
        axes.errorbar(values, places, xerr=errors.clip(min=0), fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        if overall is not None:
            axes.axvline(overall, color=COLORS[1], linestyle="--", linewidth=1.2)
        axes.set_yticks(places, [_printable(bar.name, width=24) for bar in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        highest = max(high for _, high in ends)
        axes.set_xlim(0, max(highest, 1.0) if highest > 0.1 else None)  # near zero lie rates of errors
        axes.grid(axis="y", visible=False)
    return svg[0]


def histogram(title: str, positive: NDArray[np.float64], negative: NDArray[np.float64]) -> str:
    """Draws how the distances of positive and of negative pairs are spread, each as shares of its own pairs.

    Args:
        title: above the plot; also what a screen reader says.
        positive: distances of pairs of one label, (positive pairs,), float64, finite.
        negative: distances of pairs of two labels, (negative pairs,), likewise; not both are empty.

    Returns:
        An `<svg>` element.
    """
    kinds = [("positive pairs", positive, "-"), ("negative pairs", negative, "--")]
    everything = np.concatenate([distances for _, distances, _ in kinds])
    low, high = float(everything.min()), float(everything.max())
    margin = max(0.0, 1e-6 * max(1.0, abs(low), abs(high)) - (high - low))  # all distances equal: bins need some width
    edges = np.linspace(low - margin / 2, high + margin / 2, NUM_BINS + 1)
    with _plot(title, 2.9) as (axes, svg):
        for (name, distances, dashes), color in zip(kinds, (COLORS[2], COLORS[1]), strict=True):
            if len(distances):
                shares = np.histogram(distances, edges)[0] / len(distances)
                axes.stairs(shares, edges, fill=True, color=color, alpha=0.3)
                axes.stairs(shares, edges, color=color, linestyle=dashes, linewidth=1.4, label=name)
        axes.set_xlabel("distance")
        axes.set_ylabel("share of pairs")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    return svg[0]


def pareto(title: str, drawn: Sequence[Point]) -> str:
    """Draws what each setting finds against how fast it is; a line joins the Pareto-optimal ones.

    Args:
        title: above the plot; also what a screen reader says.
        drawn: at least one setting.

    Returns:
        An `<svg>` element.
    """
    with _plot(title, 2.9) as (axes, svg):
        best = sorted((point for point in drawn if point.is_pareto), key=lambda point: point.recall)
        others = [point for point in drawn if not point.is_pareto]
        axes.plot([p.recall for p in best], [p.queries_per_s for p in best], color=COLORS[0], linewidth=1.2)
        for points, color, marker in ((others, COLORS[4], "x"), (best, COLORS[0], "o")):
            x, y = [p.recall for p in points], [p.queries_per_s for p in points]
            axes.plot(x, y, color=color, marker=marker, markersize=4, linestyle="none")
        for point in drawn:
            place = (point.recall, point.queries_per_s)
            axes.annotate(_printable(point.name, 12), place, (4, 3), textcoords="offset points", fontsize=8)
        axes.set_xlabel("recall of the exact neighbors")
        axes.set_ylabel("queries/s")
        if all(point.queries_per_s > 0 for point in drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(0.12)
    return svg[0]


@contextmanager
def _plot(title: str, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Gives axes to draw on; when the caller is done, the list holds the SVG."""
    svg: list[str] = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The page's reader has the fonts for any script; matplotlib, which only measures the text, may not.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        matplotlib.rcdefaults()  # not what a user's matplotlibrc says
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(_printable(title), loc="left")
        yield axes, svg
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg.append(_for_page(buffer.getvalue(), title))


def _for_page(document: str, title: str) -> str:
    """Makes an element of a page out of an SVG document."""
    element = document[document.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(
        r'<g id="[^"]*"', "<g", element
    )  # figure_1, axes_1: the same in every plot, and referred to by none
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _thinned(line: Line) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The finite points of a line; at most `MAX_POINTS`, each the mean of equally many consecutive ones."""
    points = np.array([line.x, line.y], dtype=np.float64)  # (2, points)
    points = points[:, np.isfinite(points).all(axis=0)]
    if points.shape[1] > MAX_POINTS:
        points = np.stack([part.mean(axis=1) for part in np.array_split(points, MAX_POINTS, axis=1)], axis=1)
    return points[0], points[1]


def _printable(text: str, width: int = 60) -> str:
    """One line of the text that XML can hold, cut to a width."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return line if len(line) <= width else line[: width - 1] + "…"
