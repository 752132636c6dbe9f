"""Where embeddings come from: a store, the user's own files, or a checkpoint that embeds images now."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from oml_ray import build
from oml_ray.config import EvaluateConfig, TrainConfig, nodes
from oml_ray.data.filesystem import resolve
from oml_ray.data.table import Table, table_of
from oml_ray.distributed import embed
from oml_ray.distributed.search import Embedded
from oml_ray.errors import ConfigError
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.training.run_directory import RunDirectory


def embedded_source(config: EvaluateConfig) -> Embedded:
    """Open the store or the files that an evaluation reads its embeddings from, and the table beside them.

    Raises:
        OmlRayError: they do not fit together, or what is wrong with either.
    """
    # Embeddings are there: no image has to be.
    table = None if config.data is None else build.table(config.data, config.run.storage, check_files=False)
    if isinstance(config.source, nodes.StoreSource):
        return from_store(config.source.store, table)
    assert isinstance(config.source, nodes.EmbeddingsSource)
    return from_files(config.source.embeddings, table, config.data)


def from_store(uri: str, table: Table | None) -> Embedded:
    """What a whole store holds; with a table, which must be the one it was made from, images can be shown.

    Raises:
        EmbeddingError: it is not whole. ConfigError: it was made from another table.
    """
    store = build.open_store(uri)
    manifest = store.whole()
    embeddings = UserEmbeddings(store.filesystem, store.path, by_position=table is None)
    if table is not None:
        if manifest.table != table.fingerprint:
            raise ConfigError(
                f"data.table: {table.source} is not the table that the store {store.path} was made from: give that "
                "one, or leave data out (the store brings its labels itself)."
            )
        bad = store.bad_images(manifest)
        if len(lost := np.setdiff1d(_lacking(table, embeddings), np.fromiter(bad, np.int64, len(bad)))):
            raise ConfigError(
                f"source.store: {store.path} was made with data.split: {manifest.split} and lacks {len(lost)} "
                f"validation rows, first: {lost[:5].tolist()}: embed them."
            )
        return Embedded(table, embeddings, bad)
    columns = embeddings.table()
    assert columns is not None
    return Embedded(table_of(columns, store.path), embeddings, has_images=False, left_out=store.bad_images(manifest))


def from_files(uri: str, table: Table | None, data: nodes.SplitData | None) -> Embedded:
    """What the user's own files hold; without a table they must bring their labels.

    Raises:
        ConfigError: the files do not have a row for each of the table's.
    """
    embeddings = UserEmbeddings(*resolve(uri), by_position=table is None)
    if table is None or data is None:
        columns = embeddings.table()
        if columns is None:
            raise ConfigError(
                f"source.embeddings: {uri} holds embeddings alone; metrics need labels: set data.table to a table with "
                f"a row for each of its {embeddings.num_rows} embeddings."
            )
        return Embedded(table_of(columns, uri), embeddings, has_images=False)
    if "id" not in embeddings.columns:
        rows = embed.rows_of(table, data.split)
        if embeddings.num_rows not in (len(table), len(rows)):
            raise ConfigError(
                f"source.embeddings: {uri} has {embeddings.num_rows} rows, but the table {table.source} has "
                f"{len(table)} ({len(rows)} in data.split: {data.split}): they must be as many, in the same order."
            )
        if embeddings.num_rows != len(table):
            embeddings = embeddings.named(rows)
    elif len(lost := _lacking(table, embeddings)):
        raise ConfigError(
            f"source.embeddings: {uri} has no embedding for {len(lost)} rows that are queries or gallery in the table "
            f"{table.source}, first: {lost[:5].tolist()}: add them (its column id must hold row numbers of the table, "
            "from 0), or leave data out to evaluate the file by its own columns."
        )
    return Embedded(table, embeddings)


def _lacking(table: Table, embeddings: UserEmbeddings) -> NDArray[np.int64]:
    """Rows that are evaluated, but not among the embeddings."""
    return np.setdiff1d(np.concatenate([table.query_ids, table.gallery_ids]), embeddings.ids())


def validation_images(config: TrainConfig, table: Table, checkpoint: str) -> embed.Images:
    """The validation rows of a training's table, and the extractor of one of its checkpoints."""
    extractor, _ = build.trained_extractor(checkpoint)
    data = nodes.SplitData(**config.data.model_dump(exclude={"store"}), split="validation")
    return embed.Images(data, table, table.validation_ids, extractor, config.transforms.eval)  # type: ignore[arg-type]


def embed_validation(
    run: RunDirectory, config: TrainConfig | EvaluateConfig, images: embed.Images, timings: dict[str, float]
) -> Embedded:
    """Embed what is evaluated, in a session that is there."""
    start = time.perf_counter()
    store, manifest = embed.fill_store(run, images, config.evaluation.embed, config.scaling)
    timings["evaluate/embed"] = time.perf_counter() - start
    return Embedded(images.table, UserEmbeddings(store.filesystem, store.path), store.bad_images(manifest))
