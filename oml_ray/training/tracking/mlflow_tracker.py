"""MLflow: a run of an experiment on a tracking server, or in a SQLite file of this machine."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from oml_ray.errors import ConfigError, reason_of
from oml_ray.redaction import redact
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.tracking.tracker import Ending, asking, flat, identity

UNSENT = "mlflow_unsent.json"
TAG = "oml_ray.id"
SEND_EVERY_S, SETTLE_S = 5.0, 5.0
POINTS_AT_ONCE, PARAMS_AT_ONCE, LONGEST_KEY = 1000, 100, 250  # the server refuses more
SQLITE = "sqlite:///"
SETTINGS = {
    # Its own numbers would hold a process up for many minutes when the server is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class _Point(NamedTuple):
    name: str
    value: float
    step: int
    milliseconds: int


class MlflowTracker:
    """Sends points from a thread, so that a slow or absent server does not hold the training up.

    What was not sent when the run was checkpointed is kept in it, and sent by whoever opens it next. What MLflow has of
    a curve it is not told again.
    """

    def __init__(
        self, run: RunDirectory, config: Mapping[str, Any], title: str, uri: str | None, experiment: str
    ) -> None:
        """Record a run; MLflow is not asked yet.

        Args:
            run: which remembers its id there.
            config: of the run.
            title: name of the run in MLflow.
            uri: of the tracking server, or of a SQLite file; None: what MLFLOW_TRACKING_URI says.
            experiment: made if need be.

        Raises:
            ConfigError: there can be no such place.
        """
        self._run, self._config, self._title, self._experiment = run, config, title, experiment
        self._uri, self._id = _checked(uri), identity(run)
        self._there: tuple[Any, str] | None = None
        self._known: dict[str, set[int]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sending: tuple[int, Future[None]] | None = None
        self._sent_at, self._is_down = -SEND_EVERY_S, False
        self._points = [_Point(*point) for point in json.loads(run.read_text(UNSENT) or "[]")]

    @staticmethod
    def check(uri: str | None) -> None:
        """Find out early whether runs can be recorded there.

        Raises:
            ConfigError, StorageError: they cannot.
        """
        uri = _checked(uri)
        with asking(f"MLflow at {uri}"):
            _client(uri).search_experiments(max_results=1)

    def points(self, values: Mapping[str, float], step: int, *, again: bool = False) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        self._points += [_Point(name, value, step, now) for name, value in values.items()]
        self._send(SEND_EVERY_S)

    def settle(self) -> None:
        """See `Tracker`."""
        if not self._is_down:
            self._landed(SETTLE_S)
            self._send(0.0)
            self._landed(SETTLE_S)
        self._keep()

    def close(self) -> None:
        """See `Tracker`: what cannot be sent is left to the next process."""
        self.settle()
        self._pool.shutdown(wait=False)

    def end(self, how: Ending) -> None:
        """See `Tracker`."""
        with suppress(Exception):
            client, run_id = self._opened()
            client.set_terminated(run_id, how)

    def finish(self, metrics: Mapping[str, float], texts: Mapping[str, str], checkpoint: Path) -> None:
        """See `Tracker`."""
        self.points(metrics, 0)
        self._pool.shutdown(wait=True)
        self._landed(0.0)
        with asking(f"MLflow at {self._uri}"):
            self._log(self._points)
            self._points.clear()
            self._keep()
            client, run_id = self._opened()
            for name, text in texts.items():
                client.log_text(run_id, text, name)
            client.log_artifacts(run_id, str(checkpoint), "checkpoint")
            client.set_terminated(run_id, "FINISHED")

    def _send(self, every_s: float) -> None:
        self._landed(0.0)
        if self._sending is None and self._points and time.monotonic() - self._sent_at >= every_s:
            self._sent_at = time.monotonic()
            self._sending = len(self._points), self._pool.submit(self._log, list(self._points))

    def _landed(self, seconds: float) -> None:
        """Forget the points that are sent, waiting for those under way."""
        if self._sending is None:
            return
        number, sending = self._sending
        wait([sending], seconds)
        if not sending.done():
            self._is_down = self._is_down or seconds > 0
            return
        self._sending, self._is_down = None, sending.exception() is not None
        if not self._is_down:
            del self._points[:number]

    def _keep(self) -> None:
        """Keep in the run what is not sent."""
        if self._points:
            self._run.write_text(json.dumps(self._points), UNSENT)
        else:
            self._run.remove(UNSENT)

    def _log(self, points: Sequence[_Point]) -> None:
        from mlflow.entities import Metric

        client, run_id = self._opened()
        first_told = {(point.name, point.step): point for point in reversed(points)}  # at a restart, some twice
        new = [point for (name, step), point in first_told.items() if step not in self._steps(name)]
        for first in range(0, len(new), POINTS_AT_ONCE):
            some = new[first : first + POINTS_AT_ONCE]
            metrics = [Metric(point.name, point.value, point.milliseconds, point.step) for point in some]
            client.log_batch(run_id, metrics=metrics)
            for point in some:
                self._known[point.name].add(point.step)

    def _steps(self, name: str) -> set[int]:
        """Steps of a curve that MLflow has."""
        if name not in self._known:
            client, run_id = self._opened()
            self._known[name] = {point.step for point in client.get_metric_history(run_id, name)}
        return self._known[name]

    def _opened(self) -> tuple[Any, str]:
        """MLflow's client, and its id of the run, whose record begins or is continued."""
        if self._there is None:
            from mlflow.entities import Param

            client = _client(self._uri)
            experiment = self._experiment_in(client)
            found = client.search_runs([experiment], f"tags.`{TAG}` = '{self._id}'", max_results=1)
            tags = {TAG: self._id, "oml_ray.run": redact(self._run.uri)}
            run = found[0] if found else client.create_run(experiment, run_name=self._title, tags=tags)
            client.update_run(run.info.run_id, status="RUNNING")
            params = [
                Param(re.sub(r"[^\w\-./ ]", "_", key)[:LONGEST_KEY], str(value))
                for key, value in flat(dict(self._config)).items()
                if key not in run.data.params
            ]
            for first in range(0, len(params), PARAMS_AT_ONCE):
                client.log_batch(run.info.run_id, params=params[first : first + PARAMS_AT_ONCE])
            self._there = client, run.info.run_id
        return self._there

    def _experiment_in(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            place = None
            if self._uri.startswith(SQLITE):  # beside the file, not wherever this process happens to be
                place = (Path(self._uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
            try:
                return str(client.create_experiment(self._experiment, place))
            except Exception:
                found = client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        return str(found.experiment_id)  # another process may have made it meanwhile


def _checked(uri: str | None) -> str:
    """The place of the records.

    Raises:
        ConfigError: it cannot be one.
    """
    try:
        holds_user = "@" in urlsplit(uri or "").netloc
    except ValueError:
        holds_user, uri = False, f"{uri} (no URI)"
    if holds_user:
        raise ConfigError(
            "tracking: the uri of mlflow holds a user or a password, but configs are kept with runs and shown: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in place of it."
        )
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise ConfigError(
            "tracking: mlflow has no uri, and MLFLOW_TRACKING_URI is not set: give it one, such as http://host:5000 or "
            "sqlite:////home/me/mlflow.db."
        )
    if not re.match(r"https?://[^ ]+$|databricks|sqlite:////", uri):
        raise ConfigError(
            f"tracking: mlflow at {uri}: should be the URI of a server (http://host:5000, databricks) or of a "
            "SQLite file by its absolute path (sqlite:////home/me/mlflow.db, with four slashes): processes run in "
            "several folders."
        )
    return uri


def _client(uri: str) -> Any:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError(
            f"tracking: mlflow needs packages that cannot be imported ({reason_of(error)}): "
            "pip install 'oml_ray[mlflow]'."
        ) from None
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return MlflowClient(uri)
