"""Progress: rows done, rate and time left in a terminal; one line for each epoch elsewhere."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oml_ray.redaction import redact

POLL_S = 0.5


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
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
        current, finished = ray.get(monitor.read.remote(), timeout=10)
        for row in finished:
            say(_line(row, metric))
        if current:
            rate = f"{current['images_per_s']:.0f} images/s" if current["images_per_s"] else ""
            description = f"epoch {current['epoch'] + 1}/{current['epochs']}  loss {current['loss']:.4f}"
            bar.update(task, completed=current["step"], total=current["steps"], description=description, rate=rate)

    def poll() -> None:
        while not stopped.wait(POLL_S):
            with suppress(Exception):  # progress must never stop a training
                if terminated.is_set():
                    ray.get(monitor.stop.remote(), timeout=10)
                show()

    with bar, _first_sigterm(terminated):
        task = bar.add_task("starting workers", total=None, rate="")
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
    """Show a bar of `total` during the body of a `with`; the body calls what it gets with the number done."""
    with _bar() as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(done: int) -> None:
            bar.advance(task, done)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:.0f} {unit}/s" if speed else "")

        yield advance


def say(text: str) -> None:
    """Print a line for people; credentials inside URIs are hidden."""
    print(redact(text), file=sys.stdout, flush=True)
