"""One trial of a sweep: an ordinary training run inside a Tune trial, which tells Tune what it validates."""

from __future__ import annotations

import json
import time
import traceback
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from oml_ray import build
from oml_ray.config import SweepConfig, TrainConfig
from oml_ray.config.space import Values
from oml_ray.distributed import runs, trainer
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.session import quiet
from oml_ray.distributed.trials import Point, checkpoint_step, curve_of
from oml_ray.errors import OmlRayError, reason_of
from oml_ray.training.run_directory import RunDirectory

EPOCHS, VALUE, ENDED, REASON = "epochs", "value", "ended", "reason"
FAILURE = "failure.txt"
SETTLED_S = 1.0


class Reports(TuneReportCallback):
    """Hands what the workers validate to Tune, as points of a learning curve."""

    def __init__(self, metric: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.metric = metric

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by the controller of Ray Train after every worker's report."""
        row = metrics[0]
        if self.metric in row:  # a checkpoint that is handed over to be validated has none yet
            super().after_report(run_context, [_result((row["epoch"] + 1, row[self.metric]))], None)

    def settle(self) -> None:
        """Wait until Tune has taken what was handed over.

        Ray 2.60 would hang if this process reported anything itself while a report of the workers is still on its way.
        """
        while not self._training_actor_item_queue.empty():
            time.sleep(0.1)
        time.sleep(SETTLED_S)


def training_of(sweep: SweepConfig, name: str, values: Values, storage: str) -> TrainConfig:
    """Return the resolved training config of a trial.

    Raises:
        ConfigError: the values do not fit into the base, or not together.
    """
    return build.titled(runs.resolved(sweep.trial(values, name, storage)), f"{sweep.run.name}/{name}")


def run_trial(given: dict[str, Any], sweep: SweepConfig, storage: str) -> None:
    """Run (or continue) the trial that Tune was given; what goes wrong in it is its result, and no error of Tune.

    Args:
        given: `trial`, its name, and `values`, one for each entry of the space, as JSON.
        sweep: the resolved config of the sweep.
        storage: folder or URI of all trials' runs.
    """
    quiet()
    config = training_of(sweep, given["trial"], json.loads(given["values"]), storage)
    reports = Reports(config.checkpoint.metric)
    ending = {ENDED: "finished"}
    try:
        table = build.table(config.data, config.run.storage)
        run = runs.open_run(config)
        for point in _earlier(run, config.checkpoint.metric):
            tune.report(_result(point))
        with unwrapped():
            late = trainer.fit(config, table, run, callbacks=[reports], is_trial=True)
        reports.settle()
        for row in late:
            tune.report(_result((row["epoch"] + 1, row[config.checkpoint.metric])))
    except Exception as error:
        ending = {ENDED: "failed", REASON: _reason(error)}
        if not isinstance(error, OmlRayError):
            RunDirectory(config.run.storage, config.run.name).write_text(traceback.format_exc(), FAILURE)
    reports.settle()
    tune.report(ending)


def _result(point: Point) -> dict[str, Any]:
    return {EPOCHS: point[0], VALUE: point[1]}


def _earlier(run: RunDirectory, metric: str) -> list[Point]:
    """What an earlier process validated before the checkpoint from which this one goes on."""
    step = checkpoint_step(run, "last")
    return [] if step is None else curve_of(run, metric, step)


def _reason(error: Exception) -> str:
    """One line of what went wrong."""
    if isinstance(error, OmlRayError):
        return str(error)
    name = type(error).__name__
    reason = reason_of(error)
    return f"{name} (see {FAILURE} of its run)" if reason == name else f"{name}: {reason} (see {FAILURE} of its run)"
