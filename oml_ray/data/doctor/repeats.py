"""Pictures that are there more than once where that does harm: in both splits, or under several labels.

A picture in both splits lets a model be tested on what it was trained on; under two labels, one of them is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oml_ray.data.columns import Ids, Mask
from oml_ray.data.doctor.examined import Examined
from oml_ray.data.doctor.near_pairs import near_pairs
from oml_ray.data.table import Table

NEAR_BITS = 4  # of 64, in which the looks of resized or recompressed copies differ at most
NEAR_COLOR = 16  # levels of 256, by which their colours do, in each channel of each field
MAX_PAIRS = 1000

Block = tuple[Ids, Ids, NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Repeats:
    """Rows whose picture another row has too.

    Attributes:
        rows: int64 (r,), all such rows, ascending.
        pairs: int64 (p, 2), pairs of such rows, one for each pair of pictures; the thousand nearest ones.
        distances: uint8 (p,), bits in which the hashes of a pair differ, ascending.
        num_pairs: how many pairs there are.
    """

    rows: Ids
    pairs: Ids
    distances: NDArray[np.uint8]
    num_pairs: int


@dataclass(frozen=True, eq=False)
class AllRepeats:
    """Exact copies (equal pixels) and near ones (other pixels that look alike), over the splits and over labels."""

    exact_splits: Repeats
    exact_labels: Repeats
    near_splits: Repeats
    near_labels: Repeats


def repeats(table: Table, examined: Examined, near_bits: int = NEAR_BITS) -> AllRepeats:
    """Find the pictures that are in both splits, or under several labels.

    Args:
        table: N instances.
        examined: what is known of their images; of rows that are not readable nothing is said.
        near_bits: bits in which the perceptual hashes of near copies differ at most; their colours do by 16 of 256
            levels.

    Returns:
        The rows, and the nearest pairs of each kind.
    """
    pictures = _Pictures(table, examined)
    everyone = np.arange(len(pictures))
    itself = everyone, everyone, np.zeros(len(pictures), dtype=np.uint8)
    looking = np.flatnonzero(~pictures.blank)

    def near() -> Iterator[Block]:
        for firsts, seconds, distances in near_pairs(pictures.looks[looking], near_bits):
            ones, others = looking[firsts], looking[seconds]
            alike = (np.abs(pictures.colors[ones] - pictures.colors[others]) <= NEAR_COLOR).all(axis=1)
            yield ones[alike], others[alike], distances[alike]

    exact, close = _Found(pictures), _Found(pictures)
    exact.take(itself)
    for block in near():
        close.take(block)
    return AllRepeats(exact.splits(), exact.labels(), close.splits(), close.labels())


class _Pictures:
    """The M distinct pictures: each is the image of one row or more.

    Attributes:
        rows: int64 (r,), the readable rows. of_rows: int64 (r,), the picture of each.
        looks, blank, colors: as in `Examined`, of each picture; colors as int16.
        in_train, in_validation: int64 (M,), the first row of each split, -1 for none.
        lowest, highest: int64 (M,), the first row of the lowest and of the highest label.
    """

    def __init__(self, table: Table, examined: Examined) -> None:
        self.table, self.rows = table, np.flatnonzero(examined.readable)
        contents = np.ascontiguousarray(examined.contents[self.rows]).view("u8,u8").ravel()
        # In the order of their first rows, so that nothing depends on the values of hashes.
        _, first, codes = np.unique(contents, return_index=True, return_inverse=True)
        order = np.argsort(first)
        self.of_rows = np.argsort(order)[codes]
        first = self.rows[first[order]]
        self.looks, self.blank = examined.looks[first], examined.blank[first]
        self.colors = examined.colors[first].astype(np.int16)
        self.in_train = self._first(table.is_train[self.rows])
        self.in_validation = self._first(~table.is_train[self.rows])
        labels = table.labels[self.rows]
        by_label = np.lexsort((self.rows, labels, self.of_rows))
        starts = np.searchsorted(self.of_rows[by_label], np.arange(len(first)))
        self.lowest = self.rows[by_label][starts]
        by_label = np.lexsort((self.rows, ~labels, self.of_rows))  # ~labels: descending, without overflow
        self.highest = self.rows[by_label][starts]

    def __len__(self) -> int:
        return len(self.looks)

    def _first(self, chosen: Mask) -> Ids:
        first = np.full(len(self.looks), -1)
        rows, pictures = self.rows[chosen][::-1], self.of_rows[chosen][::-1]
        first[pictures] = rows  # of several values the last one stays
        return first


class _Found:
    """Collects links of pictures, in memory that does not grow with their number."""

    def __init__(self, pictures: _Pictures) -> None:
        self.pictures = pictures
        labels, size = pictures.table.labels, len(pictures)
        self.low, self.high = labels[pictures.lowest], labels[pictures.highest]
        # Of the pictures that each one is linked with: whether any is in a split, their lowest and highest label.
        self.sees_train, self.sees_validation = np.zeros((2, size), dtype=np.bool_)
        self.sees_low = np.full(size, np.iinfo(np.int64).max)
        self.sees_high = np.full(size, np.iinfo(np.int64).min)
        self._over_splits, self._over_labels = _Nearest(), _Nearest()

    def take(self, block: Block) -> None:
        """Add links of pictures."""
        pictures, (firsts, seconds, distances) = self.pictures, block
        for ones, others in ((firsts, seconds), (seconds, firsts)):
            np.logical_or.at(self.sees_train, ones, pictures.in_train[others] >= 0)
            np.logical_or.at(self.sees_validation, ones, pictures.in_validation[others] >= 0)
            np.minimum.at(self.sees_low, ones, self.low[others])
            np.maximum.at(self.sees_high, ones, self.high[others])
        forth = (pictures.in_train[firsts] >= 0) & (pictures.in_validation[seconds] >= 0)
        back = (pictures.in_validation[firsts] >= 0) & (pictures.in_train[seconds] >= 0)
        ones = np.where(forth, pictures.in_train[firsts], pictures.in_validation[firsts])
        others = np.where(forth, pictures.in_validation[seconds], pictures.in_train[seconds])
        self._over_splits.add(ones, others, distances, forth | back)
        forth, back = self.low[firsts] != self.high[seconds], self.high[firsts] != self.low[seconds]
        ones = np.where(forth, pictures.lowest[firsts], pictures.highest[firsts])
        others = np.where(forth, pictures.highest[seconds], pictures.lowest[seconds])
        self._over_labels.add(ones, others, distances, forth | back)

    def splits(self) -> Repeats:
        """Rows whose picture, or one linked with it, is in the other split."""
        pictures = self.pictures
        is_train, codes = pictures.table.is_train[pictures.rows], pictures.of_rows
        marked = np.where(is_train, self.sees_validation[codes], self.sees_train[codes])
        return self._over_splits.repeats(pictures.rows[marked])

    def labels(self) -> Repeats:
        """Rows whose picture, or one linked with it, has another label."""
        pictures = self.pictures
        labels, codes = pictures.table.labels[pictures.rows], pictures.of_rows
        marked = (self.sees_low[codes] < labels) | (self.sees_high[codes] > labels)
        return self._over_labels.repeats(pictures.rows[marked])


class _Nearest:
    """The nearest pairs of rows, and the number of all."""

    def __init__(self) -> None:
        self.pairs, self.distances, self.count = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.uint8), 0

    def add(self, ones: Ids, others: Ids, distances: NDArray[np.uint8], wanted: Mask) -> None:
        """Add the wanted ones of some pairs."""
        self.count += int(wanted.sum())
        pairs = np.sort(np.stack([ones[wanted], others[wanted]], axis=1), axis=1)
        pairs, distances = np.concatenate([self.pairs, pairs]), np.concatenate([self.distances, distances[wanted]])
        order = np.lexsort((pairs[:, 1], pairs[:, 0], distances))[:MAX_PAIRS]
        self.pairs, self.distances = pairs[order], distances[order]

    def repeats(self, rows: Ids) -> Repeats:
        """With the rows that any of the pairs is of."""
        return Repeats(rows, self.pairs, self.distances, self.count)
