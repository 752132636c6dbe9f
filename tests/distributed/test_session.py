"""A Ray session of this process, and how it answers a SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable

import pytest
import ray

from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import _interrupt, session


def test_a_sigterm_cannot_break_the_end_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    shutdown: Callable[[], None] = ray.shutdown

    def asked_to_end_meanwhile() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        shutdown()

    monkeypatch.setattr(ray, "shutdown", asked_to_end_meanwhile)
    with session(Needs(1, 0, "tests")), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_an_interrupted_start_left_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(**options: object) -> None:
        calls.append("init")
        raise SystemExit

    monkeypatch.setattr(ray, "init", interrupted)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    with pytest.raises(SystemExit), session(Needs(1, 0, "tests")):
        raise AssertionError("there is no session")
    assert calls == ["init", "shutdown"]


class Thing:
    """It has weak references, as those of a WeakSet, whose callback has this name."""


class Ending(Thing):
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def _remove(reference: object) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("kind", [Thing, Ending])
def test_a_sigterm_where_python_would_pass_over_it_is_answered_after(kind: type[Thing]) -> None:
    things = [kind()]
    reference = weakref.ref(things[0], _remove if kind is Thing else None)

    def end_it_and_wait() -> None:
        things.clear()
        assert reference() is None
        threading.Event().wait(60)

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            end_it_and_wait()
    finally:
        signal.signal(signal.SIGTERM, before)
