"""The page of a search: queries with their nearest neighbors, one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from oml_ray.retrieval.report.page import MAX_BAD_IMAGES, environment, facts, resource


@dataclass(frozen=True)
class SearchItem:
    """A query or a neighbor.

    Attributes:
        title: what names it, such as its id.
        path: where its image lies.
        image: the bytes of a JPEG or PNG file; None: the page shows the path alone.
        problem: why there is no picture although there should be one.
        distance: of a neighbor, to its query.
    """

    title: str
    path: str
    image: bytes | None = None
    problem: str = ""
    distance: float | None = None


@dataclass(frozen=True)
class SearchRow:
    """A query and its neighbors, nearest first."""

    query: SearchItem
    neighbors: Sequence[SearchItem]


@dataclass(frozen=True)
class SearchPage:
    """All that the page shows.

    Attributes:
        title: the heading.
        rows: the first of the queries.
        num_queries: how many queries were searched.
        k: how many neighbors each has.
        num_shown: how many of these a row has at most.
        metrics: what `metrics.json` holds: `counts`, `timings`, `versions`, each optional.
        config: the resolved config, YAML.
        notes: sentences to be read before the rows.
        bad_images: path and reason of each query that could not be read; the page lists the first thousand.
    """

    title: str
    rows: Sequence[SearchRow]
    num_queries: int
    k: int
    num_shown: int
    metrics: Mapping[str, Any]
    config: str
    notes: Sequence[str] = ()
    bad_images: Sequence[tuple[str, str]] = field(default_factory=list)


def render_search(page: SearchPage) -> str:
    """The page as HTML; equal contents give equal pages.

    Args:
        page: what to show; all its texts are escaped.

    Returns:
        The page, with its style and pictures inside.

    Raises:
        ImageError: a picture is neither JPEG nor PNG.

    Example:
        >>> row = SearchRow(SearchItem("query 0", "<b>.png"), [SearchItem("id 7", "c.png", distance=0.5)])
        >>> "&lt;b&gt;.png" in render_search(SearchPage("cats", [row], 1, 1, 1, {}, "k: 1"))
        True
    """
    titles = ("counts", "timings", "versions")
    sections = {title.capitalize(): dict(facts(page.metrics.get(title, {}))) for title in titles}
    return (
        environment()
        .from_string(resource("search.html.j2"))
        .render(
            page=page,
            facts={title: rows for title, rows in sections.items() if rows},
            max_bad_images=MAX_BAD_IMAGES,
            style=Markup(resource("style.css")),
        )
    )
