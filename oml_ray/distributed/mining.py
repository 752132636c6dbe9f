"""Mining pairs from an embeddings store: the nearest train instances of each, and the neighbors of validation."""

from __future__ import annotations

import numpy as np

from oml_ray import build
from oml_ray.config import TrainConfig, nodes
from oml_ray.data.table import Table
from oml_ray.distributed.gallery import exactly, pool_of
from oml_ray.distributed.progress import say
from oml_ray.distributed.search import Embedded, neighbors_of, places_in, search
from oml_ray.distributed.sources import from_store
from oml_ray.errors import ConfigError
from oml_ray.training.pairs import Mined


def embedded_store(config: TrainConfig, table: Table) -> Embedded:
    """Open the store of a training of pairs.

    Raises:
        EmbeddingError: it is not whole. ConfigError: it is of another table, or lacks its train or validation rows.
    """
    assert config.data.store is not None
    try:
        embedded = from_store(config.data.store, table)
    except ConfigError as error:
        raise ConfigError(str(error).replace("source.store", "data.store")) from None
    lost = np.setdiff1d(table.train_ids, np.union1d(embedded.embeddings.ids(), list(embedded.bad)))
    if len(lost):
        raise ConfigError(
            f"data.store: {config.data.store} lacks {len(lost)} train rows, first: {lost[:5].tolist()}: pairs are "
            "mined from them; embed the table with data.split: all."
        )
    return embedded


def mine(config: TrainConfig, table: Table) -> Mined:
    """Search the neighbors that pairs are made of, in a session that is there.

    Raises:
        OmlRayError: the store cannot be searched.
    """
    assert isinstance(config.sampler, nodes.HardPairsSampler)
    assert config.model is not None
    embedded, evaluation, scaling = embedded_store(config, table), config.evaluation, config.scaling
    say("mining pairs of train rows")
    train = np.setdiff1d(table.train_ids, list(embedded.bad))
    # Exactly, whatever searches validation: the plan must be the same each time.
    gallery = exactly(evaluation.gallery)
    pool = pool_of(embedded.part(train), gallery, scaling)
    try:
        ids, nearest = neighbors_of(pool, embedded, train, gallery, config.sampler.depth)
    finally:
        pool.close()
    say("searching neighbors of validation rows")
    found = search(embedded, evaluation.only_listed, evaluation.gallery, scaling, least_k=config.model.top_n + 1)
    manifest = build.open_store(config.data.store or "").whole()
    made_by = (manifest.weights, manifest.transform, manifest.dtype, manifest.decoding)
    return Mined(
        embedded.embeddings,
        " ".join(str(part) for part in made_by if part is not None),
        train,
        nearest.ids[places_in(ids, train)],
        found.queries,
        found.neighbors,
        found.num_relevant,
        np.sort(embedded.embeddings.ids()),
    )
