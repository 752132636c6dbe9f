"""Nodes of judging: embeddings, neighbors, metrics, and where extractors come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node, NonNegative, Positive, Seed
from oml_ray.config.nodes.extractors import Extractor


class Embed(Node):
    actors: Positive = 1
    """Processes that embed, one GPU each where there are GPUs."""
    batch_size: Positive = 128
    """Images in one forward pass."""
    rows_per_part: Positive = 1024
    """Rows in one Parquet part: the unit of resuming, and what a decode task holds in memory."""
    cpus_per_actor: Positive = 1
    """CPUs (and compute threads) of an actor."""


class Gallery(Node):
    backend: Literal["exact"] = "exact"
    """exact: by the definition of distance, every pair considered."""
    shards: Positive = 2
    """Actors over which the gallery is split."""
    precision: Literal["fp32"] = "fp32"
    """Arithmetic of the first pass."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """Smaller is nearer."""
    block_rows: Positive = 4096
    """Rows of a block of queries or gallery: bounds the memory of a search."""


class Bootstrap(Node):
    samples: Positive = 1000
    """Resamples of the queries."""
    seed: Seed = 0
    """Seed of the resampling."""


class Metrics(Node):
    cmc: list[Positive] = [1, 5, 10]
    """Ranks k of cmc@k."""
    precision: list[Positive] = [5]
    """Ranks k of precision@k."""
    map: list[Positive] = [5]
    """Ranks k of map@k."""
    bootstrap: Bootstrap = Bootstrap()
    """Confidence intervals."""

    @property
    def names(self) -> list[str]:
        """Every metric as `family.k`."""
        families = {"cmc": self.cmc, "precision": self.precision, "map": self.map}
        return [f"{family}.{k}" for family, ranks in families.items() for k in ranks]

    @property
    def largest_rank(self) -> int:
        """How many neighbors the metrics need."""
        return max([1, *self.cmc, *self.precision, *self.map])


class Pictures(Node):
    queries: NonNegative = 12
    """Queries shown among the worst, and again as a random choice."""
    neighbors: Positive = 6
    """Neighbors shown for each."""


class Evaluation(Node):
    embed: Embed = Embed()
    """How images become embeddings."""
    gallery: Gallery = Gallery()
    """How neighbors are searched."""
    rerank: Annotated[list[None], Field(max_length=0)] = []
    """Re-rankers, applied in order; empty: none."""
    metrics: Metrics = Metrics()
    """What is computed from them."""
    pictures: Pictures = Pictures()
    """What the report shows of them."""


class CheckpointSource(Node):
    checkpoint: Annotated[str, Field(min_length=1)]
    """Checkpoint folder of a run, or its `best` or `last`."""


class ExtractorSource(Node):
    extractor: Extractor
    """An extractor that was not trained here."""
    size: Positive
    """Side of the images it gets, in pixels."""
