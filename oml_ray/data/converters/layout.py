"""What all converters do: find the files of a raw layout, read their columns, and say what is not as it should be."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from oml_ray.errors import ConfigError, StorageError, TableError, reason_of


@dataclass(frozen=True)
class Conversion:
    """The rows of a table, and what its user should know about them.

    Args:
        frame: the table's columns; an empty text for no value, and paths relative to the folder of the data set.
        notes: what was dropped, and what is not as in the whole data set; one line each.
    """

    frame: pd.DataFrame
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """A folder that should hold a data set as its publisher packs it.

    Args:
        name: of the data set.
        source: the folder.
        expected: what it should be and hold, as the end of a message.
        inside: a folder that is meant if it lies in the source and the source itself has no `marker`.
        marker: a file that tells them apart.

    Raises:
        StorageError: there is no such folder.
    """

    name: str
    source: Path
    expected: str
    inside: str = ""
    marker: str = ""

    def __post_init__(self) -> None:
        if not self.source.is_dir():
            raise StorageError(f"{self.name}: there is no folder {self.source}. It should be {self.expected}.")

    @property
    def root(self) -> Path:
        """The source, or the folder in it that is meant."""
        inner = self.source / self.inside
        return inner if inner.is_dir() and not (self.source / self.marker).exists() else self.source

    def find(self, *places: str) -> Path:
        """Give the first of these files or folders that is there.

        Raises:
            StorageError: none is.
        """
        for place in places:
            if (self.root / place).exists():
                return self.root / place
        missing = " or ".join(places)
        raise StorageError(f"{self.name}: there is no {missing} in {self.root}. SRC should be {self.expected}.")

    def paths(self, names: pd.Series[str]) -> pd.Series[str]:
        """Give the paths, relative to the source, of images that are named relative to the root."""
        inside = self.root.relative_to(self.source).as_posix()
        return names if inside == "." else f"{inside}/" + names

    def read(self, file: Path, names: Sequence[str], header: int | None = None) -> pd.DataFrame:
        """Read the columns of a file, with white space between them, as texts.

        Args:
            file: the file.
            names: of all its columns.
            header: the line, from 0, that should hold the names; rows follow. None for a file of rows alone.

        Raises:
            TableError: it cannot be read, has other names, or a row has more or fewer columns.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # the first row has more columns
                frame = pd.read_csv(
                    file,
                    sep=r"\s+",
                    header=header,
                    names=list(names) if header is None else None,
                    index_col=False,
                    dtype=str,
                    keep_default_na=False,
                    quoting=csv.QUOTE_NONE,
                )
        except (OSError, ValueError, pd.errors.ParserWarning) as error:
            wanted = f"{self.name}: {file} cannot be read as rows of {', '.join(names)}"
            raise TableError(f"{wanted}: {reason_of(error)}") from None
        if list(frame) != list(names):
            raise TableError(f"{self.name}: line {header} (from 0) of {file} should be {' '.join(names)!r}.")
        for name in names:
            self.check(file, frame[name], frame[name] == "", "missing")
        return frame

    def numbers(self, file: Path, texts: pd.Series[str]) -> pd.Series[float]:
        """Take a column of a file as float64.

        Raises:
            TableError: a text is no number.
        """
        numbers = pd.to_numeric(texts, errors="coerce").astype(np.float64)
        self.check(file, texts, ~pd.Series(np.isfinite(numbers), index=texts.index), "not a number")
        return numbers

    def integers(self, file: Path, texts: pd.Series[str]) -> pd.Series[int]:
        """Take a column of a file as int64.

        Raises:
            TableError: a text is no integer.
        """
        numbers = self.numbers(file, texts)
        self.check(file, texts, numbers % 1 != 0, "not an integer")
        return numbers.astype(np.int64)

    def labels(self, file: Path, texts: pd.Series[str], most: int) -> pd.Series[int]:
        """Take a column of a file as labels, int64 from 1 to `most`.

        Raises:
            TableError: a text is none of them.
        """
        labels = self.integers(file, texts)
        self.check(file, texts, (labels < 1) | (labels > most), f"not a label from 1 to {most:,}")
        return labels

    def check(self, file: Path, texts: pd.Series[str], bad: pd.Series[bool], what: str) -> None:
        """Check that no row of a column is marked as bad.

        Raises:
            TableError: one is; names how many and the first.
        """
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise TableError(
                f"{self.name}: {file}: {texts.name} is {what} in {bad.sum():,} of {len(bad):,} rows; the first is row "
                f"{row} (from 0) with {texts.iloc[row]!r}. SRC should be {self.expected}."
            )

    def compare(self, labels: pd.Series[int], images: int, num_labels: int) -> list[str]:
        """Note it if there are other numbers of images and labels than the whole data set has."""
        found, whole = (len(labels), labels.nunique()), (images, num_labels)
        if found == whole:
            return []
        return [f"not the whole data set: {found[0]:,} of {images:,} images, {found[1]:,} of {num_labels:,} labels"]


def check_protocol(name: str, protocol: str, known: Sequence[str]) -> None:
    """Check that a data set has this protocol.

    Raises:
        ConfigError: it does not; lists those that it has.
    """
    if protocol not in known:
        raise ConfigError(f"{name}: there is no protocol {protocol!r}; it has {', '.join(known)} (--protocol).")


def splits(is_train: pd.Series[bool]) -> dict[str, NDArray[np.str_]]:
    """Give the columns of the splits where each validation image is both query and gallery, 1 against the rest.

    Args:
        is_train: (rows,) False for validation.

    Example:
        >>> splits(pd.Series([True, False]))["is_query"].tolist()
        ['', 'True']
    """
    both = np.where(is_train, "", "True")
    return {"split": np.where(is_train, "train", "validation"), "is_query": both, "is_gallery": both}
