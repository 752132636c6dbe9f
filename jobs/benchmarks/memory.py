"""What sharding a head and splitting a batch save: peak memory of fresh processes, above what imports take."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jobs.benchmarks.figure import Figure
from oml_ray.learning.extractors import timm_extractor
from oml_ray.learning.learner import Learner
from oml_ray.learning.losses.arcface import CosFaceLoss
from oml_ray.learning.losses.margins import CosineMargin
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import HardTriplets
from oml_ray.learning.row_sparse import RowSparseAdamW
from oml_ray.learning.sharded_head import ShardedHead

LABELS, DIM, BATCH, STEPS = 1_000_000, 256, 128, 3
WORLD_SIZE = 2
MODEL, SIZE, LARGE, MICRO = "vit_tiny_patch16_224", 64, 1024, 64


def suite(*, table: str | None, root: str | None, rounds: int) -> list[Figure]:
    """Measure heads of a million labels, and a batch of 1024 in chunks of 64.

    Args:
        table: ignored.
        root: ignored.
        rounds: alternations.
    """
    heads = {rate: [_both(sharded, replicated, rate) for _ in range(rounds)] for rate in (1.0, 0.1)}
    figures = []
    for rate, pairs in heads.items():
        name = f"sharded head, {LABELS:,} labels, sampling {rate:g}"
        for kind, unit, target in (("peak", "MiB", "<= 0.6" if rate == 1 else "-"), ("seconds", "s", "-")):
            ours, theirs = ([result[kind] for result in side] for side in zip(*pairs, strict=True))
            figures.append(Figure(f"{name}: {kind}", target, unit, ours, theirs, {"batch": BATCH, "dim": DIM}))
    pairs = [(_run(micro, 1, MICRO), _run(micro, 1, None)) for _ in range(rounds)]
    difference = max(float(abs(a["weight"] - b["weight"]).max()) for a, b in pairs)
    for kind, unit in (("peak", "MiB"), ("seconds", "s")):
        ours, theirs = ([result[kind] for result in side] for side in zip(*pairs, strict=True))
        notes = {"largest difference of a parameter": difference}
        figures.append(Figure(f"micro_batch {MICRO} of {LARGE}: {kind}", "-", unit, ours, theirs, notes))
    return figures


def _both(ours: Callable[..., Any], theirs: Callable[..., Any], rate: float) -> tuple[Any, Any]:
    return _run(ours, WORLD_SIZE, rate), _run(theirs, WORLD_SIZE, rate)


def sharded(rank: int, rate: float) -> dict[str, Any]:
    """Train a sharded head for some steps."""
    optimizer = RowSparseAdamW(lr=1e-3)
    head = ShardedHead(
        torch.arange(LABELS), DIM, CosineMargin(0.35), optimizer,
        scale=64.0, sample_rate=rate, rank=rank, world_size=WORLD_SIZE,
    )  # fmt: skip

    def step(index: int) -> None:
        embeddings, labels = _batch(index)
        head.begin_step(index)
        torch.autograd.backward(head(embeddings, labels)[0])
        head.step()

    return {"seconds": _seconds(step)}


def replicated(rank: int, rate: float) -> dict[str, Any]:
    """Train a head that every rank holds whole, under DDP."""
    head = nn.parallel.DistributedDataParallel(CosFaceLoss(torch.arange(LABELS), DIM), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)

    def step(index: int) -> None:
        embeddings, labels = _batch(index)
        optimizer.zero_grad()
        torch.autograd.backward(head(embeddings, labels)[0])
        optimizer.step()

    return {"seconds": _seconds(step)}


def micro(rank: int, size: int | None) -> dict[str, Any]:
    """Learn from one large batch."""
    torch.manual_seed(0)
    learner = Learner(timm_extractor(MODEL, size=SIZE), TripletLoss(HardTriplets(), margin=0.2), micro_batch=size)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    images = torch.randint(0, 256, (LARGE, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.arange(LARGE) // 4

    def step(index: int) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(learner(images, labels, [0, LARGE])[0])
        optimizer.step()

    seconds = _seconds(step)
    return {"seconds": seconds, "weight": torch.cat([p.detach().flatten() for p in learner.parameters()]).numpy()}


def _batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(0, LABELS, (BATCH,), generator=generator)
    return torch.randn(BATCH, DIM, generator=generator).requires_grad_(), labels


def _seconds(step: Callable[[int], None]) -> float:
    times = []
    for index in range(STEPS):
        start = time.perf_counter()
        step(index)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _run(work: Callable[..., dict[str, Any]], world_size: int, argument: Any) -> dict[str, Any]:
    """Run `work` in fresh processes; the result of rank 0, with its peak memory in MiB."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        workers = [
            context.Process(target=_process, args=(work, rank, world_size, rendezvous, argument, results))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        result: dict[str, Any] = results.get()
        for worker in workers:
            worker.join()
    return result


def _process(
    work: Callable[..., dict[str, Any]], rank: int, world_size: int, rendezvous: str, argument: Any, results: Any
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        dist.barrier()
    idle = _peak()
    result = work(rank, argument)
    if rank == 0:
        results.put({**result, "peak": _peak() - idle})
    if world_size > 1:
        dist.destroy_process_group()


def _peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)
