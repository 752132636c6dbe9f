"""The plots of a sweep's page: what was drawn and what came of it, as SVG like those of `plots`."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from oml_ray.retrieval.report.plots import COLORS, INK, _plot, _printable, _thinned
from oml_ray.retrieval.report.plots import Line as Line

NUM_BINS = 6
MOST_TICKS = 8
FEW = 5


@dataclass(frozen=True)
class Drawn:
    """One trial: what it was given, by key, and its metric."""

    values: Mapping[str, Any]
    value: float
    is_best: bool = False


@dataclass(frozen=True)
class Scale:
    """Where the values of a key lie on an axis: numbers by size, anything else one beside the other.

    Attributes:
        low: smallest number, or its logarithm.
        high: largest number, or its logarithm.
        is_log: whether numbers lie by their logarithm.
        names: of the values that are no numbers; empty: they are.
        marked: the values themselves, of few integers.
    """

    low: float
    high: float
    is_log: bool
    names: tuple[str, ...] = ()
    marked: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Sequence[Any], *, is_log: bool = False) -> "Scale":
        """The scale of at least one value."""
        if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
            names = tuple(dict.fromkeys(text(value) for value in sorted(values, key=_order)))
            return cls(0.0, max(1.0, len(names) - 1.0), False, names)
        is_log = is_log and min(values) > 0
        ends = [math.log10(value) if is_log else float(value) for value in (min(values), max(values))]
        if ends[0] == ends[1]:
            ends = [ends[0] - 0.5, ends[1] + 0.5]
        distinct = sorted(set(values))
        are_few = len(distinct) <= FEW and all(isinstance(value, Integral) for value in distinct)
        return cls(ends[0], ends[1], is_log, marked=tuple(distinct) if are_few else ())

    def at(self, value: Any) -> float:
        """Place of a value, 0 to 1."""
        number = self.names.index(text(value)) if self.names else (math.log10(value) if self.is_log else value)
        return (number - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of some values."""
        if self.names:
            step = -(-len(self.names) // MOST_TICKS)
            return [(self.at(name), name) for name in self.names[::step]]
        if self.marked:
            return [(self.at(number), str(number)) for number in self.marked]
        places = np.linspace(0, 1, 4)
        numbers = self.low + places * (self.high - self.low)
        return [
            (float(place), f"{10**number if self.is_log else number:.3g}")
            for place, number in zip(places, numbers, strict=True)
        ]

    def bins(self) -> tuple[list[str], int]:
        """Texts of the bins of a heat map, and their number."""
        if self.names:
            return list(self.names), len(self.names)
        edges = self.low + np.linspace(0, 1, NUM_BINS + 1) * (self.high - self.low)
        shown = [f"{10**edge if self.is_log else edge:.2g}" for edge in edges]
        return [f"{low} to {high}" for low, high in itertools.pairwise(shown)], NUM_BINS

    def bin(self, value: Any) -> int:
        """Bin of a value."""
        if self.names:
            return self.names.index(text(value))
        return min(int(self.at(value) * NUM_BINS), NUM_BINS - 1)


def text(value: Any) -> str:
    """A value in few characters.

    Example:
        >>> text((8, 4)), text({"name": "triplet", "margin": 0.25}), text(0.123456)
        ('8, 4', 'name=triplet margin=0.25', '0.1235')
    """
    if isinstance(value, tuple | list):
        return ", ".join(map(text, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key}={text(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parallel(title: str, keys: Sequence[str], drawn: Sequence[Drawn], log_keys: Collection[str] = ()) -> str:
    """Draws an axis for each key and one for the metric, and through them a line for each trial.

    Args:
        title: above the plot; also the name of the metric.
        keys: the axes but the last.
        drawn: at least one trial; the best one is highlighted, the bluer a line the better its trial.
        log_keys: keys whose axes are logarithmic.

    Returns:
        An `<svg>` element.
    """
    columns = [*keys, title]
    rows = [{**trial.values, title: trial.value} for trial in drawn]
    scales = [Scale.of([row[key] for row in rows], is_log=key in log_keys) for key in columns]
    with _plot(f"{title} and what was drawn", 3.2) as (axes, svg):
        values = sorted(trial.value for trial in drawn)
        for trial, row in sorted(zip(drawn, rows, strict=True), key=lambda pair: pair[0].is_best):
            heights = [scale.at(row[key]) for scale, key in zip(scales, columns, strict=True)]
            share = values.index(trial.value) / max(1, len(values) - 1)
            color = COLORS[1] if trial.is_best else _between(COLORS[4], COLORS[0], share)
            axes.plot(range(len(columns)), heights, color=color, linewidth=2.2 if trial.is_best else 1, marker="o",
                      markersize=3)  # fmt: skip
        for place, scale in enumerate(scales):
            axes.axvline(place, color=INK, linewidth=0.8)
            for height, name in scale.ticks():
                axes.annotate(_printable(name, 12), (place, height), (3, 2), textcoords="offset points", fontsize=7)
        axes.set_xticks(range(len(columns)), [_two_lines(key) for key in columns], fontsize=7)
        axes.set_xlim(-0.15, len(columns) - 0.6)
        axes.set_ylim(-0.06, 1.1)
        _bare(axes)
    return svg[0]


def heat_map(title: str, keys: tuple[str, str], drawn: Sequence[Drawn], log_keys: Collection[str] = (),
             *, larger_is_better: bool = True) -> str:  # fmt: skip
    """Draws the best metric over two keys, ranges cut into bins.

    Args:
        title: the name of the metric.
        keys: across and up.
        drawn: at least one trial; of several in a cell the best counts, and their number is shown.
        log_keys: keys whose bins are logarithmic.
        larger_is_better: whether the best is the largest.

    Returns:
        An `<svg>` element.
    """
    scales = [Scale.of([trial.values[key] for trial in drawn], is_log=key in log_keys) for key in keys]
    cells: dict[tuple[int, int], list[float]] = {}
    for trial in drawn:
        place = scales[0].bin(trial.values[keys[0]]), scales[1].bin(trial.values[keys[1]])
        cells.setdefault(place, []).append(trial.value)
    best = {place: max(values) if larger_is_better else min(values) for place, values in cells.items()}
    low, high = min(best.values()), max(best.values())
    (names, across), (heights, up) = scales[0].bins(), scales[1].bins()
    with _plot(f"best {title}", 1.1 + 0.36 * up) as (axes, svg):
        for (x, y), value in best.items():
            share = 1.0 if high == low else (value - low) / (high - low)
            color = to_rgb(COLORS[0])
            alpha = 0.12 + 0.6 * (share if larger_is_better else 1 - share)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=alpha, linewidth=0))
            count = len(cells[x, y])
            axes.text(x, y, f"{value:.3f}" + (f"\n{count} trials" if count > 1 else ""), ha="center", va="center",
                      fontsize=7)  # fmt: skip
        axes.set_xticks(range(across), [_printable(name, 14) for name in names], fontsize=7, rotation=30, ha="right")
        axes.set_yticks(range(up), [_printable(name, 14) for name in heights], fontsize=7)
        axes.set_xlim(-0.5, across - 0.5)
        axes.set_ylim(-0.5, up - 0.5)
        axes.set_xlabel(_printable(keys[0]))
        axes.set_ylabel(_printable(keys[1], 30))
        axes.grid(visible=False)
    return svg[0]


def scatter(title: str, key: str, drawn: Sequence[Drawn], *, is_log: bool = False) -> str:
    """Draws the metric over one key.

    Args:
        title: the name of the metric.
        key: across.
        drawn: at least one trial; the best one is highlighted.
        is_log: whether the axis is logarithmic.

    Returns:
        An `<svg>` element.
    """
    scale = Scale.of([trial.values[key] for trial in drawn], is_log=is_log)
    with _plot(f"{title} over {key}", 2.4) as (axes, svg):
        for trial in drawn:
            color = COLORS[1] if trial.is_best else COLORS[0]
            axes.plot([scale.at(trial.values[key])], [trial.value], color=color, marker="o", markersize=4)
        ticks = scale.ticks()
        axes.set_xticks([place for place, _ in ticks], [_printable(name, 12) for _, name in ticks])
        axes.set_xlim(-0.08, 1.08)
    return svg[0]


def curves(title: str, drawn: Sequence[Line], best: str | None, stopped: Collection[str] = ()) -> str:
    """Draws the learning curve of every trial.

    Args:
        title: the name of the metric.
        drawn: a line for each trial that has one, by epochs.
        best: name of the highlighted one.
        stopped: names of those that were stopped early: they end in a cross.

    Returns:
        An `<svg>` element.
    """
    with _plot(f"{title} over epochs", 3.2) as (axes, svg):
        for line in sorted(drawn, key=lambda line: line.name == best):
            x, y = _thinned(line)
            is_best = line.name == best
            color = COLORS[1] if is_best else COLORS[0]
            axes.plot(x, y, color=color, alpha=1 if is_best else 0.55, linewidth=2 if is_best else 1, marker=".",
                      markersize=4, label=f"trial {line.name}, the best" if is_best else None)  # fmt: skip
            if line.name in stopped and len(x):
                axes.plot(x[-1:], y[-1:], color=color, marker="x", markersize=6)
            if not is_best and len(x) and len(drawn) <= MOST_TICKS:
                axes.annotate(_printable(line.name, 8), (x[-1], y[-1]), (3, 0), textcoords="offset points", fontsize=7)
        axes.set_xlabel("epochs")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.margins(x=0.08)
        if any(line.name == best for line in drawn):
            axes.legend(loc="lower right")
    return svg[0]


def _bare(axes: Axes) -> None:
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _two_lines(key: str) -> str:
    node, dot, last = key.rpartition(".")
    return f"{_printable(node, 16)}{dot}\n{_printable(last, 16)}" if dot else _printable(key, 16)


def _between(one: str, other: str, share: float) -> tuple[float, float, float]:
    a, b = np.array(to_rgb(one)), np.array(to_rgb(other))
    red, green, blue = (a + share * (b - a)).tolist()
    return red, green, blue


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers (and tuples of them) by size, before texts."""
    parts = value if isinstance(value, tuple | list) else (value,)
    is_numbers = all(isinstance(part, Real) for part in parts)
    return (not is_numbers, tuple(parts) if is_numbers else text(value))
