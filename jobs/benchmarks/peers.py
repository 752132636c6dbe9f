"""Side by side with other libraries: the same work on the same data, with the same threads and precision.

============  ==========================================================================================
part          what is compared
============  ==========================================================================================
``evaluate``  search and metrics at 10,000, 60,000 and 200,000 embeddings, time and memory: with OML,
              pytorch-metric-learning, plain FAISS and NumPy, and torchmetrics
``embed``     images/s of the embedding job, with OML's `inference`
``miners``    miners of triplets, alone and with their loss: with OML and pytorch-metric-learning
``samplers``  an epoch of labels x instances: with OML and pytorch-metric-learning
``train``     images/s of training, and the time until a CMC@1: with OML's loop, and with its Lightning DDP
============  ==========================================================================================

The peers are installed into an environment of their own (`peers_environment`). But for ``train``, each measurement is a
fresh process that warms up first, both sides tell what they computed, and a figure whose sides computed different
things is an error. A side that takes more than `peers_sides.TIME_LIMIT_S` or, in ``evaluate``, `MEMORY_LIMIT_MIB` is
shown as such.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jobs.benchmarks import peers_batches, peers_embedding, peers_environment, peers_evaluation, peers_train
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.peers_sides import Asked


def _train(asked: Asked) -> Iterator[Figure]:
    yield from peers_train.suite(Path(asked.python), *asked.images(), asked.rounds)


PARTS: dict[str, Callable[[Asked], Iterator[Figure]]] = {
    "evaluate": peers_evaluation.evaluate,
    "embed": peers_embedding.embed,
    "miners": peers_batches.miners,
    "samplers": peers_batches.samplers,
    "train": _train,
}


def suite(
    *, table: str | None, root: str | None, rounds: int, scale: float = 1.0, only: Sequence[str] = ()
) -> Iterator[Figure]:
    """Measure part after part.

    Args:
        table: path of a CSV table, whose images are embedded and trained on; None for the generated figures.
        root: what its paths are relative to; None for its folder.
        rounds: alternations.
        scale: of the numbers of rows and images, for a quick look.
        only: the parts to measure; none for all.
    """
    python = peers_environment.python()
    for name in only or PARTS:
        with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
            yield from PARTS[name](Asked(python, Path(folder), rounds, scale, table, root))
