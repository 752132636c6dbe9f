"""The exponential moving average of an extractor's weights, which often retrieves better than the last weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

WARMUP_DELAY = 10


class WeightAverage:
    """Follows an extractor with an average of its weights over the steps.

    After step t = 1, 2, ...: average = decay_t * average + (1 - decay_t) * weights, with decay_t = decay, or with
    warm-up min(decay, (1 + t) / (10 + t)), so that the random first weights are soon forgotten. Float buffers (batch
    statistics) are averaged like parameters, since they have to suit the averaged weights; integer ones (counters) are
    copied. No process has to hear of another: with equal weights on all ranks the averages are equal too. Only batch
    statistics differ between ranks, in the average as in the extractor, and have to be made equal before both are used.
    Source: Polyak & Juditsky 1992; Tarvainen & Valpola 2017, "Mean teachers are better role models".

    Attributes:
        averaged: the averaged extractor, in evaluation mode, without gradients: embed and validate with it, and store
            its `state_dict()` as the weights of an extractor.

    Example:
        >>> extractor = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(extractor, decay=0.75, warmup=False)
        >>> _ = nn.init.constant_(average.averaged.weight, 0.0), nn.init.constant_(extractor.weight, 1.0)
        >>> average.update()
        >>> average.averaged.weight
        Parameter containing:
        tensor([[0.2500]])
    """

    def __init__(self, extractor: nn.Module, *, decay: float, warmup: bool) -> None:
        """Start the average at the present weights.

        Args:
            extractor: what to follow; on its device and in its dtype already.
            decay: share of the old average that a step keeps, in [0, 1).
            warmup: begin with smaller decays.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), found {decay}.")
        self.extractor, self.decay, self.warmup = extractor, decay, warmup
        self.averaged = copy.deepcopy(extractor).eval().requires_grad_(False)
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the extractor's present weights in: once after each step of the optimizer."""
        self.num_updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (WARMUP_DELAY + self.num_updates))
        averages, present = _tensors(self.averaged), _tensors(self.extractor)
        floats = [index for index, tensor in enumerate(averages) if tensor.is_floating_point()]
        others = [index for index, tensor in enumerate(averages) if not tensor.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floats], [present[i] for i in floats], 1 - decay)
        if others:
            torch._foreach_copy_([averages[i] for i in others], [present[i] for i in others])

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint has to keep: tensors and plain values."""
        return {"num_updates": self.num_updates, "averaged": dict(self.averaged.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            RuntimeError: it is of another architecture.
        """
        self.averaged.load_state_dict(state["averaged"])
        self.num_updates = state["num_updates"]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
