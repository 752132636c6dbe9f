"""Judging pairs of images: decode tasks feed a pool of actors from a queue of blocks of pairs.

A row of Ray Data is one block: its images are decoded once, however many of its pairs they are in, and its pairs are
judged by one actor. When an actor dies its blocks are judged again by others, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray

from oml_ray import build
from oml_ray.config import nodes
from oml_ray.data.images import Batch, EvaluationLoader
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.distributed.decoding import Row, attempt, error_note, fetched, pack, raise_noted, unpack
from oml_ray.distributed.embed import actor_pool, make_fast
from oml_ray.distributed.progress import counting
from oml_ray.distributed.runtime.bounded_map import map_batches
from oml_ray.distributed.runtime.devices import batch_size_of, device_of
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.runtime.resources import KEEP_MEMORY, placed
from oml_ray.distributed.stream import configure
from oml_ray.errors import EmbeddingError, OmlRayError
from oml_ray.learning.siamese import PairModel

Distances = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Judge:
    """A model of pairs of images, with what it needs to see them."""

    model: PairModel
    data: nodes.Data
    table: Table
    transform: nodes.EvalTransform


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of rows of a table: int64 (P,) each."""

    first: Ids
    second: Ids

    def block(self, number: int, size: int) -> Pairs:
        """Some of the pairs."""
        part = slice(number * size, (number + 1) * size)
        return Pairs(self.first[part], self.second[part])

    def ids(self) -> Ids:
        """Rows that they are of, each once, sorted."""
        return np.union1d(self.first, self.second)


def judged(judge: Judge, pairs: Pairs, node: nodes.Embed, scaling: nodes.Scaling) -> Distances:
    """Distances of pairs of images, in a session that is there.

    Args:
        judge: what judges them.
        pairs: P pairs, those of a query one after another.
        node: the actors, their batches and blocks.
        scaling: on which nodes, and whether on GPUs.

    Returns:
        float32 (P,), in the order of the pairs.

    Raises:
        EmbeddingError: the pair whose images cannot be read, or that got no finite distance.
    """
    size = max(1, node.rows_per_part // 2)
    found = np.empty(len(pairs.first), dtype=np.float32)
    num_blocks = -(-len(found) // size)
    if not num_blocks:
        return found
    use_gpu = scaling.uses_gpu("embedding")
    configure(scaling.data_cpus + node.most_actors * node.cpus_per_actor)
    loader = build.evaluation_loader(judge.data, judge.table, judge.transform)
    shared = ray.put((loader, pairs))
    dataset = ray.data.range(num_blocks, override_num_blocks=num_blocks)
    # The memory is declared for the reason that embedding has.
    dataset = map_batches(
        dataset,
        partial(_load_block, shared, size),
        scaling.max_failures,
        batch_size=None,
        num_cpus=1,
        memory=float(2 * 3 * judge.transform.size**2 * 2 * size),
        **placed(scaling.placement.decoding),
    )
    dataset = map_batches(
        dataset,
        _Judging,
        scaling.max_failures,
        fn_constructor_args=(ray.put(judge.model), shared, size, node, use_gpu),
        batch_size=batch_size_of(use_gpu),
        compute=actor_pool(node, num_blocks),
        num_cpus=node.cpus_per_actor,
        num_gpus=1 if use_gpu else 0,
        runtime_env=KEEP_MEMORY,
        **placed(scaling.placement.embedding),
    )
    with counting("judging", len(found), "pairs") as done, unwrapped("scoring of pairs"):
        for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for number, note, distances in zip(
                block["number"].tolist(), block["note"], block["distances"], strict=True
            ):
                raise_noted(note)
                part = found[number * size : (number + 1) * size]
                part[:] = distances[: len(part)]
                done(len(part))
    return found


def _load_block(shared: ray.ObjectRef[Any], size: int, block: Row) -> Row:
    loader, pairs = fetched(shared)
    wanted = [pairs.block(number, size).ids() for number in block["id"].tolist()]
    outcomes = [attempt(loader.load, ids) for ids in wanted]
    return {"number": block["id"], **pack(outcomes, max(map(len, wanted)), loader.nothing)}


class _Judging:
    """One actor of the pool."""

    def __init__(
        self, model: ray.ObjectRef[Any], shared: ray.ObjectRef[Any], size: int, node: nodes.Embed, use_gpu: bool
    ) -> None:
        self.device = device_of(use_gpu)
        self.model: PairModel = make_fast(ray.get(model), self.device, node.cpus_per_actor)
        loader: EvaluationLoader = fetched(shared)[0]
        self.table, self.pairs, self.size = loader.reader.table, fetched(shared)[1], size
        self.pairs_at_once = max(1, node.batch_size // 2)

    def __call__(self, block: Row) -> Row:
        notes, judged = [], np.zeros((len(block["number"]), self.size), dtype=np.float32)
        for index, number in enumerate(block["number"].tolist()):
            try:
                distances = self._judge(self.pairs.block(number, self.size), unpack(block, index))
                judged[index, : len(distances)] = distances
                notes.append("")
            except OmlRayError as error:
                notes.append(error_note(error))
        return {"number": block["number"], "distances": judged, "note": notes}

    def _judge(self, pairs: Pairs, batch: Batch) -> Distances:
        for side in (pairs.first, pairs.second):
            lost = np.flatnonzero(np.isin(side, batch.bad))
            if len(lost):
                reason = batch.reasons[int(np.flatnonzero(batch.bad == side[lost[0]])[0])]
                raise EmbeddingError(f"{self._name(pairs, int(lost[0]))} cannot be judged: {reason}")
        images = torch.from_numpy(batch.images)
        places = np.stack([np.searchsorted(batch.ids, side) for side in (pairs.first, pairs.second)], axis=1)
        found = [np.empty(0, dtype=np.float32)]
        for chunk in torch.split(torch.from_numpy(places), self.pairs_at_once):  # (pairs, 2)
            found.append(self.model.distances(images[chunk.flatten()].to(self.device)).cpu().numpy())
        distances = np.concatenate(found)
        wrong = np.flatnonzero(~np.isfinite(distances))
        if len(wrong):
            pair = int(wrong[0])
            raise EmbeddingError(
                f"{self._name(pairs, pair)} got the distance {distances[pair]}: the model's weights or these images "
                "are broken; look at the training that made the checkpoint."
            )
        return distances

    def _name(self, pairs: Pairs, pair: int) -> str:
        one, other = int(pairs.first[pair]), int(pairs.second[pair])
        return f"The pair of row {one} ({self.table.uri(one)}) and row {other} ({self.table.uri(other)})"
