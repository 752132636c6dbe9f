"""What a report shows, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oml_ray.retrieval.approximation import ComparedSetting
from oml_ray.retrieval.metrics import Changes


@dataclass(frozen=True)
class Picture:
    """An image of the report.

    Attributes:
        image: the bytes of a JPEG or PNG file; None where it cannot be shown.
        title: what stands under it, such as its label and path.
        distance: of a neighbor or a missed instance, the distance to the query.
        relevant: of a neighbor, whether it is relevant to the query.
        problem: why there is no image.
    """

    image: bytes | None
    title: str
    distance: float | None = None
    relevant: bool | None = None
    problem: str = ""


@dataclass(frozen=True)
class QueryRow:
    """A query, its neighbors (nearest first), the relevant instances that are not among them, and its own scores."""

    query: Picture
    neighbors: list[Picture]
    missed: list[Picture]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RerankedStage:
    """Metrics after the search, or after a re-ranker.

    Attributes:
        name: such as "k_reciprocal k1=30".
        metrics: as `metrics.changes` gives them, against the search.
    """

    name: str
    metrics: Changes


@dataclass(frozen=True, eq=False)
class Report:
    """All that a report shows; what is empty or None is left out of the page.

    Attributes:
        title: the heading.
        metrics: what `metrics.json` holds: `overall`, `categories`, `counts`, `timings`, `versions`, each optional.
        baseline: the same of what to compare with, such as the network before training.
        history: rows of `history.jsonl`: `kind` (`train`, `validation`), `epoch`, `step`, and any numbers to plot;
            a key such as `cmc.1` shares a plot with the other keys of `cmc`.
        positive_distances: distances of pairs of one label, any shape, float.
        negative_distances: distances of pairs of two labels, any shape, float.
        worst: the queries with the lowest scores.
        random: queries chosen at random.
        config: the resolved config, YAML.
        bad_images: path and reason of each image that could not be read; the page lists the first thousand.
        baseline_title: the name of the baseline, the head of its column.
        comparisons: ways of approximate search against exact search, all at one k; the page numbers them from 1.
        reranking: the search, and what each re-ranker made of its neighbors, in their order.
    """

    title: str
    metrics: Mapping[str, Any]
    baseline: Mapping[str, Any] | None
    history: Sequence[Mapping[str, Any]]
    positive_distances: NDArray[np.floating]
    negative_distances: NDArray[np.floating]
    worst: list[QueryRow]
    random: list[QueryRow]
    config: str
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    baseline_title: str = "before training"
    comparisons: Sequence[ComparedSetting] = ()
    reranking: Sequence[RerankedStage] = ()
