"""What Ray Tune asks while a sweep runs: which trial is next, whether one is to stop, and whom to tell of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from oml_ray.config import SweepConfig
from oml_ray.data.filesystem import join
from oml_ray.distributed import optuna_search, runs
from oml_ray.distributed.trial import ENDED, EPOCHS, REASON, VALUE, run_trial, training_of
from oml_ray.distributed.trials import Record, Trial
from oml_ray.errors import ConfigError
from oml_ray.training.run_directory import RunDirectory

RAY_RECORDS = "_ray"
DRIVER_CPUS = 1
SETTINGS = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the ending of a trial is a result without a metric
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's run has its own files
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output greets whatever the verbosity
}

Told = Callable[[Trial], None]


def run_trials(config: SweepConfig, record: Record, run: RunDirectory, max_concurrent: int, told: Told) -> None:
    """Run all trials of a sweep that have not ended, in a session that is there.

    Args:
        config: the sweep.
        record: its trials, kept up to date.
        run: its folder.
        max_concurrent: trials at a time.
        told: called at each start, result and end of a trial.

    Raises:
        KeyboardInterrupt: the user interrupted it; what runs is left as if it was killed.
    """
    num_left = len(record.unfinished()) + max(0, config.num_trials - len(record.trials))
    if num_left == 0:
        return
    os.environ.update(SETTINGS)
    on_path, name = run.local.as_posix() == run.uri, runs.ray_name(config)
    tuner = tune.Tuner(
        # The config reaches the trials in memory: what Tune is given as a trial's own config, it writes to files.
        tune.with_resources(
            tune.with_parameters(run_trial, sweep=config, storage=record.storage), {"CPU": DRIVER_CPUS}
        ),
        tune_config=tune.TuneConfig(
            search_alg=Draws(config, record, told),
            scheduler=scheduler(config, record),
            num_samples=num_left,
            max_concurrent_trials=max_concurrent,
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=run.path(RAY_RECORDS).as_posix() if on_path else join(run.uri, RAY_RECORDS),
            verbose=0,
            callbacks=[Ends(record, told)],
            # What goes wrong in a trial is its result: only the death of its driver is a failure to Tune.
            failure_config=tune.FailureConfig(max_failures=config.training.scaling.max_failures),
        ),
    )
    # To restore a sweep, Tune has written where it lies, with the credentials of the URI: the record restores it.
    run.remove(RAY_RECORDS, name, "tuner.pkl")
    tuner.fit()
    if len(record.trials) < config.num_trials or any(trial.state == "running" for trial in record.trials):
        raise KeyboardInterrupt  # Tune itself only stops at Ctrl-C


class Draws(Searcher):
    """Gives Tune the trials that an earlier process left, then new ones."""

    def __init__(self, config: SweepConfig, record: Record, told: Told) -> None:
        super().__init__()
        self._config, self._record, self._told = config, record, told
        self._left = record.unfinished()

    def suggest(self, trial_id: str) -> Any:
        """The next trial: its name, and its values as JSON, which Tune passes on as they are."""
        while (trial := self._next()) is not None:
            try:
                training_of(self._config, trial.name, trial.values, self._record.storage)
            except ConfigError as error:  # inside a range, where only draws themselves can be checked
                self._record.set(trial, "failed", str(error))
                self._told(trial)
                continue
            return {"trial": trial.name, "values": json.dumps(trial.values)}
        return Searcher.FINISHED

    def _next(self) -> Trial | None:
        if self._left:
            trial = self._left.pop(0)
            self._record.set(trial, "running")
            return trial
        index = len(self._record.trials)
        if index >= self._config.num_trials:
            return None
        tune_config = self._config.tune
        if tune_config.search == "optuna":
            trials, mode = self._record.trials, self._record.mode
            return self._record.start(optuna_search.suggest(self._config.space, trials, mode, tune_config.seed))
        return self._record.start(self._config.draw(index))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: `Ends` has it from the trial itself."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record is all that a later process needs."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts, to be able to restore them: the record does that


class Ends(tune.Callback):
    """Keeps the record of the trials."""

    def __init__(self, record: Record, told: Told) -> None:
        self._record, self._told = record, told

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial starts, or starts again: what it validated before, it tells again."""
        ours = self._of(trial)
        ours.curve = []
        self._told(ours)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A trial has validated."""
        if VALUE in result and ENDED not in result:
            ours = self._of(trial)
            ours.curve.append((result[EPOCHS], result[VALUE]))
            self._told(ours)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial said how it ended, or the scheduler stopped it."""
        ours, last = self._of(trial), trial.last_result
        self._record.set(ours, last.get(ENDED, "stopped"), last.get(REASON))
        self._told(ours)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """The process of a trial died, too often."""
        ours = self._of(trial)
        self._record.set(ours, "failed", f"The trial's own process died {trial.num_failures} times.")
        self._told(ours)

    def _of(self, trial: Any) -> Trial:
        return self._record.trials[int(trial.config["trial"])]

    def __getstate__(self) -> dict[str, Any]:
        return {}


def scheduler(config: SweepConfig, record: Record) -> TrialScheduler | None:
    """What stops trials early, knowing what the trials of the record that have ended said.

    ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"): a trial goes on after
    grace_epochs * reduction_factor^i epochs if it is among the best 1 / reduction_factor of those that got there.
    """
    tune_config = config.tune
    if tune_config.scheduler == "none":
        return None
    asha = ASHAScheduler(
        time_attr=EPOCHS,
        metric=VALUE,
        mode=record.mode,
        # No comparison after the last epoch: there is nothing left to save, and the checkpoint is still to be written.
        max_t=config.training.training.epochs - 1,
        grace_period=tune_config.grace_epochs,
        reduction_factor=tune_config.reduction_factor,
        stop_last_trials=False,  # otherwise a later validation would count for an earlier comparison
    )
    for trial in record.trials:
        if trial not in record.unfinished():
            named: Any = SimpleNamespace(trial_id=trial.name)
            asha.on_trial_add(None, named)  # type: ignore[arg-type]
            for epochs, value in trial.curve:
                asha.on_trial_result(None, named, {EPOCHS: epochs, VALUE: value})  # type: ignore[arg-type]
    return asha
