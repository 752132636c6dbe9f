"""What the report shows of an evaluation: queries with their neighbors, timings, and how it was before training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pyarrow.fs import LocalFileSystem

from oml_ray import build
from oml_ray.config import EvaluateConfig, TrainConfig
from oml_ray.data.filesystem import join, resolve
from oml_ray.data.images import ImageReader
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table, check_files_exist
from oml_ray.distributed import runs
from oml_ray.distributed.progress import say
from oml_ray.distributed.search import Embedded, Found, relevance
from oml_ray.errors import ImageError, StorageError, TableError
from oml_ray.retrieval.metrics import ALL
from oml_ray.retrieval.report import Picture, QueryRow, RerankedStage
from oml_ray.training.run_directory import RunDirectory

THUMBNAIL = 112
MISSED_SHOWN = 3


def _scores(found: Found) -> NDArray[np.float64]:
    """Mean of all metrics of each query, (Q,); NaN without a ground truth."""
    columns = [column for family in found.values.values() for column in family.values()]
    return np.mean(columns, axis=0) if columns else np.zeros(len(found.queries))


def worst_queries(found: Found) -> Ids:
    """Positions of queries from the lowest score up; among equals, the most confident mistake first."""
    scores = _scores(found)
    order = np.lexsort((found.neighbors.distances[:, 0], scores))
    return order[~np.isnan(scores[order])]


def random_queries(found: Found) -> Ids:
    """Positions of all queries in a seeded random order."""
    return np.random.default_rng(0).permutation(len(found.queries))


def query_rows(
    found: Found, embedded: Embedded, config: TrainConfig | EvaluateConfig, positions: Ids
) -> list[QueryRow]:
    """Pictures of the first of `positions`: queries, their neighbors, and what they missed.

    There are none where no table names the images; an image that cannot be read is shown as its reason.
    """
    if not embedded.has_images or config.data is None:
        return []
    pictures = config.evaluation.pictures
    shown = [
        _shown(found, embedded, position, pictures.neighbors) for position in positions[: pictures.queries].tolist()
    ]
    reader = build.image_reader(config.data, embedded.table)
    rows = [row for query in shown for row in (query.row, *query.neighbors, *query.missed)]
    problems = _problems(embedded.table, np.unique(np.array(rows, np.int64)))
    relevant = relevance(found.neighbors, found.queries, embedded.table.labels)

    def picture(row: int, distance: float | None = None, is_relevant: bool | None = None) -> Picture:
        return _picture(reader, row, problems.get(row), distance, is_relevant)

    return [
        QueryRow(
            picture(query.row),
            [
                picture(
                    row, float(found.neighbors.distances[query.position, rank]), bool(relevant[query.position, rank])
                )
                for rank, row in enumerate(query.neighbors)
            ],
            [picture(row) for row in query.missed],
            {
                f"{family}.{k}": float(values[query.position])
                for family, ranks in found.values.items()
                for k, values in ranks.items()
            },
        )
        for query in shown
    ]


@dataclass(frozen=True)
class _Shown:
    """A query of the report by its position, and the row ids of what is shown of it."""

    position: int
    row: int
    neighbors: list[int]
    missed: list[int]


def _shown(found: Found, embedded: Embedded, position: int, num_neighbors: int) -> _Shown:
    table, query = embedded.table, int(found.queries[position])
    count = min(int(found.neighbors.counts[position]), num_neighbors)
    neighbors = found.neighbors.ids[position, :count].tolist()
    same = table.is_gallery & (table.labels == table.labels[query])
    same[query] = False
    if table.sequences[query] >= 0:
        same &= table.sequences != table.sequences[query]
    missed = np.setdiff1d(np.flatnonzero(same), [*neighbors, *found.bad])
    return _Shown(position, query, neighbors, missed[:MISSED_SHOWN].tolist())


def _problems(table: Table, rows: Ids) -> dict[int, str]:
    """Why some rows' local images must not be read: no file, or one that symbolic links put there from elsewhere.

    Where embeddings are evaluated nothing has looked at the files before.
    """
    local = rows[[isinstance(resolve(table.uri(row))[0], LocalFileSystem) for row in rows.tolist()]]
    if _are_files(table, local):
        return {}
    return {row: "not found under data.root" for row in local.tolist() if not _are_files(table, np.array([row]))}


def _are_files(table: Table, rows: Ids) -> bool:
    try:
        check_files_exist(table, rows)
    except (TableError, StorageError):
        return False
    return True


def _picture(
    reader: ImageReader, row: int, problem: str | None, distance: float | None, relevant: bool | None
) -> Picture:
    table, image = reader.table, None
    try:
        image = None if problem else _thumbnail(reader.read(row))
    except (ImageError, StorageError) as error:
        problem = str(error)
    category = int(table.categories[row])
    where = f", {table.category_names[category]}" if category >= 0 else ""
    return Picture(image, f"row {row}, label {table.label_text(row)}{where}", distance, relevant, problem or "")


def _thumbnail(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def baseline(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Metrics before the first step, in the structure of `metrics.json`."""
    row = next((row for row in history if row["kind"] == "validation" and row["epoch"] < 0), None)
    if row is None:
        return None
    overall: dict[str, dict[str, Any]] = {}
    for name, value in row.items():
        family, dot, rank = name.partition(".")
        if dot:
            overall.setdefault(family, {})[rank] = {"value": value}
    return {"overall": overall}


def training_bad_images(history: list[dict[str, Any]]) -> dict[str, str]:
    """Reasons of the images that a training could not read, by their row ids as text."""
    bad = {str(row): "see the training's log" for entry in history for row in entry.get("bad_rows", [])}
    return bad | {row: reason for entry in history for row, reason in entry.get("bad_images", {}).items()}


def training_timings(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Timings of training, summed over the epochs: total seconds, count and mean."""
    totals: dict[str, list[float]] = {}
    for row in history:
        for name, timing in row.get("timings", {}).items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += timing["total_s"]
            total[1] += timing["count"]
    return {
        name: {"total_s": round(total, 3), "count": int(count), "mean_s": round(total / count, 6)}
        for name, (total, count) in totals.items()
    }


def print_reranking(stages: Sequence[RerankedStage]) -> None:
    """Print the first metric of each family after each re-ranker, and how much it has changed since the search."""
    for stage in stages[1:]:
        told = []
        for family, ranks in stage.metrics.items():
            rank, entry = next(iter(ranks.items()))
            if entry["value"] is not None:
                name = family if rank == ALL else f"{family}@{rank}"
                interval = " [{:+.4f}, {:+.4f}]".format(*entry["change_ci95"]) if entry["change_ci95"] else ""
                told.append(f"{name} {entry['value']:.4f} ({entry['change']:+.4f}{interval})")
        say(f"after {stage.name}: {', '.join(told)}")


def print_metrics(metrics: dict[str, Any], before_training: dict[str, Any] | None, run: RunDirectory) -> None:
    """Print the metrics with their intervals, and what they were before training."""
    counts = metrics["counts"]
    say(f"{counts['queries']} queries, {counts['gallery']} gallery items" + (
        f", {counts['bad_images']} bad images left out" if counts["bad_images"] else ""))  # fmt: skip
    for family, ranks in metrics["overall"].items():
        for k, entry in ranks.items():
            if entry["value"] is None:
                say(f"  {family}@{k:<4} no query has a ground truth")
                continue
            before = before_training and before_training["overall"].get(family, {}).get(k)
            name = family if k == ALL else f"{family}@{k}"
            interval = "  [{:.4f}, {:.4f}]".format(*entry["ci95"]) if entry["ci95"] else ""
            was = f"  before training {before['value']:.4f}" if before else ""
            say(f"  {name:<14} {entry['value']:.4f}{interval}{was}")
    say(f"report: {join(run.uri, runs.REPORT)}")
