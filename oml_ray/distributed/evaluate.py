"""Evaluation: embed or read embeddings, search the gallery shards, measure, and report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from oml_ray import build
from oml_ray.config import EvaluateConfig, TrainConfig, dump, nodes
from oml_ray.data.filesystem import resolve
from oml_ray.data.ground_truth import check_ground_truth
from oml_ray.data.table import Table, check_files_exist
from oml_ray.distributed import embed, gallery, reranking, runs, sources
from oml_ray.distributed.progress import say
from oml_ray.distributed.reporting import (
    baseline,
    print_metrics,
    print_reranking,
    query_rows,
    random_queries,
    training_bad_images,
    training_timings,
    worst_queries,
)
from oml_ray.distributed.runtime import gallery_resources
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.search import Embedded, Found, places_in, search
from oml_ray.distributed.session import check_given, session
from oml_ray.errors import ConfigError
from oml_ray.retrieval.approximation import ComparedSetting, compare, mark_pareto
from oml_ray.retrieval.metrics import changes, summarise
from oml_ray.retrieval.neighbors_file import metrics_writer, neighbors_writer
from oml_ray.retrieval.pcf import PrincipalComponents
from oml_ray.retrieval.report import Report, RerankedStage, write_report
from oml_ray.training.run_directory import History, RunDirectory


def needs(evaluation: nodes.Evaluation, scaling: nodes.Scaling) -> Needs:
    """Logical resources of an evaluation: embedding, then searching."""
    return embed.needs(evaluation.embed, scaling) | searching_needs(evaluation, scaling)


def searching_needs(evaluation: nodes.Evaluation, scaling: nodes.Scaling) -> Needs:
    """Logical resources of an evaluation of embeddings that are there."""
    found = gallery_resources.needs(evaluation.gallery, scaling)
    for other in evaluation.compare:
        found |= gallery_resources.needs(other, scaling)
    if evaluation.compare or evaluation.rerank:  # both may search exactly what an index has searched
        found |= gallery_resources.needs(gallery.exactly(evaluation.gallery), scaling)
    if any(isinstance(node, nodes.Pairwise) for node in evaluation.rerank):
        found |= embed.needs(evaluation.embed, scaling)
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
    check_ground_truth(table)


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
            embedded = sources.embed_validation(run, config, images, timings)
        measure(run, config, embedded, History(run).rows, timings)


def dry_run(config: EvaluateConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config."""
    config, *_ = _prepare(config)
    check_given(_needs(config))
    runs.say_checked(config)


def _needs(config: EvaluateConfig) -> Needs:
    has_images = isinstance(config.source, nodes.CheckpointSource | nodes.ExtractorSource)
    return (needs if has_images else searching_needs)(config.evaluation, config.scaling)


def _prepare(config: EvaluateConfig) -> tuple[EvaluateConfig, embed.Images | None, Embedded | None]:
    """Check all that can be checked before anything starts; return what is to embed, or what is embedded."""
    config = runs.resolved(config)
    runs.check_apart(config)
    runs.check_name(config)
    gallery_resources.say_indexes_on_cpu(config.evaluation, config.scaling)
    if isinstance(config.source, nodes.CheckpointSource | nodes.ExtractorSource):
        assert config.data is not None
        images = embed.images_of(config.source, config.data, config.run.storage, config.seed)
        check(images.table)
        check_dimension(config, images.extractor.embedding_dim)
        return config, images, None
    embedded = sources.embedded_source(config)
    check(embedded.table)
    if check_dimension(config, embedded.embeddings.dimension):
        check_files_exist(embedded.table, np.union1d(embedded.queries(), embedded.gallery().ids))
    return config, None, embedded


def check_dimension(config: TrainConfig | EvaluateConfig, dimension: int) -> bool:
    """Check what an evaluation does with embeddings of a dimension, before there are any.

    Returns:
        Whether a re-ranker reads images.

    Raises:
        OmlRayError: what does not fit.
    """
    for node in (config.evaluation.gallery, *config.evaluation.compare):
        gallery.check(node, dimension)
    return reranking.check(config, dimension)


def measure(
    run: RunDirectory,
    config: TrainConfig | EvaluateConfig,
    embedded: Embedded,
    history: list[dict[str, Any]],
    timings: dict[str, float],
    tell: Callable[[dict[str, Any]], None] = lambda document: None,
) -> None:
    """Search, re-rank, measure and report, in a session that is there.

    Args:
        run: where the results go.
        config: of the run.
        embedded: what is searched.
        history: of the training before, if there was one.
        timings: what was measured so far; gets more.
        tell: is given the metrics, before the run counts as finished.
    """
    evaluation, table = config.evaluation, embedded.table
    start = time.perf_counter()
    pool = gallery.pool_of(embedded.gallery(), evaluation.gallery, config.scaling)
    try:
        found = searched = search(embedded, evaluation, evaluation.gallery, config.scaling, pool=pool)
        timings["evaluate/search"] = time.perf_counter() - start
        start = time.perf_counter()
        stages = reranking.reranked(found, embedded, config, run, pool) if evaluation.rerank else []
    finally:
        pool.close()
    if stages:
        timings["evaluate/rerank"] = time.perf_counter() - start
        found = replace(found, neighbors=stages[-1].neighbors, values=stages[-1].values)
    start, bootstrap = time.perf_counter(), evaluation.metrics.bootstrap
    metrics = summarise(
        found.values,
        table.categories[found.queries].astype(np.int64),
        table.category_names,
        samples=bootstrap.samples,
        seed=bootstrap.seed,
    )
    if found.fnmr:
        metrics["overall"]["fnmr_at_fmr"] = {f"{each.fmr:g}": {"value": each.fnmr, "ci95": None} for each in found.fnmr}
    _add_pcf(metrics, embedded, evaluation)
    timings["evaluate/metrics"] = time.perf_counter() - start
    comparisons = _compare(embedded, evaluation, searched, config.scaling)
    told = [
        RerankedStage(
            stage.name, changes(stage.name, stage.values, stages[0].values, bootstrap.samples, bootstrap.seed)
        )
        for stage in stages
    ]
    bad = training_bad_images(history)
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
    if told:
        document["reranking"] = [asdict(stage) for stage in told]
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
        reranking=told,
    )
    write_report(run.path(runs.REPORT), report)
    run.publish(runs.REPORT)
    print_reranking(told)
    print_metrics(document, baseline(history), run)
    tell(document)
    # Last: its presence says that the run is finished.
    run.write_text(json.dumps(document, indent=1), runs.METRICS)


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
    # What is counted over all pairs is exact whatever finds the neighbors, and re-ranking is not compared.
    listed_only = evaluation.only_listed
    exact = found
    if not isinstance(evaluation.gallery, nodes.ExactGallery):
        exact = search(embedded, listed_only, gallery.exactly(evaluation.gallery), scaling)
    k = max(evaluation.metrics.largest_rank, evaluation.pictures.neighbors)
    settings = []
    for setting in evaluation.compare:
        other = search(embedded, listed_only, setting, scaling)
        order = places_in(other.queries, exact.queries)
        settings.append(
            compare(
                reranking.node_name(setting, setting.backend, frozenset({"backend", "index", "distance"})),
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
