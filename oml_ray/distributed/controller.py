"""Callbacks of the Ray Train controller. Imports nothing heavy: workers wait for the controller."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback

from oml_ray.distributed.runtime.failures import final_error, translated
from oml_ray.errors import ProcessDiedError


class StopOnFinalError(UserCallback):
    """Callback that ends a training whose error no restart can mend: Ray's controller does not retry what it raises."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            cause = final_error(error)
            if cause is not None:
                raise cause


class StopOnFailedStarts(ControllerCallback):
    """Callback that ends a training whose workers die, time after time, before they begin.

    Ray Train 2.60 counts such starts apart from `max_failures`, and by default tries them without end.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures, self._failures = max_failures, 0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        name = type(current_state).__name__
        if name == "RunningState":
            self._failures = 0
        if name not in ("RestartingState", "ReschedulingState"):
            return
        error = getattr(current_state.training_failed_error, "controller_failure", None)
        if not isinstance(error, WorkerGroupStartupFailedError):
            return
        self._failures += 1
        if 0 <= self._max_failures < self._failures:
            work = "start of the training workers"
            raise translated(error, work) or ProcessDiedError(f"{work}: {' '.join(str(error).split())[:500]}")
