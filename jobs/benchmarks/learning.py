"""What mining and losses cost, against one `torch.cdist`, forward and backward, of the same batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jobs.benchmarks.figure import Figure
from oml_ray.learning.bank import Bank, BankedCriterion
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import AllTriplets, HardTriplets, NHardTriplets

DIM = 384
BATCH = 2048

Step = Callable[[], None]


def suite(*, table: str | None, root: str | None, rounds: int) -> list[Figure]:
    """Measure the criteria on random unit embeddings; `table` and `root` are not looked at.

    Args:
        table: ignored.
        root: ignored.
        rounds: alternations.
    """
    hard = TripletLoss(HardTriplets(), margin=0.2)
    n_hard = TripletLoss(NHardTriplets(3, 10), margin=0.2)
    with_margin, soft = TripletLoss(AllTriplets(), margin=0.2), TripletLoss(AllTriplets(), margin=None)
    return [
        _against_cdist("hard", "<= 0.8", hard, BATCH, 4, rounds),
        _against_cdist("n_hard(3, 10)", "<= 2", n_hard, BATCH, 4, rounds),
        _against_cdist("all triplets", "<= 4", with_margin, BATCH, 4, rounds),
        _against_cdist("all triplets", "<= 4", with_margin, BATCH, 64, rounds),
        _against_cdist("all triplets, soft", "-", soft, BATCH, 4, rounds),
        _against_cdist("all triplets", "runs", with_margin, 8192, 4, max(1, rounds // 3)),
        _bank(rounds),
    ]


def _against_cdist(name: str, target: str, criterion: nn.Module, batch: int, instances: int, rounds: int) -> Figure:
    embeddings, labels = _batch(batch, instances)

    def ours() -> None:
        torch.autograd.backward(criterion(embeddings, labels)[0])

    def theirs() -> None:
        torch.autograd.backward(torch.cdist(embeddings, embeddings).sum())

    return _figure(f"{name}, B = {batch}, K = {instances}", target, ours, theirs, rounds)


def _bank(rounds: int) -> Figure:
    batch, instances, batches = 128, 4, 16
    embeddings, labels = _batch(batch, instances)
    plain = TripletLoss(HardTriplets(), margin=0.2)
    banked = BankedCriterion(plain, Bank(batches))
    for _ in range(batches):
        banked(embeddings, labels)

    def ours() -> None:
        for _ in range(20):
            torch.autograd.backward(banked(embeddings, labels)[0])

    def theirs() -> None:
        for _ in range(20):
            torch.autograd.backward(plain(embeddings, labels)[0])

    return _figure(f"bank of {batches} batches, hard, B = {batch}", "-", ours, theirs, rounds)


def _batch(batch: int, instances: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = nn.functional.normalize(torch.randn(batch, DIM, generator=generator), dim=1).requires_grad_()
    return embeddings, torch.arange(batch) // instances


def _figure(name: str, target: str, ours: Step, theirs: Step, rounds: int) -> Figure:
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds + 1)][1:]  # the first round warms up
    notes = {"threads": torch.get_num_threads(), "dimensions": DIM}
    return Figure(name, target, "s", [a for a, _ in pairs], [b for _, b in pairs], notes)


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
