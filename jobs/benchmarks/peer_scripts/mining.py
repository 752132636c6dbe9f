"""Miners, and miners with their triplet loss, forth and back, on one batch; of any library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from jobs.benchmarks.peer_scripts.measured import Checked, options, report_short

MARGIN = 0.2
N_HARD = (3, 10)  # positives, negatives

Mined = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Mining:
    """A miner, and what is done with it."""

    mine: Callable[[Tensor, Tensor], object]
    """Embeddings (B, D), labels (B,) -> what the miner returns."""
    triplets: Callable[[Tensor, Tensor], Mined]
    """Embeddings, labels -> the embeddings (T, D) of anchors, positives and negatives."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Embeddings, labels -> the mean triplet loss."""


def main(minings: Mapping[str, Mining]) -> None:
    """Measure miners by name."""
    given = options()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(given["n_labels"]).repeat_interleave(given["n_instances"])
    points = torch.randn(len(labels), given["dim"], generator=generator)
    embeddings = nn.functional.normalize(points, dim=1).requires_grad_()
    works: dict[str, Callable[[], object]] = {}
    checked: Checked = {}
    for name, mining in minings.items():
        works[name] = partial(mining.mine, embeddings.detach(), labels)
        works[f"{name} + loss"] = partial(_learn, mining.loss, embeddings, labels)
        anchors, positives, negatives = mining.triplets(embeddings.detach(), labels)
        checked[f"{name}, triplets"] = len(anchors)
        checked[f"{name}, to positives"] = float((anchors - positives).norm(dim=1).mean())
        checked[f"{name}, to negatives"] = float((anchors - negatives).norm(dim=1).mean())
        checked[f"{name}, loss"] = float(mining.loss(embeddings, labels).detach())
    for work in works.values():
        work()
    report_short(works, checked)


def _learn(loss: Callable[[Tensor, Tensor], Tensor], embeddings: Tensor, labels: Tensor) -> None:
    torch.autograd.backward(loss(embeddings, labels))
