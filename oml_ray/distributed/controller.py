"""What the controller of Ray Train runs for us: light to import, as the workers wait for it to start."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from oml_ray.distributed.runtime.failures import user_error


class StopOnUserError(UserCallback):
    """Ends a training whose error no restart can mend: raising here is not retried by Ray's controller."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            found = user_error(error)
            if found is not None:
                raise found
