"""What a SIGTERM does while a training is watched."""

from __future__ import annotations

import signal
import threading

import pytest

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
