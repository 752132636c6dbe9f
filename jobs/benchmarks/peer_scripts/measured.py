"""What the scripts share: their options, limits and warm-up, and the line of JSON that tells what was measured.

They run in the interpreter of the library that they measure, so nothing here needs more than the standard library.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.benchmarks.processes import MIB, peak_above_idle

REPEATS = 50

Checked = dict[str, float]


def options() -> dict[str, Any]:
    """The script's only argument."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def limit_memory(mib: int) -> None:
    """Let this process map so many MiB more than it does now: what imports map is not the work's."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + mib * MIB, hard))


def report(works: Mapping[str, Callable[[], Checked]]) -> None:
    """Do long works once each, and print their seconds, the peak memory of all and their results."""
    seconds: dict[str, float] = {}
    checked: Checked = {}

    def timed() -> None:
        for name, work in works.items():
            start = time.perf_counter()
            checked.update(work())
            seconds[name] = time.perf_counter() - start

    peak = peak_above_idle(timed)
    _print(seconds, peak, checked)


def report_short(works: Mapping[str, Callable[[], object]], checked: Checked, repeats: int = REPEATS) -> None:
    """Do short works in turns, many times, and print the median seconds of each; their results are known already."""
    taken: dict[str, list[float]] = {name: [] for name in works}

    def repeated() -> None:
        for _ in range(repeats):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                taken[name].append(time.perf_counter() - start)

    peak = peak_above_idle(repeated)
    _print({name: statistics.median(seconds) for name, seconds in taken.items()}, peak, checked)


def _print(seconds: Mapping[str, float], peak: float, checked: Checked) -> None:
    print(json.dumps({"seconds": seconds, "peak": peak, "checked": checked}), flush=True)
