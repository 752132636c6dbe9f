"""Embeddings stores, by the paths and URIs that configs and commands give."""

from __future__ import annotations

from oml_ray.data.filesystem import exists, join, resolve
from oml_ray.retrieval.store import MANIFEST, Store

EMBEDDINGS = "embeddings"
"""Folder of a run's store in the run."""


def open_store(uri: str) -> Store:
    """Open a store by its folder, or by the run that it is of."""
    inside = join(uri, EMBEDDINGS)
    return Store(*resolve(uri if exists(join(uri, MANIFEST)) or not exists(join(inside, MANIFEST)) else inside))
