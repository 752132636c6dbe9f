"""Sides of a comparison: scripts, each in the interpreter of its library, that print what they measured as JSON.

Each measurement is a fresh process, so memory is that of the work alone, and no side waits with its own held.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.benchmarks.figure import Figure
from jobs.benchmarks.images import images_of

THREADS = 2
TIME_LIMIT_S = 600.0
MEMORY_LIMIT_MIB = 8 * 1024
SAID_LINES = 15  # of a script's last words

_ROOT = Path(__file__).parents[2]
_OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|[Cc]an(no|')t allocate memory|Unable to allocate")


@dataclass(frozen=True)
class Asked:
    """What a part of the suite is asked for."""

    python: str
    """The peers' interpreter."""
    folder: Path
    """For its files."""
    rounds: int
    scale: float
    """Of the numbers of rows and images."""
    table: str | None
    """Of images; None for the generated figures."""
    root: str | None
    """What its paths are relative to; None for its folder."""

    def images(self) -> tuple[str, str]:
        """Path of a table of images, and what its paths are relative to."""
        return images_of(self.table, self.root, self.folder)


@dataclass(frozen=True)
class Side:
    """What measures one side."""

    name: str
    script: str
    """A module of jobs.benchmarks.peer_scripts."""
    options: Mapping[str, Any]
    """Its only argument, as JSON."""
    python: str = sys.executable
    """Its interpreter."""


@dataclass(frozen=True)
class Measured:
    """What a script printed."""

    seconds: dict[str, float]
    """Of each work."""
    peak: float
    """MiB above what its process takes when it is warm."""
    checked: dict[str, float]
    """Results that both sides must share."""


@dataclass
class Outcome:
    """The measurements of one side, one a round, or why there are none."""

    measured: list[Measured] = field(default_factory=list)
    reason: str = ""


class UnmeasuredError(Exception):
    """A side that cannot be measured within the limits; its message is the reason."""


def measure(side: Side, time_limit_s: float = TIME_LIMIT_S) -> Measured:
    """Run a side's script once.

    Raises:
        UnmeasuredError: it reached a limit.
        RuntimeError: it failed otherwise.
    """
    command = [side.python, "-m", f"jobs.benchmarks.peer_scripts.{side.script}", json.dumps(side.options)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(THREADS))
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            written, said = process.communicate(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            raise UnmeasuredError(f"more than {time_limit_s:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == -signal.SIGKILL or (process.returncode and _OUT_OF_MEMORY.search(said)):
        raise UnmeasuredError(f"out of memory at {MEMORY_LIMIT_MIB // 1024} GiB")
    if process.returncode:
        last = "\n".join(said.strip().splitlines()[-SAID_LINES:])
        raise RuntimeError(f"{side.name}: {side.script} ended with status {process.returncode}:\n{last}")
    return parsed(side, written)


def parsed(side: Side, written: str) -> Measured:
    """What a script measured: the last JSON object of its output, before and after which libraries may print.

    Raises:
        RuntimeError: there is none, or it says something else.
    """
    lines = written.strip().splitlines()
    line = next((line for line in reversed(lines) if line.startswith("{")), "\n".join(lines[-SAID_LINES:]))
    try:
        return Measured(**json.loads(line))
    except (ValueError, TypeError):
        raise RuntimeError(f"{side.name}: {side.script} printed no measurement, but {line!r}.") from None


def alternated(sides: Sequence[Side], rounds: int) -> dict[str, Outcome]:
    """Measure each side once in each round; one that reached a limit is not tried again.

    Returns:
        By name of the side.
    """
    found = {side.name: Outcome() for side in sides}
    for _ in range(rounds):
        for side in sides:
            outcome = found[side.name]
            if not outcome.reason:
                try:
                    outcome.measured.append(measure(side))
                except UnmeasuredError as reason:
                    outcome.measured, outcome.reason = [], f"{side.name}: {reason}"
    return found


def compared(
    name: str,
    target: str,
    unit: str,
    ours: Outcome,
    theirs: Outcome,
    value: Callable[[Measured], float],
    *,
    setting: str,
    tolerance: float,
) -> Figure:
    """The figure of two sides.

    Args:
        name: of the figure.
        target: what the ratio should be.
        unit: of the values.
        ours: one side.
        theirs: the other.
        value: what of a measurement is compared.
        setting: what both sides share, for the table.
        tolerance: how far apart their results may be.

    Raises:
        RuntimeError: their results are farther apart, so a ratio of the two would say nothing.
    """
    reason = "; ".join(outcome.reason for outcome in (ours, theirs) if outcome.reason)
    notes: dict[str, Any] = {"threads": THREADS}
    for side, outcome in (("ours", ours), ("theirs", theirs)):
        if outcome.measured:
            notes[side] = outcome.measured[0].checked
    for one, other in zip(ours.measured, theirs.measured, strict=False):  # a side without measurements has a reason
        shared = one.checked.keys() & other.checked.keys()
        differing = sorted(key for key in shared if abs(one.checked[key] - other.checked[key]) > tolerance)
        if differing or not shared:
            raise RuntimeError(f"{name}: the sides computed different things: {one.checked} and {other.checked}.")
    one_side, other_side = ([value(measured) for measured in outcome.measured] for outcome in (ours, theirs))
    return Figure(name, target, unit, one_side, other_side, notes, setting, reason)
