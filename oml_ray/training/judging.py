"""When a run is validated, and which of its checkpoints is the best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Judging:
    """The rules of a run's validations."""

    steps_per_epoch: int
    epochs: int
    every: int = 1
    """Epochs between two validations, the last of which is always validated; 0: none."""
    at_start: bool = True
    """Whether it is validated before its first step."""
    metric: str = "cmc.1"
    mode: Literal["max", "min"] = "max"

    def is_due(self, step: int) -> bool:
        """Whether the run is validated at a global step.

        Example:
            >>> judging = Judging(steps_per_epoch=10, epochs=5, every=2)
            >>> [step for step in range(51) if judging.is_due(step)]
            [0, 20, 40, 50]
        """
        epoch, inside = divmod(step, self.steps_per_epoch)
        if step == 0:
            return self.at_start
        return self.every > 0 and not inside and (epoch % self.every == 0 or epoch == self.epochs)

    def is_best(self, value: float, others: Iterable[float]) -> bool:
        """Whether a value of the metric is better than all earlier ones."""
        sign = 1 if self.mode == "max" else -1
        return all(sign * value > sign * other for other in others)
