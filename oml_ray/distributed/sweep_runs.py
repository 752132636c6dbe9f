"""Sweeps by name: start, continue, or leave a sweep, and never mix two configs under one name."""

from __future__ import annotations

from typing import Any

from oml_ray import build
from oml_ray.config import SweepConfig, dump
from oml_ray.data.filesystem import exists, join
from oml_ray.distributed import runs, sweep_results
from oml_ray.distributed.progress import say
from oml_ray.distributed.runtime import driver_log
from oml_ray.distributed.trials import FOLDER, RECORD, Record
from oml_ray.distributed.tuning import RAY_RECORDS
from oml_ray.errors import RunError
from oml_ray.training.run_directory import RunDirectory

# Keys that may change when a sweep is continued: where it runs, and how long it goes on.
MAY_DIFFER = (
    "run",
    "base.run",
    "base.scaling",
    "base.tracking",
    "base.storage",
    "tune.num_samples",
    "tune.max_concurrent",
)


def resolved(config: SweepConfig) -> SweepConfig:
    """Make every path absolute, those of the base too, and let all trials share the generated table."""
    config = runs.resolved(config)

    def absolute(node: Any) -> Any:
        if isinstance(node, list):
            return [absolute(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {
            key: runs.absolute(value) if runs.is_path(key, value) else absolute(value) for key, value in node.items()
        }

    base = absolute(config.base)
    if base["data"]["table"] == build.FIGURES:
        base["data"]["table"] = build.figures_table(config.run.storage)
    return config.model_copy(update={"base": base})


def is_done(config: SweepConfig, *, resume: bool) -> bool:
    """Whether the sweep of this config is finished; says so."""
    uri = join(config.run.storage, config.run.name)
    if config.run.resume == "never" or not exists(join(uri, sweep_results.RESULTS)):
        return False
    runs.check_name(config, MAY_DIFFER)
    run = RunDirectory(config.run.storage, config.run.name)
    record = Record(run, config)
    if len(record.trials) < config.num_trials or (resume and record.unfinished()):
        return False
    failed = len(record.unfinished())
    more = f"; --resume tries its {failed} failed trials again" if failed else ""
    say(f"{uri} is finished; its report is {join(uri, runs.REPORT)} (run.resume: never starts it afresh{more}).")
    return True


def open_sweep(config: SweepConfig, *, resume: bool) -> RunDirectory:
    """Open the sweep's folder: a new one, or the one to continue.

    Raises:
        RunError: another config has used the name, or it holds a sweep that was not asked to be continued.
    """
    never, is_there = config.run.resume == "never", runs.check_name(config, MAY_DIFFER)
    uri = join(config.run.storage, config.run.name)
    if is_there and not resume:
        raise RunError(
            f"{uri} holds a sweep that is not finished: continue it with --resume, choose another run.name, or replace "
            "it with run.resume: never."
        )
    run = RunDirectory(config.run.storage, config.run.name)
    if resume and not is_there:
        say(f"nothing to resume under {uri}: starting")
    if never:
        names = run.names()
        if names and (runs.CONFIG not in names or RECORD not in names):
            raise RunError(
                f"run.resume: never would replace what lies in {uri}, which is no sweep (it has no {RECORD}): choose "
                "another run.name, or remove the folder yourself."
            )
        results = (sweep_results.RESULTS, sweep_results.CSV, sweep_results.BEST, sweep_results.BEST_RUN, runs.REPORT)
        runs.clear(run, [*results, FOLDER, RAY_RECORDS, RECORD, driver_log.FOLDER, runs.CONFIG])
    run.write_text(dump(config), runs.CONFIG)
    if not is_there:
        run.write_text("", RECORD)
    driver_log.keep_in(run)
    return run
