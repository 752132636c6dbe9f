"""Embedding: decode tasks feed a pool of actors, which write the store's parts.

A row of Ray Data is one part, so a part is written by one actor in one piece: a killed job continues with the parts
that are missing, and every row is embedded exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from oml_ray import build
from oml_ray.config import EmbedConfig, nodes
from oml_ray.data.filesystem import resolve
from oml_ray.data.images import Batch, EvaluationLoader
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.distributed import runs
from oml_ray.distributed.decoding import Row, error_note, fetched, load_part, raise_noted, unpack
from oml_ray.distributed.progress import counting, say
from oml_ray.distributed.runtime.bounded_map import map_batches
from oml_ray.distributed.runtime.devices import batch_size_of, device_of
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.runtime.resources import KEEP_MEMORY, Needs, ProcessGroup, placed
from oml_ray.distributed.session import check_given, session
from oml_ray.distributed.stream import configure
from oml_ray.errors import ConfigError, OmlRayError
from oml_ray.learning.extractors import Extractor
from oml_ray.learning.siamese import PairModel
from oml_ray.retrieval.store import Manifest, Store
from oml_ray.training.run_directory import RunDirectory


def needs(embed: nodes.Embed, scaling: nodes.Scaling) -> Needs:
    """Logical resources of embedding."""
    use_gpu, least = scaling.uses_gpu("embedding"), embed.least_actors
    actors = ProcessGroup(
        "embedding",
        scaling.placement.embedding,
        least,
        "evaluation.embed.actors",
        embed.cpus_per_actor,
        "evaluation.embed.cpus_per_actor",
        1 if use_gpu else 0,
    )
    return Needs(
        embed.most_actors * embed.cpus_per_actor + scaling.data_cpus,
        least if use_gpu else 0,
        "evaluation.embed.actors * evaluation.embed.cpus_per_actor + scaling.data_cpus = "
        f"{embed.most_actors} * {embed.cpus_per_actor} + {scaling.data_cpus}",
        (ProcessGroup("decoding", scaling.placement.decoding), actors),
        may_grow=scaling.autoscaling,
    )


Model = TypeVar("Model", Extractor, PairModel)


@dataclass(frozen=True, eq=False)
class Images:
    """Rows of a table that are to be embedded, and what embeds them."""

    data: nodes.SplitData
    table: Table
    rows: Ids
    extractor: Extractor
    transform: nodes.Resize


def images_of(
    source: nodes.CheckpointSource | nodes.ExtractorSource, data: nodes.SplitData, storage: str, seed: int
) -> Images:
    """Read the table and build the extractor of a source, with the preparation of its images.

    Raises:
        OmlRayError: all that can be wrong with either.
    """
    table = build.table(data, storage)
    return Images(data, table, rows_of(table, data.split), *extractor_of(source, seed))


def extractor_of(source: nodes.CheckpointSource | nodes.ExtractorSource, seed: int) -> tuple[Extractor, nodes.Resize]:
    """Build the extractor of a source, with the preparation of its images."""
    if isinstance(source, nodes.ExtractorSource):
        torch.manual_seed(seed)
        return build.extractor(source.extractor, source.size), nodes.Resize(name="resize", size=source.size)
    extractor, trained = build.trained_extractor(source.checkpoint)
    return extractor, trained.transforms.eval  # type: ignore[return-value]


def rows_of(table: Table, split: str) -> Ids:
    """Row ids of a split.

    Raises:
        ConfigError: there are none.
    """
    rows = {"train": table.train_ids, "validation": table.validation_ids, "all": np.arange(len(table))}[split]
    if not len(rows):
        raise ConfigError(f"data.split: {table.source} has no {split} rows: choose another split.")
    return rows


def decoding_of(data: nodes.SplitData) -> dict[str, Any]:
    """How images are decoded, as a store's manifest records it: what can change their pixels."""
    return {"exif": data.exif, "background": data.background}


def embed(config: EmbedConfig) -> None:
    """Embed a table into the run's store, or continue where an earlier process stopped.

    Raises:
        OmlRayError: the user's error, wherever it came up.
    """
    config, images = _prepare(config)
    run = runs.open_run(config)
    with session(needs(config.evaluation.embed, config.scaling)), unwrapped():
        store, manifest = fill_store(run, images, config.evaluation.embed, config.scaling)
        bad = len(store.bad_images(manifest))
    say(f"{len(images.rows) - bad} rows embedded in {store.path}" + (f", {bad} bad images left out" if bad else ""))


def dry_run(config: EmbedConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config."""
    config, _ = _prepare(config)
    check_given(needs(config.evaluation.embed, config.scaling))
    runs.say_checked(config)


def _prepare(config: EmbedConfig) -> tuple[EmbedConfig, Images]:
    """Check all that can be checked before anything starts; return what that made."""
    config = runs.resolved(config)
    runs.check_apart(config)
    runs.check_name(config)
    return config, images_of(config.source, config.data, config.run.storage, config.seed)


def fill_store(run: RunDirectory, images: Images, node: nodes.Embed, scaling: nodes.Scaling) -> tuple[Store, Manifest]:
    """Embed the rows that the run's store is missing, in a session that is there; return the whole store."""
    extractor, table, rows, transform = images.extractor, images.table, images.rows, images.transform
    manifest = Manifest(
        num_rows=len(rows),
        rows_per_part=node.rows_per_part,
        embedding_dim=extractor.embedding_dim,
        weights=build.weights_of(extractor),
        transform=transform.model_dump(),
        table=table.fingerprint,
        split=images.data.split,
        dtype=node.dtype,
        decoding=decoding_of(images.data),
    )
    store = Store(*resolve(f"{run.uri}/{runs.EMBEDDINGS}"))
    missing = store.begin(manifest)
    if not missing:
        return store, manifest
    use_gpu = scaling.uses_gpu("embedding")
    configure(scaling.data_cpus + node.most_actors * node.cpus_per_actor)
    loader = build.evaluation_loader(images.data, table, transform)
    shared = ray.put((loader, rows, np.array(missing)))
    dataset = ray.data.range(len(missing), override_num_blocks=len(missing))
    # The memory is declared so that the tasks' arguments differ from the actors': with equal ones Ray Data fuses the
    # two, and each actor would decode for itself before it embeds.
    dataset = map_batches(
        dataset,
        partial(load_part, shared, node.rows_per_part),
        scaling.max_failures,
        batch_size=None,
        num_cpus=1,
        memory=float(2 * 3 * transform.size**2 * node.rows_per_part),  # the images, and their block
        **placed(scaling.placement.decoding),
    )
    dataset = map_batches(
        dataset,
        _Embedder,
        scaling.max_failures,
        fn_constructor_args=(ray.put(extractor), shared, store, node, use_gpu),
        batch_size=batch_size_of(use_gpu),
        compute=actor_pool(node, len(missing)),
        num_cpus=node.cpus_per_actor,
        num_gpus=1 if use_gpu else 0,
        runtime_env=KEEP_MEMORY,
        **placed(scaling.placement.embedding),
    )
    with counting("embedding", len(rows), "images") as done, unwrapped("embedding of images"):
        done(len(rows) - len(missing) * node.rows_per_part if len(missing) < manifest.num_parts else 0)
        for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for note in block["note"]:
                raise_noted(note)
            done(int(block["rows"].sum()))
    return store, manifest


def actor_pool(node: nodes.Embed, num_parts: int) -> ActorPoolStrategy:
    """The actors: no more than there are parts, of which Ray Data would warn."""
    least, most = (node.actors, node.actors) if isinstance(node.actors, int) else node.actors
    return ActorPoolStrategy(min_size=min(least, num_parts), max_size=min(most, num_parts))


def make_fast(model: Model, device: torch.device, num_threads: int) -> Model:
    """Put a model into evaluation on a device, as it is fastest: convolutions are with channels last."""
    torch.set_num_threads(num_threads)
    model.to(device).eval().use_channels_last()
    return model


class _Embedder:
    """One actor of the pool: embeds loaded parts and writes them."""

    def __init__(
        self,
        extractor: ray.ObjectRef[Any],
        shared: ray.ObjectRef[Any],
        store: Store,
        node: nodes.Embed,
        use_gpu: bool,
    ) -> None:
        self.device = device_of(use_gpu)
        self.extractor = make_fast(ray.get(extractor), self.device, node.cpus_per_actor)
        loader: EvaluationLoader = fetched(shared)[0]
        self.table, self.store, self.batch_size, self.dtype = loader.reader.table, store, node.batch_size, node.dtype

    def __call__(self, block: Row) -> Row:
        notes = []
        for index, part in enumerate(block["part"].tolist()):
            try:
                self._write(part, unpack(block, index))
                notes.append("")
            except OmlRayError as error:
                notes.append(error_note(error))
        return {"part": block["part"], "rows": block["count"], "note": notes}

    @torch.inference_mode()
    def _write(self, part: int, batch: Batch) -> None:
        chunks = [torch.empty(0, self.extractor.embedding_dim)]
        if len(batch.ids):
            images = torch.from_numpy(batch.images)
            chunks += [
                self.extractor(chunk.to(self.device)).float().cpu() for chunk in torch.split(images, self.batch_size)
            ]
        embeddings = torch.cat(chunks).numpy()  # (rows, dim)
        bad = dict(zip(batch.bad.tolist(), batch.reasons, strict=True))
        self.store.write_part(part, columns_of(self.table, batch.ids), embeddings.astype(self.dtype), bad)


def columns_of(table: Table, ids: Ids) -> dict[str, Any]:
    """The table's columns at some rows, as the store keeps them beside the embeddings."""
    codes = table.categories[ids]
    names = np.array([*table.category_names, None], dtype=object)
    columns: dict[str, Any] = {
        "id": ids,
        "label": table.labels[ids],
        "path": table.paths.take(ids),
        "split": np.where(table.is_train[ids], "train", "validation"),
        "is_query": table.is_query[ids],
        "is_gallery": table.is_gallery[ids],
        "category": pa.array(names[codes], pa.string()),
        "sequence": _or_null(table.sequences[ids]),
    }
    if table.label_names is not None:
        columns["label_name"] = table.label_names.take(ids)
    if table.boxes is not None:
        columns |= {name: _or_null(table.boxes[ids, side]) for side, name in enumerate(("x_1", "y_1", "x_2", "y_2"))}
    return columns


def _or_null(codes: NDArray[Any]) -> pa.Array:
    return pa.array(codes, mask=codes < 0)
