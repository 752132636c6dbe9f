"""The page of a sweep: its trials, what was drawn and what came of it, one HTML file that needs nothing else."""

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from oml_ray.retrieval.report import sweep_plots
from oml_ray.retrieval.report.page import environment, facts, metric_name, resource
from oml_ray.retrieval.report.sweep_plots import Drawn, Line


@dataclass(frozen=True)
class SweepTrial:
    """One training of a sweep.

    Attributes:
        name: of its run.
        state: how it ended: finished, stopped or failed.
        values: what it was given, by dotted key.
        value: its best metric; None: it has none.
        epoch: after how many epochs that was.
        epochs: how many epochs it trained.
        seconds: how long it trained and validated.
        curve: epochs and metric of each validation.
        reason: why it failed.
    """

    name: str
    state: str
    values: Mapping[str, Any]
    value: float | None = None
    epoch: int | None = None
    epochs: int = 0
    seconds: float | None = None
    curve: Sequence[tuple[int, float]] = ()
    reason: str = ""


@dataclass(frozen=True)
class SweepPage:
    """All that the page shows.

    Attributes:
        title: the heading.
        metric: as `family.k`.
        larger_is_better: whether the best is the largest.
        entries: dotted keys that were drawn, those drawn together in one entry.
        log_keys: keys whose values lie by their logarithm.
        trials: best first.
        best: name of the best trial; None: every trial failed.
        facts: what is to be known of the best, such as where its checkpoint is.
        links: texts and addresses of what belongs to the best, relative to the page.
        best_config: its config, YAML.
        versions: of what the numbers depend on.
        config: of the sweep, YAML.
    """

    title: str
    metric: str
    larger_is_better: bool
    entries: Sequence[Sequence[str]]
    log_keys: Collection[str]
    trials: Sequence[SweepTrial]
    best: str | None
    facts: Mapping[str, Any]
    links: Mapping[str, str]
    best_config: str
    versions: Mapping[str, str]
    config: str


def render_sweep(page: SweepPage) -> str:
    """The page as HTML; equal contents give equal pages.

    Args:
        page: what to show; all its texts are escaped.

    Returns:
        The page, with its style, script and plots inside.

    Example:
        >>> trial = SweepTrial("0000", "failed", {"criterion.margin": 0.2}, reason="<b>")
        >>> page = SweepPage("m", "cmc.1", True, [["criterion.margin"]], (), [trial], None, {}, {}, "", {}, "")
        >>> "&lt;b&gt;" in render_sweep(page)
        True
    """
    script = resource("page.js")
    templates = environment()
    templates.filters["swept"] = sweep_plots.text
    counts = {state: sum(trial.state == state for trial in page.trials) for state in ("finished", "stopped", "failed")}
    return templates.from_string(resource("sweep.html.j2")).render(
        page=page,
        keys=[key for entry in page.entries for key in entry],
        counts={state: count for state, count in counts.items() if count},
        failed=[trial for trial in page.trials if trial.reason],
        plots=[Markup(svg) for svg in _plots(page)],
        curves=_curves(page),
        facts=dict(facts(page.facts)),
        versions=dict(facts(page.versions)),
        style=Markup(resource("style.css")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _plots(page: SweepPage) -> list[str]:
    """Parallel coordinates, a heat map where two entries were drawn, and the metric over each key."""
    measured = [trial for trial in page.trials if trial.value is not None]
    keys = [key for entry in page.entries for key in entry]
    if not measured:
        return []
    metric, drawn = metric_name(page.metric), [_drawn(trial, page) for trial in measured]
    svgs = []
    if len(keys) > 1:
        svgs.append(sweep_plots.parallel(metric, keys, drawn, page.log_keys))
    if len(page.entries) == 2:
        x, y = map(_joined, page.entries)
        svgs.append(sweep_plots.heat_map(metric, (x, y), drawn, page.log_keys, larger_is_better=page.larger_is_better))
    return svgs + [sweep_plots.scatter(metric, key, drawn, is_log=key in page.log_keys) for key in keys]


def _drawn(trial: SweepTrial, page: SweepPage) -> Drawn:
    """What a plot needs of a trial: its values by key, and by joint entry."""
    assert trial.value is not None
    joint = {_joined(entry): tuple(trial.values[key] for key in entry) for entry in page.entries if len(entry) > 1}
    return Drawn({**trial.values, **joint}, trial.value, trial.name == page.best)


def _joined(entry: Sequence[str]) -> str:
    """`sampler.n_labels`, or `n_labels, n_instances` of keys drawn together."""
    return entry[0] if len(entry) == 1 else ", ".join(key.rpartition(".")[2] for key in entry)


def _curves(page: SweepPage) -> Markup | None:
    lines = [
        Line(trial.name, [epochs for epochs, _ in trial.curve], [value for _, value in trial.curve])
        for trial in page.trials
        if trial.curve
    ]
    if not lines:
        return None
    stopped = [trial.name for trial in page.trials if trial.state == "stopped"]
    return Markup(sweep_plots.curves(metric_name(page.metric), lines, page.best, stopped))
