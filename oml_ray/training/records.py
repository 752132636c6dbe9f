"""What rank 0 writes beside checkpoints: the history, and the same as TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from oml_ray.training.run_directory import History, RunDirectory

EVENTS = "tensorboard"
PLACE = ("kind", "epoch", "step", "seconds", "timings")


class Records:
    """The records of a run, continued."""

    def __init__(self, run: RunDirectory, *, until_step: int | None = None) -> None:
        """Open them.

        Args:
            run: the run.
            until_step: forget what a killed process wrote after this global step, -1: everything; None: nothing.
        """
        self._run = run
        self.history = History(run)
        if until_step is not None:
            self.history.rewind(until_step)
        purge_step = None if until_step is None else until_step + 1
        self._events = SummaryWriter(str(run.path(EVENTS)), purge_step=purge_step)

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Add events."""
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", float(value), step)

    def scores(self, row: Mapping[str, Any]) -> None:
        """Add the events of a validation's row."""
        self.scalars("validation", {name: value for name, value in row.items() if name not in PLACE}, row["step"])

    def publish(self) -> None:
        """Upload, where the run lies behind a URI."""
        self._events.flush()
        self._run.publish(EVENTS)
        self.history.publish()

    def close(self) -> None:
        """End the events."""
        self._events.close()
        self._run.publish(EVENTS)
