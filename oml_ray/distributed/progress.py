"""Progress: a bar with rate and time left in a terminal, a line now and then elsewhere; one line for each epoch."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oml_ray.redaction import redact
from oml_ray.retrieval.metrics.spread import SPREAD, collapse_warning

POLL_S = 0.5
LINE_EVERY_S = 30.0  # without a terminal


@ray.remote(num_cpus=0)
class Monitor:
    """Where training's rank 0 says how far it is, and the driver asks."""

    def __init__(self) -> None:
        self._current: dict[str, Any] | None = None
        self._finished: list[dict[str, Any]] = []
        self._stopping = False

    def progress(self, row: dict[str, Any]) -> None:
        """Replace the current state."""
        self._current = row

    def report(self, row: dict[str, Any]) -> None:
        """Add a row of the history."""
        self._finished.append(row)

    def stop(self) -> None:
        """Ask the training to checkpoint and end."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether it was asked."""
        return self._stopping

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Return the current state, and the rows since the last time."""
        finished, self._finished = self._finished, []
        return self._current, finished


def _bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _line(row: dict[str, Any], metric: str) -> str:
    """What one row of the history says."""
    if row["kind"] == "start":
        many = "s" if row["workers"] > 1 else ""
        return f"training on {row['workers']} worker{many}, from step {row['step']}"
    when = "before training" if row["epoch"] < 0 else f"epoch {row['epoch'] + 1}"
    if row["kind"] == "train":
        return f"{when}: loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s, {row['seconds']:.1f} s"
    return f"{when}: {metric} {row[metric]:.4f}"


class Interval:
    """A clock that says when the next line of progress is due, where no terminal shows a bar."""

    def __init__(self, *, is_terminal: bool) -> None:
        """Begin the first interval now."""
        self._is_terminal, self._since = is_terminal, monotonic()

    def is_due(self) -> bool:
        """Return whether an interval has passed; if so, the next one begins."""
        now = monotonic()
        if self._is_terminal or now - self._since < LINE_EVERY_S:
            return False
        self._since = now
        return True


def _time(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, the larger two of them.

    Example:
        >>> _time(59.6), _time(61), _time(7325)
        ('1 min 0 s', '1 min 1 s', '2 h 2 min')
    """
    minutes, left = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


class TrainingProgress:
    """What is shown of a training: rows of its history as lines, its present state in the bar or as a line."""

    def __init__(self, bar: Progress, metric: str) -> None:
        """Show a training in a bar of its own.

        Args:
            bar: where to; disabled without a terminal.
            metric: the score that is shown of a validation.
        """
        self._bar, self._metric, self._has_warned = bar, metric, False
        self._interval = Interval(is_terminal=not bar.disable)
        self._task = bar.add_task("starting workers", total=None, rate="")
        self._step = -1  # of the last line

    def show(self, current: dict[str, Any] | None, finished: Iterable[dict[str, Any]]) -> None:
        """Show the present state, and rows that have not been shown yet."""
        for row in finished:
            say(_line(row, self._metric))
            self._warn(row)
            self._step = row.get("step", self._step)
        if not current:
            return
        rate = f"{current['images_per_s']:.0f} images/s" if current["images_per_s"] else ""
        epoch, loss = f"epoch {current['epoch'] + 1}/{current['epochs']}", f"loss {current['loss']:.4f}"
        self._bar.update(
            self._task, completed=current["step"], total=current["steps"], description=f"{epoch}  {loss}", rate=rate
        )
        # States are sent now and then: the last one may be older than the last row.
        if current["step"] > self._step and self._interval.is_due():
            self._step = current["step"]
            left = f"{_time(current['left_s'])} left" if rate else ""
            facts = [f"{epoch}, step {self._step}/{current['steps']}: {loss}", rate, left]
            say(", ".join(filter(None, facts)))

    def _warn(self, row: dict[str, Any]) -> None:
        """Say once that a training has collapsed."""
        if row["kind"] != "validation" or row["epoch"] < 0 or self._has_warned or SPREAD not in row:
            return
        warning = collapse_warning(row[SPREAD])
        if warning is not None:
            self._has_warned = True
            say(f"# warning: {warning}")


@contextmanager
def watching(monitor: Any, metric: str) -> Iterator[threading.Event]:
    """Show a training's progress during the body of a `with`; a SIGTERM has it checkpoint and end, a second one kills.

    Yields:
        Whether a SIGTERM came.

    Raises:
        KeyboardInterrupt: it came, at the end of the body or after.
    """
    stopped, terminated = threading.Event(), threading.Event()
    bar = _bar()

    def show() -> None:
        progress.show(*ray.get(monitor.read.remote(), timeout=10))

    def poll() -> None:
        while not stopped.wait(POLL_S):
            with suppress(Exception):  # progress must never stop a training
                if terminated.is_set():
                    ray.get(monitor.stop.remote(), timeout=10)
                show()

    with bar, _first_sigterm(terminated):
        progress = TrainingProgress(bar, metric)
        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield terminated
        finally:
            stopped.set()
            thread.join(timeout=15)
            with suppress(Exception):
                show()
    if terminated.is_set():
        raise KeyboardInterrupt


@contextmanager
def _first_sigterm(terminated: threading.Event) -> Iterator[None]:
    """Set an event at the first SIGTERM during the body of a `with`; the next one does what it did before."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # as in a trial of a sweep: Python hears of none there
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: Any) -> None:
        terminated.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def counting(description: str, total: int, unit: str) -> Iterator[Any]:
    """Show a bar of `total` during the body of a `with`, or a line now and then without a terminal.

    Yields:
        What the body calls with the number done since the last call.
    """
    with _bar() as bar:
        task = bar.add_task(description, total=total, rate="")
        interval = Interval(is_terminal=not bar.disable)

        def advance(done: int) -> None:
            bar.advance(task, done)
            speed = bar.tasks[0].speed
            rate = f"{speed:.0f} {unit}/s" if speed else ""
            bar.update(task, rate=rate)
            if interval.is_due():
                say(f"{description}: {bar.tasks[0].completed:.0f}/{total} {unit}" + (f", {rate}" if rate else ""))

        yield advance


def say(text: str) -> None:
    """Print a line for people; credentials inside URIs are hidden."""
    print(redact(text), file=sys.stdout, flush=True)
