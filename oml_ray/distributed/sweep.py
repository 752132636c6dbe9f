"""Sweeps: trainings that differ in some keys run side by side on Ray Tune; the best is evaluated and reported."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import ray

from oml_ray import build
from oml_ray.config import SweepConfig
from oml_ray.config.space import Choice, Grid, Values, shown
from oml_ray.data.filesystem import join
from oml_ray.distributed import evaluate, optuna_search, runs, sweep_resources, sweep_results, sweep_runs, trainer
from oml_ray.distributed.progress import say
from oml_ray.distributed.runtime import gallery_resources
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.session import check_given, is_given, session
from oml_ray.distributed.sweep_table import showing
from oml_ray.distributed.trial import training_of
from oml_ray.distributed.trials import Record
from oml_ray.distributed.tuning import RAY_RECORDS, run_trials
from oml_ray.errors import ConfigError, RunError, StorageError
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.tracking import Ending

MOST_CHECKED = 50


def sweep(config: SweepConfig, *, resume: bool = False) -> None:
    """Run the trials of a sweep, evaluate the best one's checkpoint, and report.

    Args:
        config: as `load_sweep` gives it.
        resume: continue an unfinished sweep of the same config: trials that were interrupted go on, those that failed
            are tried again, and the rest is drawn.

    Raises:
        OmlRayError: the user's error, but those of single trials.
        KeyboardInterrupt: the user interrupted it.
    """
    config = sweep_runs.resolved(config)
    if sweep_runs.is_done(config, resume=resume):
        return
    _check(config)
    run = sweep_runs.open_sweep(config, resume=resume)
    record = Record(run, config)
    with session(sweep_resources.needs(config), dashboard=True), unwrapped():
        max_concurrent = sweep_resources.at_once(config, ray.nodes())  # type: ignore[no-untyped-call]
        sweep_resources.check_state_api(config)
        say(f"{config.num_trials} trials, {max_concurrent} at a time")
        with showing(record, config.num_trials) as told:
            run_trials(config, record, run, max_concurrent, told)
        for folder in (run, *map(record.run_of, record.trials)):
            with suppress(StorageError):  # a stopped trial's workers may still write: what stays does no harm
                folder.remove(RAY_RECORDS)
        for trial in record.trials:
            runs.replace_lost_best(record.run_of(trial))
        found = sweep_results.outcomes(record)
        if found[0].can_win:
            say(f"the best is trial {found[0].trial.name}: {shown(found[0].trial.values)}; its checkpoint, evaluated:")
            evaluate.evaluate(sweep_results.evaluation_of(config, run, found[0]))
        _end_tracking(config, record)
        if found[0].can_win:
            _track_best(config, run, record, found[0])
    document = sweep_results.write(config, run, record, found)
    _print(document, run)


def dry_run(config: SweepConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config and the draws."""
    config = sweep_runs.resolved(config)
    runs.check_name(config, sweep_runs.MAY_DIFFER)
    _check(config)
    needed = sweep_resources.needs(config)
    if is_given():
        with session(needed):
            sweep_resources.at_once(config, ray.nodes())  # type: ignore[no-untyped-call]
    else:
        check_given(needed)
    if config.tune.search != "optuna":
        for index in range(config.num_trials):
            say(f"# trial {index:04d}: {shown(config.draw(index))}")
    runs.say_checked(config)


def _check(config: SweepConfig) -> None:
    """Check the trials against their tables: one for each combination of choices, as far as they can be drawn now."""
    if config.tune.search == "optuna":
        optuna_search.check_installed()
    tables: dict[str, Any] = {}
    for values in _representatives(config):
        trial = runs.resolved(config.trial(values, "trial", config.run.storage))
        if trial.model is not None:
            raise ConfigError("base: model: a sweep compares extractors; models that judge pairs are trained by train.")
        key = trial.data.model_dump_json()
        if key not in tables:
            tables[key] = build.table(trial.data, config.run.storage)
            for warning in tables[key].warnings:
                say(f"# warning: {warning}")
            evaluate.check(tables[key])  # trials are compared by what is validated
        trainer.check(trial, tables[key])
    gallery_resources.say_indexes_on_cpu(config.training.evaluation, config.training.scaling)
    build.check_tracking(config.training)


def _end_tracking(config: SweepConfig, record: Record) -> None:
    """Have the trackers know how the trials ended: those that were stopped had no time for it themselves."""
    how: dict[str, Ending] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    for trial in record.trials if config.training.tracking else ():
        for tracker in build.trackers(
            training_of(config, trial.name, trial.values, record.storage), record.run_of(trial)
        ):
            tracker.end(how[trial.state])


def _track_best(config: SweepConfig, run: RunDirectory, record: Record, best: sweep_results.Outcome) -> None:
    """Hand the evaluation of the best checkpoint to the trackers of its trial."""
    assert best.checkpoint is not None
    evaluated = RunDirectory(run.uri, sweep_results.BEST_RUN)
    metrics = json.loads(evaluated.read_text(runs.METRICS) or "{}")
    training = training_of(config, best.trial.name, best.trial.values, record.storage)
    trainer.track(training, record.run_of(best.trial), best.checkpoint, metrics, evaluated)


def _representatives(config: SweepConfig) -> list[Values]:
    """Draws (for Optuna: those of a random search) that differ in what is chosen, not only inside a range."""
    discrete = [entry for entry, domain in config.space.items() if isinstance(domain, Choice | Grid)]
    found: dict[str, Values] = {}
    for index in range(config.num_trials):
        values = config.draw(index)
        found.setdefault(repr([values[entry] for entry in discrete]), values)
        if len(found) == MOST_CHECKED:
            break
    return list(found.values())


def _print(document: dict[str, Any], run: RunDirectory) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in document["counts"].items() if count)
    say(f"{len(document['trials'])} trials: {counts}")
    best = document["best"]
    if best is None:
        reason = next((trial["reason"] for trial in document["trials"] if trial["reason"]), "no trial has a checkpoint")
        raise RunError(f"No trial of {run.uri} came to its end; the first: {reason}")
    say(f"best: trial {best['trial']}, {document['metric']} {best['value']:.4f} after {best['epoch']} epochs; "
        f"checkpoint {best['checkpoint']}; config {best['config']}")  # fmt: skip
    say(f"report: {join(run.uri, runs.REPORT)}")
