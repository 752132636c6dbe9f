"""A folder of images: one folder per label."""

from pathlib import Path

import numpy as np
import pandas as pd

from oml_ray.data.converters.layout import Conversion, Layout, splits
from oml_ray.data.queries import list_images
from oml_ray.errors import ConfigError, TableError

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def convert_folder(source: Path, validation_share: float = 0.5, seed: int | None = None) -> Conversion:
    """Convert a folder of images; labels are its folders, and none of them both trains and validates.

    Args:
        source: the folder. All images below one of its folders, however deep, are of one label; hidden files and
            folders, and files whose names are not those of images, are passed over.
        validation_share: of the labels, 0 to 1, rounded to the nearest.
        seed: what the labels of validation are drawn from; None takes the last ones in the order of their names, as the
            literature does with CUB and CARS.

    Returns:
        The rows in the order of their paths; labels are positions, from 0, among the sorted names of the folders, which
        are kept as `label_name`. On validation each image is both query and gallery.

    Raises:
        StorageError: there is no such folder, or it cannot be listed.
        TableError: it has no images, or images outside of its folders.
        ConfigError: the share or the seed is out of its range.
    """
    if not 0 <= validation_share <= 1:
        raise ConfigError(f"folder: the validation share must lie between 0 and 1, not {validation_share}.")
    if seed is not None and seed < 0:
        raise ConfigError(f"folder: the seed must be 0 or more, not {seed}.")
    layout = Layout("folder", source, "a folder that holds a folder of images for each label")
    names, num_others = list_images(str(layout.source))
    if stray := [name for name in names if "/" not in name]:
        raise TableError(
            f"folder: {len(stray):,} images lie in {source} itself, where no folder gives them a label: "
            f"{', '.join(stray[:5])}. SRC should be {layout.expected}."
        )
    label_names = sorted({name.split("/")[0] for name in names})
    if not label_names:
        raise TableError(f"folder: there are no images in {source}. SRC should be {layout.expected}.")
    if _SPLITS.issuperset(name.lower() for name in label_names):
        raise TableError(
            f"folder: the folders of {source} are splits, not labels: {', '.join(label_names)}. Convert one of "
            "them, or put the folders of their labels together: splits are made by label."
        )
    num_labels = len(label_names)
    order = (
        np.arange(num_labels) if seed is None else np.random.Generator(np.random.PCG64(seed)).permutation(num_labels)
    )
    validation = order[num_labels - int(num_labels * validation_share + 0.5) :]
    positions = {name: position for position, name in enumerate(label_names)}
    labels = pd.Series([positions[name.split("/")[0]] for name in names], dtype=np.int64)
    frame = pd.DataFrame({"label": labels, "path": names}).assign(**splits(~labels.isin(validation)), category="")
    frame["label_name"] = [name.split("/")[0] for name in names]
    return Conversion(frame, [f"passed over: {num_others:,} files that are no images"] if num_others else [])
