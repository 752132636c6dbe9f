"""Evaluation: embed, search the gallery shards, measure, and report."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray import build
from oml_ray.config import EvaluateConfig, TrainConfig, dump, nodes
from oml_ray.data.images import ImageReader
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.distances import exact_paired
from oml_ray.distributed import embed, gallery, runs
from oml_ray.distributed.gallery import GalleryPool, rows_of
from oml_ray.distributed.progress import counting, say
from oml_ray.distributed.session import Needs, check_given, session, unwrapped
from oml_ray.errors import ConfigError, EmbeddingError, ImageError
from oml_ray.learning.extractors import Extractor
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.metrics import per_query, summarise
from oml_ray.retrieval.neighbors import Neighbors, concatenate
from oml_ray.retrieval.report import Picture, QueryRow, Report, write_report
from oml_ray.retrieval.store import Embeddings, Manifest, Store
from oml_ray.training.run_directory import History, RunDirectory

PAIRS_SAMPLED = 5000
THUMBNAIL = 112
MISSED_SHOWN = 3


def needs(evaluation: nodes.Evaluation, scaling: nodes.Scaling) -> Needs:
    """Logical resources of an evaluation: embedding, then searching."""
    return embed.needs(evaluation.embed, scaling) | gallery.needs(evaluation.gallery, scaling)


def check(table: Table) -> None:
    """Refuse a table that has nothing to evaluate.

    Raises:
        ConfigError: no queries or no gallery.
    """
    if not len(table.query_ids) or not len(table.gallery_ids):
        raise ConfigError(
            f"{table.source} has {len(table.query_ids)} queries and {len(table.gallery_ids)} gallery rows: "
            "an evaluation needs both (columns is_query and is_gallery on validation rows)."
        )


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate a table from a checkpoint or an extractor, and write metrics and report into the run.

    Raises:
        OmlRayError: the user's error, wherever it came up.
    """
    config, table, extractor, transform = _prepare(config)
    run = runs.open_run(config)
    if run.read_text(runs.METRICS) is not None:
        say(f"{run.uri} is finished; its report is {run.path(runs.REPORT)} (run.resume: never starts it afresh).")
        return
    with session(needs(config.evaluation, config.scaling)), unwrapped():
        measure(run, config, table, extractor, transform, History(run).rows)


def dry_run(config: EvaluateConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config."""
    config, *_ = _prepare(config)
    check_given(needs(config.evaluation, config.scaling))
    say(dump(config))


def _prepare(config: EvaluateConfig) -> tuple[EvaluateConfig, Table, Extractor, nodes.Resize]:
    config, table, _, extractor, transform = embed.prepare(config)
    check(table)
    return config, table, extractor, transform


def measure(
    run: RunDirectory,
    config: TrainConfig | EvaluateConfig,
    table: Table,
    extractor: Extractor,
    transform: nodes.Resize,
    history: list[dict[str, Any]],
) -> None:
    """Embed, search, measure and report, in a session that is there."""
    evaluation, timings, start = config.evaluation, {}, time.perf_counter()
    split = config.data.split if isinstance(config.data, nodes.SplitData) else "validation"
    rows = embed.rows_of(table, split)
    store, manifest = embed.fill_store(
        run, config.data, table, rows, split, extractor, transform, evaluation.embed, config.scaling
    )
    timings["evaluate/embed"] = time.perf_counter() - start
    start = time.perf_counter()
    found = search(store, manifest, table, evaluation, use_gpu=config.scaling.use_gpu)
    timings["evaluate/search"] = time.perf_counter() - start
    start = time.perf_counter()
    names = table.category_names
    metrics = summarise(
        found.values,
        table.categories[found.queries].astype(np.int64),
        names,
        samples=evaluation.metrics.bootstrap.samples,
        seed=evaluation.metrics.bootstrap.seed,
    )
    timings["evaluate/metrics"] = time.perf_counter() - start
    bad = {row: reason for entry in history for row, reason in entry.get("bad_images", {}).items()}
    bad |= {str(row): reason for row, reason in found.bad.items()}
    document = {
        **metrics,
        "counts": {
            "queries": len(found.queries),
            "gallery": found.num_gallery,
            "without_ground_truth": int((found.num_relevant == 0).sum()),
            "bad_images": len(bad),
        },
        "timings": {**_training_timings(history), **{name: round(value, 3) for name, value in timings.items()}},
        "versions": build.versions(),
    }
    report = Report(
        title=run.name,
        metrics=document,
        baseline=_baseline(history),
        history=history,
        positive_distances=found.positive,
        negative_distances=found.negative,
        worst=_query_rows(found, table, config, _worst(found)),
        random=_query_rows(found, table, config, _random(found)),
        config=dump(config),
        bad_images=[(table.uri(int(row)), reason) for row, reason in bad.items()],
    )
    write_report(run.path(runs.REPORT), report)
    run.publish(runs.REPORT)
    # Last: its presence says that the run is finished.
    run.write_text(json.dumps(document, indent=1), runs.METRICS)
    _print(document, _baseline(history), run)


@dataclass(frozen=True)
class Found:
    """What a search found, as arrays over the queries; nothing here grows with the gallery."""

    queries: Ids
    neighbors: Neighbors
    num_gallery: int
    num_relevant: Ids
    """Relevant gallery items of each query after exclusion."""
    values: dict[str, dict[str, NDArray[np.float64]]]
    """Per-query metrics."""
    positive: NDArray[np.float32]
    """Distances of some pairs of one label."""
    negative: NDArray[np.float32]
    """Distances of some pairs of different labels."""
    bad: dict[int, str]


def search(store: Store, manifest: Manifest, table: Table, evaluation: nodes.Evaluation, *, use_gpu: bool) -> Found:
    """Search the neighbors of all queries of a store and compute the per-query metrics.

    Raises:
        EmbeddingError: no query or no gallery item is left.
    """
    bad = store.bad_images(manifest)
    lost = np.fromiter(bad, np.int64, len(bad))
    queries, gallery_ids = np.setdiff1d(table.query_ids, lost), np.setdiff1d(table.gallery_ids, lost)
    if not len(queries) or not len(gallery_ids):
        raise EmbeddingError(
            f"{len(queries)} queries and {len(gallery_ids)} gallery items are left after leaving out {len(bad)} bad "
            "images: nothing can be evaluated."
        )
    labels, sequences = table.labels, table.sequences
    k = max(evaluation.metrics.largest_rank, evaluation.pictures.neighbors)
    sampled = _sample_pairs(queries, gallery_ids, table)
    kept: list[tuple[Ids, Embeddings]] = []
    pool = GalleryPool(store, manifest, gallery_ids, sequences[gallery_ids], evaluation.gallery, use_gpu=use_gpu)
    try:
        ids, answers = [], []
        blocks = _query_blocks(store, manifest, table, queries, evaluation.gallery.block_rows, sampled[0], kept)
        with counting("searching", len(queries), "queries") as done:
            for block_ids, neighbors in pool.search(blocks, k):
                ids.append(block_ids)
                answers.append(neighbors)
                done(len(block_ids))
        positive, negative = _pair_distances(pool, sampled, kept, labels, evaluation.gallery.distance)
    finally:
        pool.close()
    neighbors = concatenate(answers)
    queries = np.concatenate(ids)
    num_relevant = ground_truth_counts(
        queries, labels[queries], sequences[queries], gallery_ids, labels[gallery_ids], sequences[gallery_ids]
    )
    ranks = evaluation.metrics.model_dump(include={"cmc", "precision", "map"})
    values = per_query(relevance(neighbors, queries, labels), neighbors.counts, num_relevant, **ranks)
    return Found(queries, neighbors, len(gallery_ids), num_relevant, values, positive, negative, bad)


def relevance(neighbors: Neighbors, queries: Ids, labels: Ids) -> NDArray[np.bool_]:
    """Bool (Q, k): which neighbors share their query's label."""
    return np.asarray((neighbors.ids >= 0) & (labels[neighbors.ids] == labels[queries][:, None]))  # (queries, k)


def _query_blocks(
    store: Store,
    manifest: Manifest,
    table: Table,
    queries: Ids,
    block_rows: int,
    sampled: Ids,
    kept: list[tuple[Ids, Embeddings]],
) -> Iterator[tuple[Embeddings, Ids, Ids]]:
    """Blocks of queries in the order of their ids; embeddings of sampled ones are kept on the way."""
    waiting: list[tuple[Ids, Embeddings]] = []

    def block() -> tuple[Embeddings, Ids, Ids]:
        ids = np.concatenate([part for part, _ in waiting])
        embeddings = np.concatenate([part for _, part in waiting])
        waiting.clear()
        chosen = np.isin(ids, sampled)
        kept.append((ids[chosen], embeddings[chosen]))
        return embeddings, ids, table.sequences[ids]

    for ids, embeddings in rows_of(store, manifest, queries):
        waiting.append((ids, embeddings))
        if sum(len(part) for part, _ in waiting) >= block_rows:
            yield block()
    if waiting:
        yield block()


def _sample_pairs(queries: Ids, gallery_ids: Ids, table: Table) -> tuple[Ids, Ids, Ids]:
    """Row ids of seeded random queries, each with one gallery item of its label and one of any label, -1 for none."""
    generator = np.random.default_rng(0)
    chosen = generator.choice(queries, PAIRS_SAMPLED)
    order = np.argsort(table.labels[gallery_ids], kind="stable")
    by_label, sorted_labels = gallery_ids[order], table.labels[gallery_ids][order]
    first = np.searchsorted(sorted_labels, table.labels[chosen], "left")
    count = np.searchsorted(sorted_labels, table.labels[chosen], "right") - first
    offset = generator.integers(0, np.maximum(count, 1))
    partners = np.where(count > 0, by_label[np.minimum(first + offset, len(by_label) - 1)], -1)
    partners[partners == chosen] = -1
    return chosen, partners, generator.choice(gallery_ids, len(chosen))


def _pair_distances(
    pool: GalleryPool, sampled: tuple[Ids, Ids, Ids], kept: list[tuple[Ids, Embeddings]], labels: Ids, distance: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    chosen, partners, others = sampled
    query_ids = np.concatenate([ids for ids, _ in kept])
    query_embeddings = np.concatenate([embeddings for _, embeddings in kept])
    order = np.argsort(query_ids)
    query_ids, query_embeddings = query_ids[order], query_embeddings[order]
    item_ids, item_embeddings = pool.take(np.unique(np.concatenate([partners, others])))

    def distances(one: Ids, other: Ids) -> NDArray[np.float32]:
        left = torch.from_numpy(query_embeddings[np.searchsorted(query_ids, one)])
        right = torch.from_numpy(item_embeddings[np.searchsorted(item_ids, other)])
        return exact_paired(left, right, distance).numpy()

    has_partner, differs = partners >= 0, labels[others] != labels[chosen]
    return distances(chosen[has_partner], partners[has_partner]), distances(chosen[differs], others[differs])


def _scores(found: Found) -> NDArray[np.float64]:
    """Mean of all metrics of each query, (Q,); NaN without a ground truth."""
    columns = [column for family in found.values.values() for column in family.values()]
    return np.mean(columns, axis=0) if columns else np.zeros(len(found.queries))


def _worst(found: Found) -> Ids:
    """Positions of queries from the lowest score up; among equals, the most confident mistake first."""
    scores = _scores(found)
    order = np.lexsort((found.neighbors.distances[:, 0], scores))
    return order[~np.isnan(scores[order])]


def _random(found: Found) -> Ids:
    return np.random.default_rng(0).permutation(len(found.queries))


def _query_rows(found: Found, table: Table, config: TrainConfig | EvaluateConfig, positions: Ids) -> list[QueryRow]:
    reader = ImageReader(table, max_pixels=config.data.max_pixels)
    pictures, labels = config.evaluation.pictures, table.labels
    relevant = relevance(found.neighbors, found.queries, labels)
    rows = []
    for position in positions[: pictures.queries].tolist():
        query = int(found.queries[position])
        count = min(int(found.neighbors.counts[position]), pictures.neighbors)
        neighbors = [
            _picture(reader, int(found.neighbors.ids[position, rank]), float(found.neighbors.distances[position, rank]),
                     bool(relevant[position, rank]))
            for rank in range(count)
        ]  # fmt: skip
        same = table.is_gallery & (labels == labels[query])
        same[query] = False
        if table.sequences[query] >= 0:
            same &= table.sequences != table.sequences[query]
        missed = np.setdiff1d(np.flatnonzero(same), [*found.neighbors.ids[position, :count], *found.bad])
        values = {f"{family}.{k}": float(values[position]) for family, ranks in found.values.items()
                  for k, values in ranks.items()}  # fmt: skip
        missed_pictures = [_picture(reader, int(row)) for row in missed[:MISSED_SHOWN]]
        rows.append(QueryRow(_picture(reader, query), neighbors, missed_pictures, values))
    return rows


def _picture(reader: ImageReader, row: int, distance: float | None = None, relevant: bool | None = None) -> Picture:
    table = reader.table
    buffer = io.BytesIO()
    try:
        image = reader.read(row)
    except ImageError as error:
        # It could be read when it was embedded: the place has lost it since.
        raise EmbeddingError(f"A picture for the report is gone: {error}") from None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=85)
    category = int(table.categories[row])
    where = f", {table.category_names[category]}" if category >= 0 else ""
    return Picture(buffer.getvalue(), f"row {row}, label {table.labels[row]}{where}", distance, relevant)


def _baseline(history: list[dict[str, Any]]) -> dict[str, Any] | None:
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


def _training_timings(history: list[dict[str, Any]]) -> dict[str, Any]:
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


def _print(metrics: dict[str, Any], baseline: dict[str, Any] | None, run: RunDirectory) -> None:
    counts = metrics["counts"]
    say(f"{counts['queries']} queries, {counts['gallery']} gallery items" + (
        f", {counts['bad_images']} bad images left out" if counts["bad_images"] else ""))  # fmt: skip
    for family, ranks in metrics["overall"].items():
        for k, entry in ranks.items():
            if entry["value"] is None:
                say(f"  {family}@{k:<4} no query has a ground truth")
                continue
            before = baseline and baseline["overall"].get(family, {}).get(k)
            low, high = entry["ci95"]
            say(f"  {family + '@' + k:<14} {entry['value']:.4f}  [{low:.4f}, {high:.4f}]" + (
                f"  before training {before['value']:.4f}" if before else ""))  # fmt: skip
    say(f"report: {run.path(runs.REPORT)}")
