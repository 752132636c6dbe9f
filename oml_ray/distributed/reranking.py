"""Re-ranking: methods applied in order to what a search has found; each that needs another search gets one.

Expansion gives queries or gallery new embeddings, and everything is searched again with them; all other methods sort
(or shorten) the lists that are there. New embeddings go to files, lists are of `evaluation.depth` places: memory is
bounded by the numbers of queries and instances, not by their embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray import build
from oml_ray.config import EvaluateConfig, TrainConfig, nodes
from oml_ray.data.filesystem import join, resolve
from oml_ray.data.samplers import Ids
from oml_ray.distributed import pairs
from oml_ray.distributed.gallery import GalleryPool, exactly, pool_of
from oml_ray.distributed.progress import counting, say
from oml_ray.distributed.search import Embedded, Found, by_rank, neighbors_of, places_in, relevance
from oml_ray.distributed.shard import Part
from oml_ray.errors import ConfigError, StorageError, reason_of
from oml_ray.learning.siamese import LinearSiamese, PairModel, TrivialDistanceSiamese
from oml_ray.retrieval.metrics import PerQuery, per_query
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.neighbors_file import embeddings_writer
from oml_ray.retrieval.rerank.diffusion import diffusion
from oml_ray.retrieval.rerank.expansion import expanded_blocks
from oml_ray.retrieval.rerank.graph import Graph, graph_of
from oml_ray.retrieval.rerank.k_reciprocal import k_reciprocal, scales_of
from oml_ray.retrieval.rerank.normalisation import Statistics, csls, statistics_of, z_norm
from oml_ray.retrieval.rerank.pairwise import pairs_to_judge, uncertain, with_distances
from oml_ray.retrieval.rerank.thresholding import adaptive_threshold, constant_threshold
from oml_ray.retrieval.rows import Float32Array
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.storage.retries import retried
from oml_ray.training.run_directory import RunDirectory

FOLDER = "reranking"


@dataclass(frozen=True, eq=False)
class Stage:
    """Neighbors after the search, or after a re-ranker, with the metrics of each query."""

    name: str
    neighbors: Neighbors
    values: PerQuery


def reranked(
    found: Found, embedded: Embedded, config: TrainConfig | EvaluateConfig, run: RunDirectory, pool: GalleryPool
) -> list[Stage]:
    """Apply an evaluation's re-rankers in order, in a session that is there.

    Args:
        found: by the search.
        embedded: what was searched.
        config: the re-rankers, and how to search.
        run: where new embeddings lie until they are no longer needed.
        pool: shards that hold the gallery; they end with this.

    Returns:
        The search, then a stage for each re-ranker.
    """
    stages = [Stage("search", found.neighbors, found.values)]
    reranking = _Reranking(found, embedded, config, run, pool)
    try:
        since = 1
        for number, node in enumerate(config.evaluation.rerank):
            name = node_name(node, node.name)
            say(f"re-ranking: {name}")
            if isinstance(node, nodes.OfExpansion):
                stages[since:] = reranking.with_ranks(stages[since:])
                since = len(stages)
            reranking.apply(node, number)
            stages.append(Stage(name, reranking.neighbors, reranking.listed()))
        stages[since:] = reranking.with_ranks(stages[since:])
    finally:
        reranking.close()
        run.remove(FOLDER)
    return stages


def check(config: TrainConfig | EvaluateConfig, dim: int) -> bool:
    """Check what re-rankers read, before anything starts.

    Args:
        config: the re-rankers.
        dim: of the embeddings.

    Returns:
        Whether one of them reads images.

    Raises:
        CheckpointError: a checkpoint that judges no pairs.
        ConfigError: one that judges images, where no table says where they are, or embeddings of another dimension, or
            more neighbors than are searched.
    """
    reads_images = False
    for node in config.evaluation.rerank:
        if isinstance(node, nodes.Pairwise):
            model, trained = build.trained_pair_model(node.checkpoint)
            assert trained.model is not None
            top_n = node.top_n or trained.model.top_n
            if top_n > config.evaluation.num_neighbors:
                raise ConfigError(
                    f"evaluation.depth: {node.checkpoint} re-ranks {top_n} neighbors, but only "
                    f"{config.evaluation.num_neighbors} are searched: set it to at least {top_n}, or the re-ranker's "
                    "top_n to less."
                )
            if isinstance(model, LinearSiamese) and model.linear.in_features != dim:
                raise ConfigError(
                    f"evaluation.rerank: {node.checkpoint} judges embeddings of {model.linear.in_features} dimensions, "
                    f"found {dim}: use the store of its training, or of the same extractor."
                )
            if model.inputs == "images" and config.data is None:
                raise ConfigError(
                    f"evaluation.rerank: {node.checkpoint} judges pairs of images, but no table says where they are: "
                    "set data.table to the one that was embedded."
                )
            reads_images |= model.inputs == "images"
    return reads_images


def node_name(node: nodes.Node, head: str, exclude: frozenset[str] = frozenset({"name"})) -> str:
    """What distinguishes one setting: its head and the keys that are not the defaults."""
    told = node.model_dump(exclude_defaults=True, exclude=set(exclude))
    return " ".join([head, *(f"{key}={value}" for key, value in told.items())])


class _Reranking:
    """The neighbors by now, and what they were searched in."""

    def __init__(
        self,
        found: Found,
        embedded: Embedded,
        config: TrainConfig | EvaluateConfig,
        run: RunDirectory,
        pool: GalleryPool,
    ) -> None:
        self.found, self.queries, self.neighbors = found, found.queries, found.neighbors
        self.asking, self.gallery, self._pool = embedded, pool.part, pool
        self.evaluation, self.scaling, self.data, self.run = config.evaluation, config.scaling, config.data, run
        self._methods: dict[str, Callable[[Any, int], None]] = {
            "query_expansion": self._query_expansion,
            "database_augmentation": self._database_augmentation,
            "k_reciprocal": self._k_reciprocal,
            "diffusion": self._diffusion,
            "z_norm": self._z_norm,
            "csls": self._csls,
            "constant_threshold": self._constant_threshold,
            "adaptive_threshold": self._adaptive_threshold,
            "trivial_distance": self._trivial_distance,
            "pairwise": self._pairwise,
        }

    def apply(self, node: nodes.Reranker, number: int) -> None:
        """Apply the re-ranker at a place of the list."""
        self._methods[node.name](node, number)

    def listed(self) -> PerQuery:
        """The metrics that the lists tell."""
        found, labels = self.found, self.asking.table.labels
        relevant = relevance(self.neighbors, self.queries, labels)
        return per_query(relevant, self.neighbors.counts, found.num_relevant, **self.evaluation.metrics.listed)

    def with_ranks(self, stages: list[Stage]) -> list[Stage]:
        """The stages since the last search with the metrics that need all ranks."""
        families = self.evaluation.metrics.by_rank
        if not families or not stages:
            return stages
        lists = [stage.neighbors for stage in stages]
        ranked = by_rank(self._over(self.gallery), self.asking, self.queries, self._node, families, lists)
        return [replace(stage, values={**stage.values, **values}) for stage, values in zip(stages, ranked, strict=True)]

    def close(self) -> None:
        """End the shards that are there."""
        self._pool.close()

    # Expansion

    def _query_expansion(self, node: nodes.QueryExpansion, number: int) -> None:
        queries = self.asking.part(np.sort(self.queries))
        neighbors = self.neighbors.select(places_in(self.queries, queries.ids))
        self.asking = replace(self.asking, embeddings=self._expanded(node, number, queries, neighbors))
        self._search()

    def _database_augmentation(self, node: nodes.DatabaseAugmentation, number: int) -> None:
        neighbors = self._nearest(self.gallery, self.gallery, node.n)
        self.gallery = replace(self.gallery, embeddings=self._expanded(node, number, self.gallery, neighbors))
        self._search()

    def _expanded(self, node: nodes.OfExpansion, number: int, part: Part, neighbors: Neighbors) -> UserEmbeddings:
        """New embeddings of a part, whose neighbors in the gallery these are, in a file."""
        rows, gallery = part.load("re-ranking"), self.gallery.load("gallery")
        block_rows = self.evaluation.gallery.block_rows
        blocks = expanded_blocks(
            rows, neighbors, gallery, n=node.n, alpha=node.alpha, normalize=node.normalize, block_rows=block_rows
        )
        ids = (rows.ids[block] for block in rows.blocks(block_rows))
        return self._written(f"{number:02d}-{node.name}", zip(ids, blocks, strict=True))

    def _written(self, name: str, blocks: Iterator[tuple[Ids, Float32Array]]) -> UserEmbeddings:
        folder = join(self.run.uri, FOLDER)
        filesystem, path = resolve(folder)
        try:
            retried(lambda: filesystem.create_dir(path, recursive=True), folder)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {reason_of(error)}.") from None
        with embeddings_writer(filesystem, f"{path}/{name}.parquet", self.gallery.embeddings.dimension) as write:
            for ids, embeddings in blocks:
                write(ids, embeddings)
        return UserEmbeddings(filesystem, f"{path}/{name}.parquet")

    # Graphs

    def _k_reciprocal(self, node: nodes.KReciprocal, number: int) -> None:
        part, graph = self._graph(max(node.k1, node.k2 - 1), number)
        distance = self.evaluation.gallery.distance
        options: dict[str, Any] = {"k1": node.k1, "k2": node.k2, "weight": node.weight, "distance": distance}
        options["scales"] = np.ones(len(graph)) if node.scales == "none" else self._farthest_squares(part)
        self.neighbors = k_reciprocal(self.neighbors, self.queries, graph, part.load("re-ranking"), **options)

    def _farthest_squares(self, part: Part) -> NDArray[np.float64]:
        """Largest squared distance of each instance of a part to the others (N,), in the order of its ids."""
        node, embedded = self._node, replace(self.asking, embeddings=part.embeddings)
        ids, farthest = [], []
        with counting("measuring distances", len(part.ids), "instances") as done:
            for block, distances in self._over(part).farthest(embedded.blocks(part.ids, node.block_rows)):
                ids.append(block.ids)
                farthest.append(distances)
                done(len(block.ids))
        order = places_in(np.concatenate(ids), part.ids)
        return scales_of(np.concatenate(farthest)[order], node.distance)

    def _diffusion(self, node: nodes.Diffusion, number: int) -> None:
        _, graph = self._graph(node.edges, number)
        options: dict[str, Any] = {"gamma": node.gamma, "alpha": node.alpha, "truncated": node.truncated}
        distance = self.evaluation.gallery.distance
        self.neighbors = diffusion(self.neighbors, self.queries, graph, distance=distance, **options)

    def _graph(self, edges: int, number: int) -> tuple[Part, Graph]:
        """Queries and gallery, and the graph of the nearest among them; what is both is there as in the gallery."""
        part = self.gallery
        others = np.setdiff1d(self.queries, part.ids)
        if len(others):
            embeddings, block_rows = part.embeddings, self.evaluation.gallery.block_rows
            if self.asking.embeddings is not embeddings:

                def blocks() -> Iterator[tuple[Ids, Float32Array]]:
                    yield from embeddings.blocks(block_rows, part.ids)
                    yield from self.asking.embeddings.blocks(block_rows, others)

                embeddings = self._written(f"{number:02d}-graph", blocks())
            part = replace(self.asking, embeddings=embeddings).part(np.union1d(part.ids, others))
        return part, graph_of(part.ids, self._nearest(part, part, edges))

    # Normalisation

    def _z_norm(self, node: nodes.ZNorm, number: int) -> None:
        gallery = self._statistics(node.n) if node.symmetric else None
        self.neighbors = z_norm(self.neighbors, gallery, n=node.n)

    def _csls(self, node: nodes.Csls, number: int) -> None:
        self.neighbors = csls(self.neighbors, self._statistics(node.n), n=node.n)

    def _statistics(self, n: int) -> Statistics:
        """How near gallery instances are to their nearest queries."""
        queries = self.asking.part(np.sort(self.queries))
        if queries.embeddings is self.gallery.embeddings and np.array_equal(queries.ids, self.gallery.ids):
            queries = self.gallery
        node = self._node
        if isinstance(node, nodes.ExactGallery):
            return statistics_of(self.gallery.ids, self._nearest(self.gallery, queries, n), n)
        self.close()  # an index that suits the gallery need not suit the queries
        pool = pool_of(queries, exactly(node), self.scaling)
        try:
            asking = replace(self.asking, embeddings=self.gallery.embeddings)
            ids, neighbors = neighbors_of(pool, asking, self.gallery.ids, exactly(node), n)
        finally:
            pool.close()
        return statistics_of(ids, neighbors, n)

    # Thresholding

    def _constant_threshold(self, node: nodes.ConstantThreshold, number: int) -> None:
        self.neighbors = constant_threshold(self.neighbors, node.threshold)

    def _adaptive_threshold(self, node: nodes.AdaptiveThreshold, number: int) -> None:
        self.neighbors = adaptive_threshold(self.neighbors, node.factor)

    # Judging pairs

    def _trivial_distance(self, node: nodes.TrivialDistance, number: int) -> None:
        rows, places = pairs_to_judge(self.neighbors, node.top_n, np.arange(len(self.queries)))
        distances = self._judged_by_embeddings(TrivialDistanceSiamese(self.evaluation.gallery.distance), rows, places)
        self.neighbors = with_distances(self.neighbors, rows, places, distances)

    def _pairwise(self, node: nodes.Pairwise, number: int) -> None:
        model, trained = build.trained_pair_model(node.checkpoint)
        assert trained.model is not None
        queries = uncertain(self.neighbors, node.budget) if node.budget < 1 else np.arange(len(self.queries))
        rows, places = pairs_to_judge(self.neighbors, node.top_n or trained.model.top_n, queries)
        if model.inputs == "embeddings":
            distances = self._judged_by_embeddings(model, rows, places)
        else:
            assert self.data is not None
            self.close()  # what judges takes the place of what searches
            judge = pairs.Judge(model, self.data, self.asking.table, trained.transforms.eval)
            asked = pairs.Pairs(self.queries[rows], self.neighbors.ids[rows, places])
            distances = pairs.judged(judge, asked, self.evaluation.embed, self.scaling)
        self.neighbors = with_distances(self.neighbors, rows, places, distances)

    def _judged_by_embeddings(self, model: PairModel, rows: Ids, places: Ids) -> Float32Array:
        """Distances of pairs, from the embeddings that are there."""
        queries, gallery = self.asking.part(np.sort(self.queries)).load("queries"), self.gallery.load("gallery")
        model.eval()
        found = [np.empty(0, np.float32)]
        for start in range(0, len(rows), self.evaluation.gallery.block_rows):
            part = slice(start, start + self.evaluation.gallery.block_rows)
            sides = (queries, self.queries[rows[part]]), (gallery, self.neighbors.ids[rows[part], places[part]])
            items = np.stack([of.take(np.searchsorted(of.ids, ids)) for of, ids in sides], axis=1)  # (pairs, 2, d)
            found.append(model.distances(torch.from_numpy(items).flatten(0, 1)).numpy())
        return np.concatenate(found)

    # Searching

    def _search(self) -> None:
        """Search everything again."""
        pool, node = self._over(self.gallery), self._node
        ids, neighbors = neighbors_of(pool, self.asking, np.sort(self.queries), node, self.evaluation.num_neighbors)
        self.neighbors = neighbors.select(places_in(ids, self.queries))

    def _nearest(self, asking: Part, part: Part, k: int) -> Neighbors:
        """The k nearest in a part for each instance of another, in the order of its ids."""
        embedded = replace(self.asking, embeddings=asking.embeddings)
        ids, neighbors = neighbors_of(self._over(part), embedded, asking.ids, self._node, k)
        return neighbors.select(places_in(ids, asking.ids))

    def _over(self, part: Part) -> GalleryPool:
        """Shards that hold a part; indexes are kept of the gallery alone that was there first."""
        if not self._pool.shards:
            self._pool = pool_of(part, self._node, self.scaling)
        elif self._pool.part is not part:
            self._pool.hold(part)
        return self._pool

    @property
    def _node(self) -> nodes.Gallery:
        """How all is searched."""
        node = self.evaluation.gallery
        return node if isinstance(node, nodes.ExactGallery) else node.model_copy(update={"index": None})
