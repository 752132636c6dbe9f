"""The page of the data set doctor: what is wrong with a table, in pictures; one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from oml_ray.retrieval.report.page import MAX_BAD_IMAGES, environment, resource
from oml_ray.retrieval.report.plots import COLORS, NUM_BINS, _plot
from oml_ray.retrieval.report.search_page import SearchItem

MAX_LABELS = 1000


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Attributes:
        title: the heading, such as "Near copies in both splits".
        meaning: what it is, and why it matters; told where there are groups.
        num_rows: rows concerned.
        num_groups: how many groups of pictures there are to show.
        groups: the first of them, each of instances that belong together; the most suspicious first.
    """

    title: str
    meaning: str
    num_rows: int
    num_groups: int = 0
    groups: Sequence[Sequence[SearchItem]] = ()


@dataclass(frozen=True, eq=False)
class Measure:
    """How one number of the images is spread.

    Attributes:
        name: such as "width".
        values: (n,) float, at least one, finite.
        quantiles: of them, as the page's heads of columns say.
    """

    name: str
    values: NDArray[np.float64]
    quantiles: Sequence[float]


@dataclass(frozen=True, eq=False)
class DoctorPage:
    """All that the page shows.

    Attributes:
        title: the heading.
        table: lines that describe the table.
        findings: every kind of fault that was looked for; those without rows are only counted.
        notes: sentences on what could not be looked for.
        bad_images: path and reason of images that cannot be read; the page lists the first thousand.
        num_bad_images: how many there are.
        labels: labels that are in both splits, and their rows in train and in validation; the page lists the first
            thousand.
        measures: of images and boxes.
        quantiles: which ones the measures have, 0 to 1.
        versions: of what made the page.
        config: the resolved config, YAML.
    """

    title: str
    table: Sequence[str]
    findings: Sequence[Finding]
    notes: Sequence[str] = ()
    bad_images: Sequence[tuple[str, str]] = ()
    num_bad_images: int = 0
    labels: Sequence[tuple[int, int, int]] = ()
    measures: Sequence[Measure] = ()
    quantiles: Sequence[float] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    config: str = ""


def render_doctor(page: DoctorPage) -> str:
    """The page as HTML; equal contents give equal pages.

    Args:
        page: what to show; all its texts are escaped.

    Returns:
        The page, with its style, plots and pictures inside.

    Raises:
        ImageError: a picture is neither JPEG nor PNG.

    Example:
        >>> pair = [SearchItem("row 0", "<b>.png"), SearchItem("row 7", "c.png")]
        >>> copies = Finding("copies", "in both splits", 2, 1, [pair])
        >>> "&lt;b&gt;.png" in render_doctor(DoctorPage("cats", [], [copies]))
        True
    """
    return (
        environment()
        .from_string(resource("doctor.html.j2"))
        .render(
            page=page,
            plots=[Markup(_histogram(measure)) for measure in page.measures],
            max_bad_images=MAX_BAD_IMAGES,
            max_labels=MAX_LABELS,
            style=Markup(resource("style.css")),
        )
    )


def _histogram(measure: Measure) -> str:
    with _plot(measure.name, 2.2) as (axes, svg):
        counts, edges = np.histogram(measure.values, NUM_BINS)
        axes.stairs(counts, edges, fill=True, color=COLORS[0], alpha=0.75)
        axes.set_ylabel("rows")
        axes.set_ylim(bottom=0)
    return svg[0]
