"""What a table must hold: every check of its format, and every warning, over all rows at once."""

import posixpath
from collections.abc import Iterable, Sequence
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import fs

from oml_ray.data import columns as col
from oml_ray.data.columns import Ids, Mask
from oml_ray.data.filesystem import resolve

REQUIRED = ("label", "path", "split", "is_query", "is_gallery")
BOX = ("x_1", "y_1", "x_2", "y_2")
COLUMNS = (*REQUIRED, "category", "sequence", *BOX, "label_name")
FREE_TEXTS = ("path", "label_name")
_INT32_MAX = np.iinfo(np.int32).max


class Checks:
    """Reads the columns into arrays, and gathers in `problems` whatever cannot be read.

    Args:
        texts: column name -> (rows,) texts, null for empty; the known columns that the file has.
        num_rows: the number of rows.
        unknown: names of the file's other columns.
    """

    def __init__(self, texts: dict[str, pa.LargeStringArray], num_rows: int, unknown: Sequence[str] = ()) -> None:
        self.texts = texts
        self.num_rows = num_rows
        self.unknown = unknown
        self.problems: list[str] = [] if num_rows else ["there are no rows"]

    def text(self, name: str) -> pa.LargeStringArray:
        """Give a column, all empty where the file has none."""
        return self.texts[name] if name in self.texts else pa.nulls(self.num_rows, pa.large_string())

    def check(self, bad: Mask, problem: str, *names: str) -> None:
        """Note the marked rows as a problem of these columns; a column that is missing was noted before."""
        if bad.any() and all(name in self.texts for name in names):
            self.problems.append(f"{problem}: {col.name_rows(bad, *(self.texts[name] for name in names))}")

    def columns(self) -> None:
        """Check that the columns are there."""
        found = ", ".join(self.texts) or "none that is known"
        if missing := [name for name in REQUIRED if name not in self.texts]:
            hint = name_hint(self.unknown, missing)
            self.problems.append(f"missing columns: {', '.join(missing)} (found: {found}){hint}")
        if 0 < sum(name in self.texts for name in BOX) < len(BOX):
            self.problems.append(f"a box needs all four columns {', '.join(BOX)} (found: {found})")

    def labels(self) -> tuple[Ids, Mask]:
        """Read the labels, (rows,) int64, and the mask of those that are integers.

        Integers that are written as floats (`3.0`, as pandas writes a column with missing values) are integers; OML
        refuses a column of floats. Other floats are refused.
        """
        labels, bad = col.parse_integers(self.text("label"))
        bad |= col.is_empty(self.text("label"))
        self.check(bad, "label is not an integer", "label")
        return labels, ~bad

    def paths(self, root: str) -> pa.LargeStringArray:
        """Read the paths, (rows,) texts."""
        paths = self.text("path")
        self.check(col.is_empty(paths), "path is empty", "path")
        self.check(_outside(paths, root), f"path leads out of {root} (move it there, or set data.root)", "path")
        return paths

    def splits(self) -> tuple[Mask, Mask]:
        """Read the masks of the train and of the validation split."""
        split = pc.utf8_trim_whitespace(self.text("split"))
        is_train, is_validation = (col.as_mask(pc.equal(split, name)) for name in ("train", "validation"))
        self.check(~is_train & ~is_validation, "split is neither 'train' nor 'validation'", "split")
        return is_train, is_validation

    def flags(self, is_train: Mask, is_validation: Mask, labels: Ids, is_label: Mask) -> tuple[Mask, Mask]:
        """Read the masks of queries and gallery, and check that each query's label is in the gallery.

        False on the train split is as good as empty; OML wants it empty. True is refused there.
        """
        masks = []
        for name in ("is_query", "is_gallery"):
            mask, bad = col.parse_flags(self.text(name))
            bad |= is_validation & col.is_empty(self.text(name))
            self.check(bad, f"{name} is not a boolean (True, False, 1, 0, or empty on train)", name)
            self.check(mask & is_train, f"{name} is true on the train split", name)
            masks.append(mask & is_validation)
        is_query, is_gallery = masks
        idle = is_validation & ~is_query & ~is_gallery
        self.check(idle, "is_query and is_gallery are both not true on validation", "is_query", "is_gallery")
        lost = is_query & is_label & ~np.isin(labels, labels[is_gallery & is_label])
        self.check(lost & ("is_gallery" in self.texts), "a query's label is not in the gallery", "label")
        return is_query, is_gallery

    def sequences(self) -> tuple[Ids, int]:
        """Read the sequences, (rows,) int64 codes, -1 for none, and count the rows of -1, which is no sequence."""
        text = self.text("sequence")
        is_minus_one = pc.is_in(pc.utf8_trim_whitespace(text), value_set=pa.array(["-1", "-1.0"], pa.large_string()))
        codes, _ = col.parse_codes(pc.if_else(is_minus_one, None, text))
        return codes, int(col.as_mask(is_minus_one).sum())

    def boxes(self) -> NDArray[np.int32] | None:
        """Read the boxes, (rows, 4) int32, -1 for none; None when the file has no boxes."""
        if not all(name in self.texts for name in BOX):
            return None
        empty = np.stack([col.is_empty(self.texts[name]) for name in BOX], axis=1)  # (rows, 4)
        some: Mask = np.logical_or.reduce(empty, axis=1)
        boxes = np.full((self.num_rows, 4), -1, dtype=np.int64)
        bad = np.zeros((self.num_rows, 4), dtype=np.bool_)
        for side, name in enumerate(BOX):
            boxes[:, side], bad[:, side] = col.parse_integers(self.texts[name])
            bad[:, side] |= np.abs(boxes[:, side]) > _INT32_MAX
            self.check(bad[:, side], f"{name} is not a whole number of pixels", name)
        self.check(some & ~np.logical_and.reduce(empty, axis=1), "a box has some sides but not all four", *BOX)
        whole: Mask = ~np.logical_or.reduce(empty | bad, axis=1)
        negative = whole & (boxes.min(axis=1) < 0)
        self.check(negative, "a box starts left of or above the image (a side is negative)", *BOX)
        for first, last in (("x_1", "x_2"), ("y_1", "y_2")):
            low, high = boxes[:, BOX.index(first)], boxes[:, BOX.index(last)]
            self.check(whole & (low > high), f"a box is inverted ({first} > {last})", first, last)
            self.check(whole & (low == high), f"a box is empty ({first} = {last})", first, last)
        return np.where(whole[:, None], boxes, -1).astype(np.int32)


def name_hint(names: Sequence[str], known: Sequence[str]) -> str:
    """End of a message on columns whose names are known ones but for case and spaces; empty where there are none.

    Example:
        >>> name_hint(["Label", " path", "colour"], ("label", "path"))
        "; names are exact: rename 'Label' to label, ' path' to path"
    """
    near = [f"{name!r} to {plain}" for name in names if (plain := name.strip().lower()) in known and plain != name]
    return f"; names are exact: rename {', '.join(near)}" if near else ""


def find_warnings(
    labels: Ids, is_train: Mask, paths: pa.LargeStringArray, boxes: NDArray[np.int32] | None, categories: Ids
) -> list[str]:
    """Find what is allowed but seldom meant.

    Args:
        labels: (rows,) int64.
        is_train: (rows,).
        paths: (rows,) texts.
        boxes: (rows, 4) int32 or None.
        categories: (rows,) integer codes, -1 for none.

    Returns:
        One line each.
    """
    warnings = []

    def warn(found: Ids, what: str) -> None:
        if len(found):
            first = ", ".join(map(str, found[:5].tolist())) + (", ..." if len(found) > 5 else "")
            warnings.append(f"{len(found):,} {what}: {first}")

    warn(np.intersect1d(labels[is_train], labels[~is_train]), "labels are in both splits")
    repeated = ~col.first_of_each(col.encode(paths)[0], *([] if boxes is None else boxes.T))
    warn(np.flatnonzero(repeated), "rows repeat the image (path and box) of an earlier row")
    distinct, counts = np.unique(labels[is_train], return_counts=True)
    warn(distinct[counts == 1], "train labels have a single instance")
    known = categories >= 0
    pairs = col.first_of_each(labels[known], categories[known])
    distinct, counts = np.unique(labels[known][pairs], return_counts=True)
    warn(distinct[counts > 1], "labels have several categories")
    return warnings


def name_warnings(unknown: Sequence[str], known: Iterable[str]) -> list[str]:
    """Warn of ignored columns whose names are those of optional columns but for case and spaces."""
    absent = [name for name in COLUMNS if name not in known]
    hint = name_hint(unknown, absent)
    return [f"columns are ignored{hint}"] if hint else []


def sequence_warnings(sequences: Ids, num_minus_one: int) -> list[str]:
    """Warn of sequences that are most likely a word for a missing value.

    Args:
        sequences: (rows,) int64 codes, -1 for none.
        num_minus_one: rows of sequence -1.
    """
    warnings = []
    if num_minus_one:
        warnings.append(f"{num_minus_one:,} rows have the sequence -1, which is read as none")
    counts = np.bincount(sequences[sequences >= 0], minlength=1)
    if 2 * counts.max() > len(sequences) > 1:
        warnings.append(
            f"{counts.max():,} of {len(sequences):,} rows are of one sequence, and never retrieve each other; the "
            f"first is row {int(np.argmax(sequences == counts.argmax()))}"
        )
    return warnings


def _outside(paths: pa.LargeStringArray, root: str) -> Mask:
    """Mark the local paths and `file://` URIs that lead out of the root; URIs of other places may stand anywhere."""
    has_scheme = pc.match_substring_regex(paths, r"^[A-Za-z][A-Za-z0-9+.\-]*://")
    suspect = pc.or_(
        pc.and_not(pc.match_substring_regex(paths, r"^/|(^|/)\.\.(/|$)"), has_scheme),
        pc.match_substring_regex(paths, r"^(?i:file)://"),
    )
    rows = np.flatnonzero(col.as_mask(suspect))
    # one look per directory, not per row; a last `..` is no file name
    directories = pc.extract_regex(paths.take(pa.array(rows)), r"(?s)^(?P<directory>(?:.*/)?(?:\.\.$)?)")
    codes, distinct = col.encode(pc.struct_field(directories, 0))
    filesystem, base = resolve(root)
    inside = base if isinstance(filesystem, fs.LocalFileSystem) else None
    escapes = np.array([_escapes(name, inside) for name in distinct], dtype=np.bool_)
    outside = np.zeros(len(paths), dtype=np.bool_)
    outside[rows] = escapes[codes]
    return outside


def _escapes(directory: str, root: str | None) -> bool:
    # no local path lies inside a root elsewhere; there only the depth of `..` counts
    if "://" in directory:
        try:
            split = urlsplit(directory, allow_fragments=False)
        except ValueError:  # such as [ in place of a host
            return True
        if split.netloc or root is None:
            return True
        directory = unquote(split.path)
    elif root is None and directory.startswith("/"):
        return True
    base = posixpath.normpath(root or "/root")
    return posixpath.commonpath([base, posixpath.normpath(posixpath.join(base, directory))]) != base
