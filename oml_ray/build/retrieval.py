"""From config nodes to gallery indexes."""

from __future__ import annotations

from oml_ray.config import nodes
from oml_ray.retrieval.faiss_index import FaissSettings
from oml_ray.retrieval.hnswlib_index import HnswlibSettings
from oml_ray.retrieval.index import Settings


def index_settings(node: nodes.OfIndexes, *, use_gpu: bool) -> Settings:
    """Build what an approximate gallery's indexes are built and searched with.

    Raises:
        ConfigError: settings that exclude each other.
    """
    if isinstance(node, nodes.FaissGallery):
        own = node.model_dump(include={"factory", "nprobe", "ef_search", "ef_construction", "parameters", "train_rows"})
        return FaissSettings(**own, num_threads=node.cpus_per_shard, use_gpu=use_gpu)
    own = node.model_dump(include={"M", "ef_construction", "ef_search"})
    return HnswlibSettings(**own, num_threads=node.cpus_per_shard)
