"""The report of a run: one HTML file that needs nothing else, neither a network nor JavaScript."""

import base64
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from oml_ray.errors import ImageError
from oml_ray.redaction import redact
from oml_ray.retrieval.approximation import ComparedSetting
from oml_ray.retrieval.metrics import ALL
from oml_ray.retrieval.report import plots
from oml_ray.retrieval.report.content import Picture, Report, RerankedStage
from oml_ray.storage.atomic_write import write_atomically

MAX_BAD_IMAGES = 1000
_IMAGE_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_CURVE_TITLES = {"lr": "learning rate", "images_per_s": "images/s"}
_NOTHING = "—"


@dataclass(frozen=True)
class _Score:
    """A metric as the page shows it: nothing is known where it is None."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class _MetricRow:
    name: str
    score: _Score
    before: _Score
    change: float | None


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the report to a file, which at every moment is either the old one or the whole new one.

    Args:
        path: the HTML file; missing folders are made.
        report: what to show; credentials inside URIs are hidden.

    Raises:
        ImageError: a picture is neither JPEG nor PNG.
        StorageError: the file cannot be written.
    """
    write_atomically(Path(path), redact(render(report)).encode())


def render(report: Report) -> str:
    """The report as an HTML page; equal reports give equal pages.

    Args:
        report: what to show; all its texts are escaped.

    Returns:
        The page, with its style, script, plots and pictures inside.

    Raises:
        ImageError: a picture is neither JPEG nor PNG.
    """
    overall = dict(_scores(report.metrics.get("overall", {})))
    before = dict(_scores((report.baseline or {}).get("overall", {})))
    categories = {str(name): dict(_scores(node)) for name, node in report.metrics.get("categories", {}).items()}
    pairs = {"positive": _finite(report.positive_distances), "negative": _finite(report.negative_distances)}
    script = resource("page.js")
    template = environment().from_string(resource("page.html.j2"))
    return template.render(
        report=report,
        metrics=[_metric_row(name, score, before.get(name, _Score())) for name, score in overall.items()],
        curves=[Markup(svg) for svg in _curves(report.history)],
        categories=categories,
        category_metrics=list(dict.fromkeys(name for scores in categories.values() for name in scores)),
        category_plots=[Markup(svg) for svg in _category_plots(overall, categories)],
        distances=_distances(pairs),
        pairs=_pairs(pairs),
        comparison_metrics=_metrics_of(report.comparisons),
        reranking_metrics=_metrics_of(report.reranking),
        comparison_plot=_comparison_plot(report.comparisons),
        counts=dict(facts(report.metrics.get("counts", {}))),
        timings=dict(facts(report.metrics.get("timings", {}))),
        versions=dict(facts(report.metrics.get("versions", {}))),
        max_bars=plots.MAX_BARS,
        max_bad_images=MAX_BAD_IMAGES,
        style=Markup(resource("style.css")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "bytes": _bytes,
        "fact": _fact,
        "interval": _interval,
        "metric_name": metric_name,
        "number": _number,
        "signed": lambda value: ("+" if value is not None and value >= 0 else "") + _number(value),
    }
    environment.globals["data_uri"] = _data_uri
    return environment


def resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _data_uri(picture: Picture) -> str:
    assert picture.image is not None
    for magic, kind in _IMAGE_TYPES.items():
        if picture.image.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(picture.image).decode()}"
    raise ImageError(
        f"the picture {picture.title!r} of the report is neither JPEG nor PNG (it starts with {picture.image[:8]!r});"
        " encode it as one of them"
    )


# Metrics


def _scores(node: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, _Score]]:
    """The scores of a tree such as `{"cmc": {"1": {"value": 0.9, "ci95": [0.8, 0.95]}}}`, named like `cmc@1`."""
    for key, value in node.items():
        path = f"{name}.{key}" if name else str(key)
        if not isinstance(value, Mapping):
            yield metric_name(path), _Score(_known(value))
        elif "value" in value:
            low, high = value.get("ci95") or (None, None)
            yield metric_name(path), _Score(_known(value["value"]), _known(low), _known(high))
        else:
            yield from _scores(value, path)


def metric_name(key: str) -> str:
    """`cmc.1` -> `cmc@1`, `pcf.0.5` -> `pcf@0.5`, `map_r.all` -> `map_r`; another key stays as it is."""
    family, _, rank = key.partition(".")
    if rank == ALL:
        return family
    return f"{family}@{rank}" if rank[:1].isdigit() else key


def _metric_row(name: str, score: _Score, before: _Score) -> _MetricRow:
    change = None if score.value is None or before.value is None else score.value - before.value
    return _MetricRow(name, score, before, change)


def _firsts(names: Sequence[str]) -> list[str]:
    """The first metric of each family: `cmc@1` of `cmc@1` and `cmc@5`."""
    return list({name.partition("@")[0]: name for name in reversed(names)}.values())[::-1]


# Plots


def _category_plots(overall: Mapping[str, _Score], categories: Mapping[str, Mapping[str, _Score]]) -> Iterator[str]:
    for name in _firsts(list(overall)):
        bars = []
        for category, scores in categories.items():
            score = scores.get(name, _Score())
            if score.value is not None:
                interval = (score.low, score.high) if score.low is not None and score.high is not None else None
                bars.append(plots.Bar(category, score.value, interval))
        if bars:
            yield plots.bars(name, bars, overall[name].value)


def _curves(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One plot for each kind of row and family of keys, in the order of their first appearance."""
    drawn: dict[tuple[str, str], dict[str, tuple[list[float], list[float]]]] = {}
    for row in history:
        kind = str(row.get("kind", "train"))
        x = _known(row.get("epoch" if kind == "validation" else "step"))
        for key, value in row.items():
            y = _known(value)
            if key not in ("kind", "epoch", "step") and x is not None and y is not None:
                xs, ys = drawn.setdefault((kind, key.partition(".")[0]), {}).setdefault(key, ([], []))
                xs.append(x)
                ys.append(y)
    for (kind, family), of_key in drawn.items():
        lines = [plots.Line(metric_name(key), xs, ys) for key, (xs, ys) in of_key.items()]
        name = _CURVE_TITLES.get(family, lines[0].name if len(lines) == 1 else family)
        title = name if kind == "train" else f"{kind}: {name}"
        yield plots.lines(title, "epoch" if kind == "validation" else "step", lines)


def _metrics_of(settings: Sequence[ComparedSetting | RerankedStage]) -> list[tuple[str, str]]:
    """Metric and k of every column: those that any setting has."""
    keys = [(metric, k) for setting in settings for metric, by_k in setting.metrics.items() for k in by_k]
    return list(dict.fromkeys(keys))


def _comparison_plot(settings: Sequence[ComparedSetting]) -> Markup | None:
    if not settings:
        return None
    points = [
        plots.Point(str(number), setting.ann_recall, setting.queries_per_s, setting.is_pareto)
        for number, setting in enumerate(settings, start=1)
    ]
    return Markup(plots.pareto("recall and speed", points))


def _distances(pairs: Mapping[str, NDArray[np.float64]]) -> Markup | None:
    if not any(map(len, pairs.values())):
        return None
    return Markup(plots.histogram("distances of pairs", pairs["positive"], pairs["negative"]))


def _pairs(pairs: Mapping[str, NDArray[np.float64]]) -> str:
    known = [(name, distances) for name, distances in pairs.items() if len(distances)]
    return "; ".join(
        f"{len(distances):,} {name} pairs, median distance {_number(float(np.median(distances)))}"
        for name, distances in known
    )


def _finite(distances: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = np.asarray(distances, dtype=np.float64).ravel()
    return wide[np.isfinite(wide)]


# Texts


def _known(value: Any) -> float | None:
    """A finite number (as Python's own, whatever numpy type it has), or None."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def _bytes(value: int) -> str:
    """1,536 -> 1.5 KiB."""
    size, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _interval(score: _Score) -> str:
    return _NOTHING if score.low is None or score.high is None else f"[{_number(score.low)}, {_number(score.high)}]"


def facts(node: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree, named by their path."""
    for key, value in node.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping):
            yield from facts(value, path)
        else:
            yield path, value


def _fact(value: Any) -> str:
    number = _known(value)
    if number is None:
        return _NOTHING if value is None else str(value)
    return _number(number)
