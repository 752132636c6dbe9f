"""From config nodes to tables, plans and loaders."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs

from oml_ray.build.arguments import arguments
from oml_ray.config import TrainConfig, nodes
from oml_ray.data import samplers, transforms
from oml_ray.data.figures import write_figures
from oml_ray.data.filesystem import exists, is_uri, join, resolve
from oml_ray.data.images import EvaluationLoader, ImageReader, TrainingLoader
from oml_ray.data.plan import Plan
from oml_ray.data.stream import ItemLoader
from oml_ray.data.table import Table, check_files_exist, read_table
from oml_ray.storage.copying import upload
from oml_ray.training.context import LocalStream
from oml_ray.training.pairs import EmbeddingLoader, Mined

FIGURES = "figures"

TRANSFORMS: dict[str, Callable[..., transforms.Transform]] = {
    "resize": transforms.Resize,
    "resize_flip": transforms.ResizeFlip,
    "resize_crop": transforms.ResizeCrop,
    "crop_flip": transforms.CropFlip,
    "random_resized_crop": transforms.RandomResizedCrop,
}
SAMPLERS: dict[str, Callable[[Any, Table], samplers.Sampler]] = {
    "balance": lambda node, table: samplers.BalanceSampler(table.train_ids, _train_labels(table), **arguments(node)),
    "category_balance": lambda node, table: samplers.CategoryBalanceSampler(
        table.train_ids, _train_labels(table), _train_categories(table), **arguments(node)
    ),
    "distinct_category_balance": lambda node, table: samplers.DistinctCategoryBalanceSampler(
        table.train_ids, _train_labels(table), _train_categories(table), **arguments(node)
    ),
    "random": lambda node, table: samplers.RandomSampler(table.train_ids, **arguments(node)),
}


def table(data: nodes.Data, storage: str, *, check_files: bool = True) -> Table:
    """Read the table, generating the figures under `storage` if they are asked for.

    Args:
        data: names the table.
        storage: where the figures are generated.
        check_files: whether every image file must be there; False where the images are embedded already.

    Raises:
        TableError: everything that is wrong with it.
    """
    source = figures_table(storage) if data.table == FIGURES else data.table
    found = read_table(source, data.root)
    if check_files:
        check_files_exist(found)
    return found


def figures_table(storage: str) -> str:
    """Path or URI of the generated data set's table under `storage`, generating it once."""
    # A run's name cannot begin with an underscore: no run can take this folder.
    folder = join(storage, "_figures")
    filesystem, remote = resolve(folder)
    if not is_uri(storage) or isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return str(write_figures(remote))
    table = join(folder, "df.csv")
    if not exists(table):
        with tempfile.TemporaryDirectory() as local:
            write_figures(Path(local) / FIGURES)
            for part in ("images", "df.csv"):  # the table last: where it is, everything is
                upload(Path(local) / FIGURES / part, filesystem, f"{remote}/{part}")
    return table


def plan(config: TrainConfig, table: Table, mined: Mined | None = None) -> Plan:
    """Plan the global batches of a config; those of pairs from what was mined."""
    node = config.sampler
    if isinstance(node, nodes.HardPairsSampler):
        assert mined is not None
        labels = table.labels[mined.train]
        sequences, given = table.sequences[mined.train], arguments(node, without=["depth"])
        pairs = samplers.HardPairsSampler(mined.train, labels, mined.nearest, sequences=sequences, **given)
        return Plan(pairs, config.seed)
    return Plan(SAMPLERS[node.name](node, table), config.seed)


def transform(node: nodes.Transform) -> transforms.Transform:
    """Build a transform."""
    built = TRANSFORMS[node.name](**arguments(node, without=["jitter"]))
    jitter = getattr(node, "jitter", None)
    return built if jitter is None else transforms.ColorJitter(built, **arguments(jitter))


def loaders(config: TrainConfig, table: Table, mined: Mined | None = None) -> tuple[ItemLoader, ItemLoader]:
    """Build what loads planned batches, and what loads rows to be judged."""
    if isinstance(config.model, nodes.LinearSiamese):
        assert mined is not None
        reader = image_reader(config.data, table)
        loader = EmbeddingLoader(reader, mined.embeddings, mined.embedded)
        return loader, loader
    return training_loader(config, table), evaluation_loader(config.data, table, config.transforms.eval)


def image_reader(data: nodes.Data, table: Table) -> ImageReader:
    """Build what reads a table's rows as images, by the rules of the config's data section."""
    return ImageReader(table, max_pixels=data.max_pixels, exif=data.exif, background=data.background)


def training_loader(config: TrainConfig, table: Table) -> TrainingLoader:
    """Build what loads planned batches of images."""
    return TrainingLoader(
        image_reader(config.data, table),
        transform(config.transforms.train),
        seed=config.seed,
        on_bad_image=config.data.on_bad_image,
    )


def evaluation_loader(data: nodes.Data, table: Table, node: nodes.EvalTransform) -> EvaluationLoader:
    """Build what loads rows to embed."""
    return EvaluationLoader(image_reader(data, table), transform(node), on_bad_image=data.on_bad_image)


def local_stream(config: TrainConfig, table: Table, mined: Mined | None = None) -> LocalStream:
    """Build a stream that needs no Ray."""
    return LocalStream(plan(config, table, mined), *loaders(config, table, mined))


def _train_labels(table: Table) -> samplers.Ids:
    return table.labels[table.train_ids]


def _train_categories(table: Table) -> samplers.Ids:
    return table.categories[table.train_ids].astype(np.int64)
