"""How the loop trains, in plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16", "fp64"]


@dataclass(frozen=True)
class Settings:
    """How long to train and what to keep; the config's `training` and `checkpoint`."""

    seed: int
    epochs: int
    precision: Precision = "fp32"
    clip_grad_norm: float | None = None
    freeze_epochs: int = 0
    ema_decay: float | None = None
    log_every: int = 10
    checkpoint_every_steps: int | None = None
    keep: int = 2
    validate_elsewhere: bool = False
    """Whether checkpoints are handed over to be validated, instead of validated between epochs."""
    validation_timeout_s: float = math.inf
    """Seconds without the result of a validation that was handed over, after which the training ends."""
