"""Weights & Biases: a run of a project there, or offline, in the run's own folder `wandb`."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from oml_ray.errors import ConfigError, reason_of
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.tracking.tracker import Ending, asking, identity

logger = logging.getLogger(__name__)

FOLDER, STEP = "wandb", "step"
KINDS = ("train", "validation", "evaluation")
INIT_S, FINISH_S, SETTLE_S = 30, 60, 5.0
MAX_PENDING = 1000
PLACE = ("W&B", " (WANDB_API_KEY says who you are, WANDB_MODE=offline keeps records in the run)")


class WandbTracker:
    """Hands points to W&B's own process, which sends them, from a thread: the training waits for neither.

    Points that come while `MAX_PENDING` calls wait, as when W&B does not answer for long, are left out with a warning.
    It ends with the process that started it: what it has not sent by then is missing there. When W&B does not answer at
    the start, or is not to be asked (WANDB_MODE=offline), the record stays in the run, and `wandb sync` sends it; W&B
    then cannot tell what it has, so points that a killed process recorded after its last checkpoint are there twice.
    """

    def __init__(
        self, run: RunDirectory, config: Mapping[str, Any], title: str, project: str, entity: str | None
    ) -> None:
        """Record a run; W&B is not asked yet.

        Args:
            run: which remembers its id there.
            config: of the run.
            title: name of the run in W&B.
            project: made if need be.
            entity: user or team; None: that of the key.

        Raises:
            ConfigError: the package is not installed.
        """
        settings = _package().Settings(
            silent=True, console="off", disable_git=True, init_timeout=INIT_S, finish_timeout=FINISH_S,
            finish_timeout_raises=True,
        )  # fmt: skip
        self._directory = run
        self._options = {
            "project": project, "entity": entity, "name": title, "id": identity(run), "resume": "allow",
            "config": dict(config), "allow_val_change": True, "dir": str(run.path()), "settings": settings,
        }  # fmt: skip
        self._there: Any = None
        self._last: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="wandb")
        self._pending: deque[Future[None]] = deque()
        self._is_late = self._has_dropped = False

    @staticmethod
    def check() -> None:
        """Find out early whether runs can be recorded.

        Raises:
            ConfigError, StorageError: they cannot.
        """
        wandb = _package()
        if os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
            with asking(*PLACE):
                wandb.login(verify=True)

    def points(self, values: Mapping[str, float], step: int, *, again: bool = False) -> None:
        """See `Tracker`."""
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if len(self._pending) < MAX_PENDING:
            self._pending.append(self._pool.submit(self._log, dict(values), step, again))
        elif not self._has_dropped:
            self._has_dropped = True
            logger.warning("tracking: W&B is too slow: points are left out from step %d on", step)

    def _log(self, values: Mapping[str, float], step: int, again: bool) -> None:
        opened, kind = self._opened(), next(iter(values)).partition("/")[0]
        if step > self._last[kind] and not (again and opened.offline):
            self._last[kind] = step
            opened.log({**values, f"{kind}/{STEP}": step})  # what it raises, as when its process died, ends here

    def _sent(self, seconds: float) -> bool:
        """Return whether all points are with W&B's process, waiting for those under way."""
        return not self._pending or not wait([self._pending[-1]], seconds).not_done

    def settle(self) -> None:
        """See `Tracker`."""
        self._is_late = not self._sent(0.0 if self._is_late else SETTLE_S)
        for record in self._directory.path(FOLDER).glob("offline-run-*"):
            self._directory.publish(FOLDER, record.name)

    def close(self) -> None:
        """See `Tracker`."""
        if self._sent(SETTLE_S if self._is_late else FINISH_S) and self._there is not None:
            with suppress(Exception):
                self._there.finish()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.settle()

    def end(self, how: Ending) -> None:
        """See `Tracker`: W&B sees for itself when a run crashed."""

    def finish(self, metrics: Mapping[str, float], texts: Mapping[str, str], checkpoint: Path) -> None:
        """See `Tracker`."""
        wandb = _package()
        with asking(*PLACE), tempfile.TemporaryDirectory() as folder:
            if not self._sent(FINISH_S):
                raise TimeoutError(f"it took no points for {FINISH_S} seconds")
            opened = self._opened()
            opened.summary.update(dict(metrics))
            for name, text in texts.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            for kind, path in (("results", folder), ("checkpoint", str(checkpoint))):
                artifact = wandb.Artifact(f"{kind}-{opened.id}", type=kind)
                artifact.add_dir(path)
                opened.log_artifact(artifact)
            opened.finish()
        self.settle()

    def _opened(self) -> Any:
        """W&B's run, whose record begins or is continued."""
        if self._there is None:
            wandb = _package()
            try:
                self._there = wandb.init(**self._options)
            except Exception:  # a training does not end because W&B is down
                self._there = wandb.init(**self._options, mode="offline")
            for kind in KINDS:  # a validation elsewhere tells of an earlier step than the training
                self._there.define_metric(f"{kind}/*", step_metric=f"{kind}/{STEP}")
            self._last = {kind: int(self._there.summary.get(f"{kind}/{STEP}", -1)) for kind in KINDS}
        return self._there


def _package() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"tracking: wandb needs packages that cannot be imported ({reason_of(error)}): "
            "pip install 'oml_ray[wandb]'."
        ) from None
    return wandb
