"""A benchmark's figure: the ratio of two things that were alternated in one run."""

from __future__ import annotations

import re
import statistics
from dataclasses import asdict, dataclass
from typing import Any

_TARGET = re.compile(r"([<>])=? (\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Figure:
    """Pairs of measurements and their ratio."""

    name: str
    target: str
    """What the ratio should be."""
    unit: str
    ours: list[float]
    theirs: list[float]
    notes: dict[str, Any]
    setting: str = ""
    """What both sides have in common, as a heading of the table."""
    reason: str = ""
    """Why there is no ratio, where a side could not be measured."""

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, pair by pair."""
        return [] if self.reason else [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def bound(self) -> tuple[float, bool] | None:
        """The ratio that the target names, and whether more is better; None where it names none."""
        found = _TARGET.fullmatch(self.target)
        return (float(found[2]), found[1] == ">") if found else None

    def row(self) -> str:
        """One line of the table on screen."""
        ratios = self.ratios
        sides = f"{_median(self.ours)} / {_median(self.theirs)} {self.unit}"
        if not ratios:
            return f"{self.name:<34} {'-':>6}  {self.target:<10} {sides}, {self.reason}"
        return (
            f"{self.name:<34} {statistics.median(ratios):6.3f}  [{min(ratios):.3f}, {max(ratios):.3f}]  "
            f"{self.target:<10} {sides}, {len(ratios)} pairs"
        )

    def document(self) -> dict[str, Any]:
        """The figure as plain data."""
        ratios = self.ratios
        return {**asdict(self), "ratios": ratios, "median": statistics.median(ratios) if ratios else None}


def _median(side: list[float]) -> str:
    """What a side took, in eight places."""
    if not side:
        return f"{'-':>8}"
    value = statistics.median(side)
    return f"{value:8.1f}" if abs(value) >= 10 else f"{value:8.3f}"
