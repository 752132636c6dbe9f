"""The record of a sweep: every trial, the values it was given, how it ended, and what its run has measured.

`trials.jsonl` holds a line for each start and each end; a trial is on it before anything of it runs. What a trial
measured stands in the history of its own run. Nothing else is needed to continue a sweep whose driver was killed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from oml_ray.config import SweepConfig
from oml_ray.config.space import Values
from oml_ray.data.filesystem import join
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.run_directory import History, RunDirectory

RECORD, FOLDER = "trials.jsonl", "trials"

State = Literal["running", "finished", "stopped", "failed"]
Point = tuple[int, float]
"""Epochs done, and the metric then."""


@dataclass
class Trial:
    """One training of a sweep."""

    name: str
    """Of its run."""
    values: Values
    """One for each entry of the space."""
    state: State = "running"
    """running: started, and not known to have ended; stopped: ended early by the scheduler."""
    reason: str | None = None
    """Why it failed."""
    curve: list[Point] = field(default_factory=list)
    """What its validations said, the one before training included."""

    def best(self, mode: str) -> Point | None:
        """The best of its validations after an epoch."""
        learned = [point for point in self.curve if point[0] > 0]
        sign = 1 if mode == "max" else -1
        return max(learned, key=lambda point: sign * point[1], default=None)


class Record:
    """All trials of a sweep, in the order in which they were drawn."""

    def __init__(self, run: RunDirectory, config: SweepConfig) -> None:
        """Continue the record of a sweep.

        Raises:
            StorageError: it cannot be read or written.
        """
        assert config.tune.metric is not None
        assert config.tune.mode is not None
        self.metric, self.mode = config.tune.metric, config.tune.mode
        self.storage = join(run.uri, FOLDER)
        self.trials: list[Trial] = []
        self._run = run
        self._lines = [json.loads(line) for line in (run.read_text(RECORD) or "").splitlines()]
        known: dict[str, Trial] = {}
        for line in self._lines:
            trial = known.setdefault(line["trial"], Trial(line["trial"], line.get("values", {})))
            trial.state, trial.reason = line["state"], line.get("reason")
        self.trials = list(known.values())
        for trial in self.trials:
            trial.curve = curve_of(self.run_of(trial), self.metric)

    def start(self, values: Values) -> Trial:
        """Add a trial."""
        trial = Trial(f"{len(self.trials):04d}", values)
        self.trials.append(trial)
        self._add({"trial": trial.name, "values": values, "state": trial.state})
        return trial

    def set(self, trial: Trial, state: State, reason: str | None = None) -> None:
        """Note that a trial has ended, or is run again."""
        trial.state, trial.reason = state, reason
        self._add({"trial": trial.name, "state": state, **({"reason": reason} if reason else {})})

    def run_of(self, trial: Trial) -> RunDirectory:
        """The run of a trial."""
        return RunDirectory(self.storage, trial.name)

    def unfinished(self) -> list[Trial]:
        """Trials that are to be run (again): those that did not end, and those that failed."""
        return [trial for trial in self.trials if trial.state in ("running", "failed")]

    def _add(self, line: dict[str, Any]) -> None:
        # Written whole each time: it is short, and a process that is killed meanwhile leaves the old or the new one.
        self._lines.append(line)
        self._run.write_text("".join(json.dumps(each) + "\n" for each in self._lines), RECORD)


def curve_of(run: RunDirectory, metric: str, until_step: int | None = None) -> list[Point]:
    """What the validations of a run said, up to a step."""
    rows = (row for row in History(run).rows if row["kind"] == "validation" and metric in row)
    return [(row["epoch"] + 1, row[metric]) for row in rows if until_step is None or row["step"] <= until_step]


def checkpoint_step(run: RunDirectory, pointer: str) -> int | None:
    """Step of the checkpoint that `best` or `last` names, None before the first.

    Raises:
        CheckpointError: the file names no checkpoint.
    """
    name = (run.read_text(checkpoints.FOLDER, pointer) or "").strip()
    return checkpoints.step_of(name) if name else None
