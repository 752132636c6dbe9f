"""Evaluation: embed or read embeddings, search the gallery shards, measure, and report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oml_ray import build
from oml_ray.config import EvaluateConfig, TrainConfig, dump, nodes
from oml_ray.data.filesystem import exists, join, resolve
from oml_ray.data.table import Table, table_of
from oml_ray.distributed import embed, gallery, runs
from oml_ray.distributed.progress import say
from oml_ray.distributed.reporting import (
    baseline,
    print_metrics,
    query_rows,
    random_queries,
    training_timings,
    worst_queries,
)
from oml_ray.distributed.search import Embedded, Found, search
from oml_ray.distributed.session import Needs, check_given, session, unwrapped
from oml_ray.errors import ConfigError
from oml_ray.retrieval.approximation import ComparedSetting, compare, mark_pareto
from oml_ray.retrieval.metrics import summarise
from oml_ray.retrieval.neighbors_file import metrics_writer, neighbors_writer
from oml_ray.retrieval.pcf import PrincipalComponents
from oml_ray.retrieval.report import Report, write_report
from oml_ray.retrieval.store import MANIFEST, Store
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.training.run_directory import History, RunDirectory


def needs(evaluation: nodes.Evaluation, scaling: nodes.Scaling) -> Needs:
    """Logical resources of an evaluation: embedding, then searching."""
    return embed.needs(evaluation.embed, scaling) | searching_needs(evaluation, scaling)


def searching_needs(evaluation: nodes.Evaluation, scaling: nodes.Scaling) -> Needs:
    """Logical resources of an evaluation of embeddings that are there."""
    found = gallery.needs(evaluation.gallery, scaling)
    for other in evaluation.compare:
        found |= gallery.needs(other, scaling)
    return found


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
    """Evaluate a table from a checkpoint, an extractor or embeddings; write metrics and report into the run.

    Raises:
        OmlRayError: the user's error, wherever it came up.
    """
    config, images, embedded = _prepare(config)
    if runs.is_finished(config):
        return
    run = runs.open_run(config)
    timings: dict[str, float] = {}
    with session(_needs(config)), unwrapped():
        if embedded is None:
            assert images is not None
            embedded = embed_validation(run, config, images, timings)
        measure(run, config, embedded, History(run).rows, timings)


def dry_run(config: EvaluateConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config."""
    config, *_ = _prepare(config)
    check_given(_needs(config))
    say(dump(config))


def _needs(config: EvaluateConfig) -> Needs:
    has_images = isinstance(config.source, nodes.CheckpointSource | nodes.ExtractorSource)
    return (needs if has_images else searching_needs)(config.evaluation, config.scaling)


def _prepare(config: EvaluateConfig) -> tuple[EvaluateConfig, embed.Images | None, Embedded | None]:
    """Check all that can be checked before anything starts; return what is to embed, or what is embedded."""
    config = runs.resolved(config)
    runs.check_apart(config)
    runs.check_name(config)
    if isinstance(config.source, nodes.CheckpointSource | nodes.ExtractorSource):
        assert config.data is not None
        images = embed.images_of(config.source, config.data, config.run.storage, config.seed)
        check(images.table)
        return config, images, None
    table = None if config.data is None else build.table(config.data, config.run.storage)
    if isinstance(config.source, nodes.StoreSource):
        embedded = from_store(config.source.store, table)
    else:
        embedded = from_files(config.source.embeddings, table, config.data)
    check(embedded.table)
    return config, None, embedded


def open_store(uri: str) -> Store:
    """Open a store by its folder, or by the run that it is of."""
    inside = join(uri, runs.EMBEDDINGS)
    return Store(*resolve(uri if exists(join(uri, MANIFEST)) or not exists(join(inside, MANIFEST)) else inside))


def from_store(uri: str, table: Table | None) -> Embedded:
    """What a whole store holds; with a table, which must be the one it was made from, images can be shown.

    Raises:
        EmbeddingError: it is not whole. ConfigError: it was made from another table.
    """
    store = open_store(uri)
    manifest = store.whole()
    embeddings = UserEmbeddings(store.filesystem, store.path, by_position=table is None)
    if table is not None:
        if manifest.table != table.fingerprint:
            raise ConfigError(
                f"data.table: {table.source} is not the table that the store {store.path} was made from: give that "
                "one, or leave data out (the store brings its labels itself)."
            )
        bad = store.bad_images(manifest)
        if len(lost := np.setdiff1d(_lacking(table, embeddings), np.fromiter(bad, np.int64, len(bad)))):
            raise ConfigError(
                f"source.store: {store.path} was made with data.split: {manifest.split} and lacks {len(lost)} "
                f"validation rows, first: {lost[:5].tolist()}: embed them."
            )
        return Embedded(table, embeddings, bad)
    columns = embeddings.table()
    assert columns is not None
    return Embedded(table_of(columns, store.path), embeddings, has_images=False, left_out=store.bad_images(manifest))


def from_files(uri: str, table: Table | None, data: nodes.SplitData | None) -> Embedded:
    """What the user's own files hold; without a table they must bring their labels.

    Raises:
        ConfigError: the files do not have a row for each of the table's.
    """
    embeddings = UserEmbeddings(*resolve(uri), by_position=table is None)
    if table is None or data is None:
        columns = embeddings.table()
        if columns is None:
            raise ConfigError(
                f"source.embeddings: {uri} holds embeddings alone; metrics need labels: set data.table to a table with "
                f"a row for each of its {embeddings.num_rows} embeddings."
            )
        return Embedded(table_of(columns, uri), embeddings, has_images=False)
    if "id" not in embeddings.columns:
        rows = embed.rows_of(table, data.split)
        if embeddings.num_rows not in (len(table), len(rows)):
            raise ConfigError(
                f"source.embeddings: {uri} has {embeddings.num_rows} rows, but the table {table.source} has "
                f"{len(table)} ({len(rows)} in data.split: {data.split}): they must be as many, in the same order."
            )
        if embeddings.num_rows != len(table):
            embeddings = embeddings.named(rows)
    elif len(lost := _lacking(table, embeddings)):
        raise ConfigError(
            f"source.embeddings: {uri} has no embedding for {len(lost)} rows that are queries or gallery in the table "
            f"{table.source}, first: {lost[:5].tolist()}: add them (its column id must hold row numbers of the table, "
            "from 0), or leave data out to evaluate the file by its own columns."
        )
    return Embedded(table, embeddings)


def _lacking(table: Table, embeddings: UserEmbeddings) -> NDArray[np.int64]:
    """Rows that are evaluated, but not among the embeddings."""
    return np.setdiff1d(np.concatenate([table.query_ids, table.gallery_ids]), embeddings.ids())


def embed_validation(
    run: RunDirectory, config: TrainConfig | EvaluateConfig, images: embed.Images, timings: dict[str, float]
) -> Embedded:
    """Embed what is evaluated, in a session that is there."""
    start = time.perf_counter()
    store, manifest = embed.fill_store(run, images, config.evaluation.embed, config.scaling)
    timings["evaluate/embed"] = time.perf_counter() - start
    return Embedded(images.table, UserEmbeddings(store.filesystem, store.path), store.bad_images(manifest))


def measure(
    run: RunDirectory,
    config: TrainConfig | EvaluateConfig,
    embedded: Embedded,
    history: list[dict[str, Any]],
    timings: dict[str, float],
) -> None:
    """Search, measure and report, in a session that is there."""
    evaluation, table = config.evaluation, embedded.table
    start = time.perf_counter()
    found = search(embedded, evaluation, evaluation.gallery, config.scaling)
    timings["evaluate/search"] = time.perf_counter() - start
    start = time.perf_counter()
    metrics = summarise(
        found.values,
        table.categories[found.queries].astype(np.int64),
        table.category_names,
        samples=evaluation.metrics.bootstrap.samples,
        seed=evaluation.metrics.bootstrap.seed,
    )
    if found.fnmr:
        metrics["overall"]["fnmr_at_fmr"] = {f"{each.fmr:g}": {"value": each.fnmr, "ci95": None} for each in found.fnmr}
    _add_pcf(metrics, embedded, evaluation)
    timings["evaluate/metrics"] = time.perf_counter() - start
    comparisons = _compare(embedded, evaluation, found, config.scaling)
    bad = {str(row): "see the training's log" for entry in history for row in entry.get("bad_rows", [])}
    bad |= {row: reason for entry in history for row, reason in entry.get("bad_images", {}).items()}
    bad |= {str(row): reason for row, reason in found.bad.items()}
    document = {
        **metrics,
        "counts": {
            "queries": len(found.queries),
            "gallery": found.num_gallery,
            "without_ground_truth": int((found.num_relevant == 0).sum()),
            "bad_images": len(bad) + len(embedded.left_out),
            "second_searches": found.second_searches,
        },
        "timings": {**training_timings(history), **{name: round(value, 3) for name, value in timings.items()}},
        "versions": build.versions(),
    }
    if comparisons:
        document["comparisons"] = [setting.as_json() for setting in comparisons]
    _write_tables(run, embedded, evaluation, found)
    report = Report(
        title=run.name,
        metrics=document,
        baseline=baseline(history),
        history=history,
        positive_distances=found.positive,
        negative_distances=found.negative,
        worst=query_rows(found, embedded, config, worst_queries(found)),
        random=query_rows(found, embedded, config, random_queries(found)),
        config=dump(config),
        bad_images=[
            *((table.uri(int(row)), reason) for row, reason in bad.items()),
            *((f"row {row}", reason) for row, reason in embedded.left_out.items()),
        ],
        comparisons=comparisons,
    )
    write_report(run.path(runs.REPORT), report)
    run.publish(runs.REPORT)
    # Last: its presence says that the run is finished.
    run.write_text(json.dumps(document, indent=1), runs.METRICS)
    print_metrics(document, baseline(history), run)


def _add_pcf(metrics: dict[str, Any], embedded: Embedded, evaluation: nodes.Evaluation) -> None:
    """Add the principal components fraction of the gallery's embeddings, overall and by category."""
    shares = evaluation.metrics.pcf
    if not shares:
        return
    table = embedded.table
    components = PrincipalComponents(len(table.category_names))
    for block in embedded.blocks(embedded.gallery().ids, evaluation.gallery.block_rows):
        components.add(block.embeddings, table.categories[block.ids].astype(np.int64))
    overall, by_category = components.result(shares)

    def entries(values: Any) -> dict[str, Any]:
        return {
            f"{share:g}": {"value": None if np.isnan(value) else float(value), "ci95": None}
            for share, value in zip(shares, values, strict=True)
        }

    metrics["overall"]["pcf"] = entries(overall)
    for name, values in zip(table.category_names, by_category, strict=True):
        metrics["categories"][name]["pcf"] = entries(values)


def _compare(
    embedded: Embedded, evaluation: nodes.Evaluation, found: Found, scaling: nodes.Scaling
) -> Sequence[ComparedSetting]:
    """Judge other ways of searching against exact search."""
    if not evaluation.compare:
        return ()
    # What is counted over all pairs is exact whatever finds the neighbors.
    listed_only = evaluation.model_copy(update={"metrics": evaluation.metrics.only_listed})
    exact = found
    if not isinstance(evaluation.gallery, nodes.ExactGallery):
        shards = evaluation.gallery
        node = nodes.ExactGallery(shards=shards.shards, cpus_per_shard=shards.cpus_per_shard, distance=shards.distance)
        exact = search(embedded, evaluation, node, scaling)
    k = max(evaluation.metrics.largest_rank, evaluation.pictures.neighbors)
    settings = []
    for setting in evaluation.compare:
        other = search(embedded, listed_only, setting, scaling)
        order = np.argsort(other.queries)[np.searchsorted(np.sort(other.queries), exact.queries)]
        settings.append(
            compare(
                _name_of(setting),
                other.neighbors.select(order),
                exact.neighbors,
                k,
                {
                    family: {rank: values[order] for rank, values in by_k.items()}
                    for family, by_k in other.values.items()
                },
                {family: exact.values[family] for family in other.values},
                queries_per_s=len(other.queries) / other.seconds,
                num_bytes=other.index_bytes,
                build_s=other.build_s,
                samples=evaluation.metrics.bootstrap.samples,
                seed=evaluation.metrics.bootstrap.seed,
            )
        )
        say(f"  {settings[-1].name}: ann_recall@{k} {settings[-1].ann_recall:.4f}, "
            f"{settings[-1].queries_per_s:.0f} queries/s")  # fmt: skip
    return mark_pareto(settings)


def _name_of(node: nodes.Gallery) -> str:
    """What distinguishes one way of searching: its backend and the keys that are not the defaults."""
    told = node.model_dump(exclude_defaults=True, exclude={"backend", "index", "distance"})
    return " ".join([node.backend, *(f"{key}={value}" for key, value in told.items())])


def _write_tables(run: RunDirectory, embedded: Embedded, evaluation: nodes.Evaluation, found: Found) -> None:
    """Write the neighbors and the per-query metrics, where they are asked for, under the rows' own ids."""
    names = embedded.embeddings.given_ids() if not embedded.has_images else None
    queries, neighbors = found.queries, found.neighbors
    if names is not None:
        ids = np.where(neighbors.ids >= 0, names[neighbors.ids], neighbors.ids)
        queries, neighbors = names[queries], type(neighbors)(ids, neighbors.distances, neighbors.counts)
    if evaluation.neighbors:
        with neighbors_writer(*resolve(str(run.path(runs.NEIGHBORS))), neighbors.k) as write:
            write(queries, neighbors)
        run.publish(runs.NEIGHBORS)
    if evaluation.metrics.per_query:
        columns = [f"{family}.{k}" for family, by_k in found.values.items() for k in by_k]
        with metrics_writer(*resolve(str(run.path(runs.PER_QUERY))), columns) as write_metrics:
            write_metrics(queries, found.values)
        run.publish(runs.PER_QUERY)
