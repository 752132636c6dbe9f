"""Timings: everything that takes time, under one name each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """Sums and counts of named durations.

    Example:
        >>> timings = Timings()
        >>> with timings.measure("train/step"):
        ...     pass
        >>> sorted(timings.flush()["train/step"])
        ['count', 'total_s']
    """

    def __init__(self) -> None:
        self._total: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def add(self, name: str, seconds: float) -> None:
        """Count one duration."""
        self._total[name] = self._total.get(name, 0.0) + seconds
        self._count[name] = self._count.get(name, 0) + 1

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the body of a `with`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def flush(self) -> dict[str, dict[str, float]]:
        """Return what was counted, and start anew."""
        result = {name: {"total_s": round(total, 6), "count": self._count[name]} for name, total in self._total.items()}
        self._total.clear()
        self._count.clear()
        return result
