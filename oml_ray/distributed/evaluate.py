"""Evaluation: embed, search the gallery shards, measure, and report."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from oml_ray import build
from oml_ray.config import EvaluateConfig, TrainConfig, dump, nodes
from oml_ray.data.table import Table
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
from oml_ray.distributed.search import search
from oml_ray.distributed.session import Needs, check_given, session, unwrapped
from oml_ray.errors import ConfigError
from oml_ray.learning.extractors import Extractor
from oml_ray.retrieval.metrics import summarise
from oml_ray.retrieval.report import Report, write_report
from oml_ray.training.run_directory import History, RunDirectory


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
    if runs.is_finished(config):
        return
    run = runs.open_run(config)
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
    bad = {str(row): "see the training's log" for entry in history for row in entry.get("bad_rows", [])}
    bad |= {row: reason for entry in history for row, reason in entry.get("bad_images", {}).items()}
    bad |= {str(row): reason for row, reason in found.bad.items()}
    document = {
        **metrics,
        "counts": {
            "queries": len(found.queries),
            "gallery": found.num_gallery,
            "without_ground_truth": int((found.num_relevant == 0).sum()),
            "bad_images": len(bad),
        },
        "timings": {**training_timings(history), **{name: round(value, 3) for name, value in timings.items()}},
        "versions": build.versions(),
    }
    report = Report(
        title=run.name,
        metrics=document,
        baseline=baseline(history),
        history=history,
        positive_distances=found.positive,
        negative_distances=found.negative,
        worst=query_rows(found, table, config, worst_queries(found)),
        random=query_rows(found, table, config, random_queries(found)),
        config=dump(config),
        bad_images=[(table.uri(int(row)), reason) for row, reason in bad.items()],
    )
    write_report(run.path(runs.REPORT), report)
    run.publish(runs.REPORT)
    # Last: its presence says that the run is finished.
    run.write_text(json.dumps(document, indent=1), runs.METRICS)
    print_metrics(document, baseline(history), run)
