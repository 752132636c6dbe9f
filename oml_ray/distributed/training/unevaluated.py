"""Results of a training without validation rows: curves and timings, and no metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from oml_ray import build
from oml_ray.config import TrainConfig, dump
from oml_ray.data.filesystem import join
from oml_ray.data.table import Table
from oml_ray.distributed import runs
from oml_ray.distributed.progress import say
from oml_ray.distributed.reporting import training_bad_images, training_timings
from oml_ray.retrieval.report import Report, write_report
from oml_ray.training.run_directory import History, RunDirectory


def report_training(
    run: RunDirectory, config: TrainConfig, table: Table, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Write report and `metrics.json` of a training that nothing was evaluated of; its presence ends the run.

    Args:
        run: where the results go.
        config: of the run.
        table: its table, without validation rows.
        tell: is given the document of `metrics.json` before the run counts as finished.
    """
    history = History(run).rows
    bad = training_bad_images(history)
    document = {
        "overall": {},
        "categories": {},
        "counts": {
            "queries": 0,
            "gallery": 0,
            "without_ground_truth": 0,
            "bad_images": len(bad),
            "second_searches": 0,
        },
        "timings": training_timings(history),
        "versions": build.versions(),
    }
    report = Report(
        title=run.name,
        metrics=document,
        baseline=None,
        history=history,
        positive_distances=np.empty(0),
        negative_distances=np.empty(0),
        worst=[],
        random=[],
        config=dump(config),
        bad_images=[(table.uri(int(row)), reason) for row, reason in bad.items()],
    )
    write_report(run.path(runs.REPORT), report)
    run.publish(runs.REPORT)
    say(f"nothing was evaluated: {table.source} has no validation rows; the best checkpoint is the last one")
    say(f"report: {join(run.uri, runs.REPORT)}")
    tell(document)
    run.write_text(json.dumps(document, indent=1), runs.METRICS)
