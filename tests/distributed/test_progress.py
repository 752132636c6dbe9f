"""Progress of a training and of counted work: lines without a terminal, warnings, and what a SIGTERM does."""

from __future__ import annotations

import io
import signal
import threading
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from oml_ray.distributed import progress


def test_a_sigterm_is_heard_to_the_end_of_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedToEndMeanwhile(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            signal.raise_signal(signal.SIGTERM)
            super().join(timeout)

    monkeypatch.setattr(progress.threading, "Thread", AskedToEndMeanwhile)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), progress.watching(None, "cmc.1") as terminated:
        assert not terminated.is_set()
    assert terminated.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def state(step: int) -> dict[str, Any]:
    return {"epoch": 0, "epochs": 2, "step": step, "steps": 40, "loss": 0.25, "images_per_s": 99.6, "left_s": 61.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def bar(*, is_terminal: bool) -> Progress:
    return Progress(disable=not is_terminal, console=Console(file=io.StringIO()))


def test_a_line_is_told_every_interval_without_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress.TrainingProgress(bar(is_terminal=False), "cmc.1")
    for second in range(0, 100):
        clock[0] = float(second)
        shown.show(state(min(second, 65)), [])
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2, step 30/40: loss 0.2500, 100 images/s, 1 min 1 s left",
        "epoch 1/2, step 60/40: loss 0.2500, 100 images/s, 1 min 1 s left",
        "epoch 1/2, step 65/40: loss 0.2500, 100 images/s, 1 min 1 s left",
    ]


def test_a_terminal_shows_the_bar_alone(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.TrainingProgress(bar(is_terminal=True), "cmc.1")
    for step in (1, 2):
        clock[0] += 100
        shown.show(state(step), [])
    assert capsys.readouterr().out == ""


def test_nothing_is_told_before_the_first_step(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.TrainingProgress(bar(is_terminal=False), "cmc.1")
    clock[0] = 1000.0
    shown.show(None, [])
    assert capsys.readouterr().out == ""
    shown.show(state(1), [])
    assert capsys.readouterr().out.startswith("epoch 1/2, step 1/40: ")


def test_a_state_older_than_the_last_row_is_not_told(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.TrainingProgress(bar(is_terminal=False), "cmc.1")
    epoch = {"kind": "train", "epoch": 0, "step": 20, "loss": 0.5, "images_per_s": 10.0, "seconds": 2.0}
    clock[0] = 100.0
    shown.show(state(1), [epoch])
    assert capsys.readouterr().out == "epoch 1: loss 0.5000, 10 images/s, 2.0 s\n"
    clock[0] = 200.0
    shown.show(state(20), [])
    assert capsys.readouterr().out == ""
    shown.show(state(21), [])
    assert capsys.readouterr().out.startswith("epoch 1/2, step 21/40: ")


def validation_row(epoch: int, **scores: float) -> dict[str, Any]:
    return {"kind": "validation", "epoch": epoch, "step": 4, "cmc.1": 0.5, **scores}


def test_a_collapse_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.TrainingProgress(bar(is_terminal=False), "cmc.1")
    # An untrained network may give embeddings that are alike; a model that judges pairs gives none.
    shown.show(None, [validation_row(-1, spread=1e-6), validation_row(0, spread=0.5), validation_row(1)])
    assert "collapsed" not in capsys.readouterr().out
    shown.show(None, [validation_row(2, spread=1e-5), validation_row(3, spread=1e-6)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("# warning: the embeddings have collapsed") for line in lines] == [False, True, False]


def test_counting_tells_a_line_every_interval_without_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.counting("embedding", 100, "images") as done:
        for second in range(1, 101):
            clock[0] = float(second)
            done(1)
    assert [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "embedding: 30/100 images", "embedding: 60/100 images", "embedding: 90/100 images",
    ]  # fmt: skip
