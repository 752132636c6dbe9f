"""Measures of images and boxes: how they are spread, and the rows that few would want."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oml_ray.data.columns import Ids
from oml_ray.data.doctor.examined import Examined
from oml_ray.data.table import Table

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
TINY_SIDE = 32  # pixels of the shorter side: below, there is hardly anything to learn from
TINY_SHARE = 0.01  # of the image's area


@dataclass(frozen=True, eq=False)
class Measures:
    """What the sizes of images and boxes tell.

    Attributes:
        values: name -> float64 (n,), one value an image: its width, height and their ratio, and the box's share of the
            image's area; without those that nothing is known of.
        tiny: int64, rows whose image, or what the box cuts out, has a side of less than 32 pixels.
        outside: int64, rows whose box leaves the image.
        small: int64, rows whose box covers less than a hundredth of the image.
    """

    values: dict[str, NDArray[np.float64]]
    tiny: Ids
    outside: Ids
    small: Ids


def measures(table: Table, examined: Examined) -> Measures:
    """Measure images and boxes.

    Args:
        table: N instances.
        examined: what is known of their images. Rows that are not readable count only where their box leaves the image.
    """
    width, height = examined.sizes.T.astype(np.float64)
    seen = np.stack([width, height])
    outside, share = np.zeros(len(table), dtype=np.bool_), np.ones(len(table))
    boxed = np.zeros(len(table), dtype=np.bool_)
    if table.boxes is not None:
        left, top, right, bottom = table.boxes.T.astype(np.float64)
        boxed = (left >= 0) & (width > 0)
        outside = boxed & ((right > width) | (bottom > height))
        seen = np.where(boxed, [right - left, bottom - top], seen)
        np.divide(seen.prod(axis=0), width * height, out=share, where=boxed)
    readable = examined.readable
    values = {
        "width": width[readable],
        "height": height[readable],
        "width / height": width[readable] / height[readable],
        "share of the box": share[boxed & readable],
    }
    return Measures(
        {name: known for name, known in values.items() if len(known)},
        np.flatnonzero(readable & (seen.min(axis=0) < TINY_SIDE)),
        np.flatnonzero(outside),
        np.flatnonzero(readable & boxed & (share < TINY_SHARE)),
    )


def quantiles(values: NDArray[np.float64]) -> list[float]:
    """Quantiles of some values, at `QUANTILES`; each is one of the values.

    Example:
        >>> quantiles(np.array([3.0, 1.0, 2.0]))
        [1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    """
    found: list[float] = np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
    return found


def label_overlap(table: Table) -> NDArray[np.int64]:
    """Labels that are in both splits.

    Returns:
        int64 (labels, 3): label, its rows in train, its rows in validation; ascending.
    """
    (train, in_train), (validation, in_validation) = (
        np.unique(table.labels[ids], return_counts=True) for ids in (table.train_ids, table.validation_ids)
    )
    both, ones, others = np.intersect1d(train, validation, assume_unique=True, return_indices=True)
    return np.stack([both, in_train[ones], in_validation[others]], axis=1)
