"""Nodes of judging: embeddings, neighbors, metrics, and where extractors come from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from oml_ray.config.nodes.base import Node, NonNegative, Positive, Probability, Seed
from oml_ray.config.nodes.extractors import Extractor
from oml_ray.config.nodes.rerank import OfDistances, OfExpansion, OfNormalisation, OfPairwise, OfThresholds, Reranker


class Embed(Node):
    actors: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] = 1
    """Processes that embed, one GPU each with scaling.use_gpu; [least, most]: as many as have work."""
    batch_size: Positive = 128
    """Images in one forward pass."""
    rows_per_part: Positive = 1024
    """Rows in one Parquet part: the unit of resuming, and what a decode task holds in memory."""
    cpus_per_actor: Positive = 1
    """CPUs (and compute threads) of an actor."""
    dtype: Literal["float32", "float16"] = "float32"
    """How the store keeps embeddings."""

    @property
    def least_actors(self) -> int:
        """How many processes there must be."""
        return self.actors if isinstance(self.actors, int) else self.actors[0]

    @property
    def most_actors(self) -> int:
        """How many processes there may be."""
        return self.actors if isinstance(self.actors, int) else self.actors[1]

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if isinstance(self.actors, list) and self.actors[0] > self.actors[1]:
            raise ValueError(f"actors: the least must not be above the most, found {self.actors}")
        return self


class OfShards(Node):
    """A way of searching a gallery that is split over actors."""

    shards: Positive = 2
    """Actors over which the gallery is split."""
    cpus_per_shard: Positive = 1
    """CPUs (and compute threads) of a shard: one fat shard is faster than two lean ones of the same machine."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """Smaller is nearer."""
    block_rows: Positive = 4096
    """Rows of a block of queries or gallery: bounds the memory of a search."""


class ExactGallery(OfShards):
    backend: Literal["exact"] = "exact"
    """exact: by the definition of distance, every pair considered."""
    precision: Literal["fp32", "certified"] = "fp32"
    """Arithmetic of the first pass; certified: bfloat16 where it is fast, proven and so with the same result."""


class OfIndexes(OfShards):
    """A gallery that is searched approximately."""

    rescore_factor: Positive = 1
    """Candidates for each neighbor that are rescored by the definition of distance: above 1 for compressed indexes."""
    index: Annotated[str, Field(min_length=1)] | None = None
    """Folder or URI where built indexes are kept, and loaded from when they are there; null: built each time."""


class FaissGallery(OfIndexes):
    backend: Literal["faiss"]
    """faiss: any index of FAISS; its candidates are rescored by the definition of distance."""
    factory: Annotated[str, Field(min_length=1)]
    """Index factory string, such as "IVF1024,Flat" or "HNSW32"."""
    nprobe: Positive | None = None
    """IVF: lists looked through for each query; null: 1."""
    ef_search: Positive | None = None
    """HNSW: open ends of a search; null: 16."""
    ef_construction: Positive | None = None
    """HNSW: open ends while building; null: 40."""
    parameters: dict[str, float] = {}
    """Further parameters by FAISS's names."""
    train_rows: Positive = 65536
    """Gallery rows that an index learns from, drawn at random in each shard."""


class HnswlibGallery(OfIndexes):
    backend: Literal["hnswlib"]
    """hnswlib: a graph; needs the extra hnswlib."""
    M: Annotated[int, Field(ge=2, le=10_000)] = 16
    """Links of each point."""
    ef_construction: Positive = 200
    """Open ends while a point is linked."""
    ef_search: Positive = 64
    """Open ends of a search."""


def _backend(value: object) -> object:
    return value.get("backend", "exact") if isinstance(value, dict) else getattr(value, "backend", None)


Gallery = Annotated[
    Annotated[ExactGallery, Tag("exact")]
    | Annotated[FaissGallery, Tag("faiss")]
    | Annotated[HnswlibGallery, Tag("hnswlib")],
    Discriminator(_backend),
]


class Bootstrap(Node):
    samples: Positive = 1000
    """Resamples of the queries."""
    seed: Seed = 0
    """Seed of the resampling."""


class Metrics(Node):
    cmc: list[Positive] = [1, 5, 10]
    """Ranks k of cmc@k ("Recall@k" in papers)."""
    precision: list[Positive] = [5]
    """Ranks k of precision@k, of the relevant ones that there are."""
    map: list[Positive] = [5]
    """Ranks k of map@k."""
    recall: list[Positive] = []
    """Ranks k of recall@k, the share of all relevant ones."""
    strict_precision: list[Positive] = []
    """Ranks k of strict_precision@k, the share of k."""
    ndcg: list[Positive] = []
    """Ranks k of ndcg@k."""
    map_r: bool = False
    """MAP@R; like the next three it needs a pass that counts over the whole gallery."""
    r_precision: bool = False
    """R-precision."""
    ap: bool = False
    """Average precision over the whole gallery."""
    mrr: bool = False
    """Mean reciprocal rank of the nearest relevant item."""
    fnmr_at_fmr: list[Probability] = []
    """False match rates, as shares, at which the false non-match rate is computed over all pairs."""
    pcf: list[Probability] = []
    """Shares of the variance that principal components explain, of the gallery's embeddings."""
    bootstrap: Bootstrap = Bootstrap()
    """Confidence intervals."""
    per_query: bool = False
    """Write the metrics of every query as per_query.parquet."""

    @property
    def listed(self) -> dict[str, list[int]]:
        """Ranks of the families that a list of neighbors tells."""
        families = ("cmc", "precision", "map", "recall", "strict_precision", "ndcg")
        return {name: ranks for name in families if (ranks := getattr(self, name))}

    @property
    def by_rank(self) -> list[str]:
        """Families that need the ranks of all relevant items."""
        return [name for name in ("map_r", "r_precision", "ap", "mrr") if getattr(self, name)]

    @property
    def only_listed(self) -> Metrics:
        """These metrics without those that need more than a list of neighbors."""
        return self.model_copy(
            update={"map_r": False, "r_precision": False, "ap": False, "mrr": False, "fnmr_at_fmr": [], "pcf": []}
        )

    @property
    def names(self) -> list[str]:
        """Every metric that a list of neighbors tells, as `family.k`."""
        return [f"{family}.{k}" for family, ranks in self.listed.items() for k in ranks]

    @property
    def largest_rank(self) -> int:
        """How many neighbors the metrics need."""
        return max([1, *(rank for ranks in self.listed.values() for rank in ranks)])


class Pictures(Node):
    queries: NonNegative = 12
    """Queries shown among the worst, and again as a random choice."""
    neighbors: Positive = 6
    """Neighbors shown for each."""


class Evaluation(Node):
    embed: Embed = Embed()
    """How images become embeddings."""
    gallery: Gallery = ExactGallery()
    """How neighbors are searched."""
    compare: list[Gallery] = []
    """Other ways of searching, each judged against exact search."""
    neighbors: bool = False
    """Write the neighbors of every query as neighbors.parquet."""
    rerank: list[Reranker] = []
    """Re-rankers, applied in order to what the search has found; empty: none."""
    depth: Positive = 100
    """Neighbors of each query that re-rankers get; without any, as many are searched as metrics and pictures need."""
    metrics: Metrics = Metrics()
    """What is computed from them."""
    pictures: Pictures = Pictures()
    """What the report shows of them."""

    @property
    def num_neighbors(self) -> int:
        """How many neighbors of each query are searched."""
        needed = max(self.metrics.largest_rank, self.pictures.neighbors)
        judged = [node.top_n or 0 for node in self.rerank if isinstance(node, OfPairwise)]
        return max(needed, self.depth, *judged) if self.rerank else needed

    @property
    def only_listed(self) -> Evaluation:
        """The same, ending with the search and with what its lists tell."""
        return self.model_copy(update={"metrics": self.metrics.only_listed, "rerank": []})

    @model_validator(mode="after")
    def _can_be_reranked(self) -> Self:
        if self.rerank:
            self.check_reranked()
        normalised = None
        for node in self.rerank:
            if isinstance(node, OfNormalisation):
                normalised = node.name
            elif isinstance(node, OfExpansion):  # searches again
                normalised = None
            elif normalised and isinstance(node, OfDistances):
                raise ValueError(
                    f"rerank: {node.name} cannot follow {normalised}, whose distances may be negative: put it before"
                )
        return self

    def check_reranked(self) -> None:
        """Refuse metrics that re-ranked lists cannot tell.

        Raises:
            ValueError: names the keys.
        """
        if not self.metrics.by_rank:
            return
        names = ", ".join(f"metrics.{name}" for name in self.metrics.by_rank)
        if any(isinstance(node, OfThresholds) for node in self.rerank):
            raise ValueError(
                f"rerank: thresholds shorten the lists, but {names} need the ranks of all relevant items: leave out "
                "one or the other"
            )
        if self.gallery.backend != "exact":
            raise ValueError(
                f"{names}: after re-ranking they need to know what exactly was nearest: set gallery.backend: exact, or "
                "leave them out"
            )


class CheckpointSource(Node):
    checkpoint: Annotated[str, Field(min_length=1)]
    """Checkpoint folder of a run, or its `best` or `last`."""


class ExtractorSource(Node):
    extractor: Extractor
    """An extractor that was not trained here."""
    size: Positive
    """Side of the images it gets, in pixels."""


class StoreSource(Node):
    store: Annotated[str, Field(min_length=1)]
    """Embeddings store: the folder `embeddings` of a run, or the run itself."""


class EmbeddingsSource(Node):
    embeddings: Annotated[str, Field(min_length=1)]
    """Embeddings of your own: a Parquet file or folder with a column `embedding`, or a .npy file."""
