"""What rank 0 writes beside checkpoints: the history, and the same as TensorBoard events and for trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from oml_ray.errors import StorageError, reason_of
from oml_ray.storage.retries import is_transient, logger, retried
from oml_ray.training.run_directory import History, RunDirectory
from oml_ray.training.tracking import Tracker

EVENTS = "tensorboard"
PLACE = ("kind", "epoch", "step", "seconds", "timings")


class Records:
    """The records of a run, continued."""

    def __init__(self, run: RunDirectory, *, until_step: int | None = None, trackers: Sequence[Tracker] = ()) -> None:
        """Open them.

        Args:
            run: the run.
            until_step: forget what a killed process wrote after this global step, -1: everything; None: nothing.
            trackers: hear of it too.
        """
        self._run, self._trackers = run, trackers
        self.history = History(run)
        if until_step is not None:
            self.history.rewind(until_step)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and of use to one rank alone

        purge_step = None if until_step is None else until_step + 1
        self._open_events = partial(SummaryWriter, str(run.path(EVENTS)))
        with self._writing():
            self._events = retried(lambda: self._open_events(purge_step=purge_step), run.path(EVENTS))
        for row in self.history.rows:  # which a process that was killed may have told nobody
            if row.get("kind") == "validation":
                points = _points("validation", _scores(row))
                for tracker in trackers:
                    tracker.points(points, row["step"], again=True)

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Add events."""
        points = _points(kind, values)
        with self._writing():
            for name, value in points.items():
                self._events.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.points(points, step)

    def scores(self, row: Mapping[str, Any]) -> None:
        """Add the events of a validation's row."""
        self.scalars("validation", _scores(row), row["step"])

    def settle(self) -> None:
        """Have trackers keep what they were told, before a checkpoint says that it was."""
        for tracker in self._trackers:
            tracker.settle()

    def publish(self) -> None:
        """Upload, where the run lies behind a URI."""
        with self._writing():
            self._events.flush()
        self._run.publish(EVENTS)
        self.history.publish()

    def close(self) -> None:
        """End the events."""
        with self._writing():
            self._events.close()
        self._run.publish(EVENTS)
        for tracker in self._trackers:
            tracker.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        path = self._run.path(EVENTS)
        try:
            yield
        except OSError as error:  # also of earlier events: a thread writes them
            if is_transient(error):  # the history has all that these events show: a gap in them is no reason to end
                logger.warning("%s: %s; events since the last checkpoint may be lost", path, reason_of(error))
                self._events = retried(self._open_events, path)
                return
            raise StorageError(f"{path} cannot be written: {reason_of(error)}.") from None


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in PLACE}


def _points(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {f"{kind}/{name}": float(value) for name, value in values.items()}
