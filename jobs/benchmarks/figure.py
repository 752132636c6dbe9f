"""A benchmark's figure: the ratio of two things that were alternated in one run."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any


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

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, pair by pair."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def row(self) -> str:
        """One line of the table on screen."""
        ratios = self.ratios
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return (
            f"{self.name:<34} {statistics.median(ratios):6.3f}  [{min(ratios):.3f}, {max(ratios):.3f}]  "
            f"{self.target:<10} {ours:8.1f} / {theirs:8.1f} {self.unit}, {len(ratios)} pairs"
        )

    def document(self) -> dict[str, Any]:
        """The figure as plain data."""
        return {**asdict(self), "ratios": self.ratios, "median": statistics.median(self.ratios)}
