"""Converters: data sets as their publishers pack them become tables."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pyarrow as pa
from PIL import Image

from oml_ray.data.audit import audit
from oml_ray.data.converters.cars import convert_cars
from oml_ray.data.converters.cub import convert_cub
from oml_ray.data.converters.emoji import convert_emoji
from oml_ray.data.converters.folder import convert_folder
from oml_ray.data.converters.inshop import convert_inshop
from oml_ray.data.converters.layout import Conversion
from oml_ray.data.converters.sop import convert_sop
from oml_ray.data.filesystem import is_uri
from oml_ray.data.image_decoding import FORMATS
from oml_ray.data.image_modes import upright_size
from oml_ray.data.table import Table, check_files_exist, table_of
from oml_ray.data.table_checks import BOX
from oml_ray.errors import ConfigError, StorageError, TableError

CONVERTERS: dict[str, Callable[..., Conversion]] = {
    "cub": convert_cub,
    "cars": convert_cars,
    "sop": convert_sop,
    "inshop": convert_inshop,
    "folder": convert_folder,
    "emoji": convert_emoji,
}

__all__ = ["CONVERTERS", "Conversion", "convert"]


def convert(name: str, source: str | os.PathLike[str], target: str | os.PathLike[str], **options: object) -> str:
    """Write the table of a data set, whole or not at all.

    Args:
        name: the converter.
        source: the data set's folder, a local path; the table's paths are relative to it.
        target: the table to write, a local path that ends in `.csv`; a file that is there is replaced.
        options: those of the converter.

    Returns:
        What was written, in a few lines: the table's audit, the converter's notes, and how a config names both.

    Raises:
        ConfigError: there is no such converter or option.
        StorageError: files of the data set are missing, or the table cannot be written.
        TableError: files are damaged, or images are missing that they list.

    Example:
        >>> import tempfile
        >>> source = Path(tempfile.mkdtemp())
        >>> for name in ("cats/1.png", "cats/2.png", "dogs/1.png"):
        ...     (source / name).parent.mkdir(exist_ok=True)
        ...     (source / name).touch()
        >>> print(convert("folder", source, source / "df.csv").splitlines()[1])
          train: 2 instances of 1 labels, 2 to 2 instances each
    """
    if name not in CONVERTERS:
        raise ConfigError(f"convert: there is no data set {name!r}; it knows {', '.join(CONVERTERS)}.")
    known = list(inspect.signature(CONVERTERS[name]).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        flags = [", ".join(f"--{option.replace('_', '-')}" for option in names) for names in (unknown, known)]
        raise ConfigError(f"convert {name}: there is no {flags[0]} here; its options: {flags[1] or 'none'}.")
    for place in (source, target):
        if is_uri(place):
            raise StorageError(f"convert {name}: {place} must be a local path, not a URI.")
    root, out = (Path(os.path.abspath(os.path.expanduser(place))) for place in (source, target))
    if out.suffix.lower() != ".csv":
        raise ConfigError(f"convert {name}: {out} must end in .csv.")
    conversion = CONVERTERS[name](root, **options)
    frame, notes = conversion.frame, conversion.notes
    if (odd := frame["path"].str.contains("\r", regex=False)).any():
        raise TableError(
            f"{name}: {odd.sum():,} names of images hold a carriage return, which a CSV file loses: rename them."
        )
    try:
        check_files_exist(_table(frame.drop(columns=list(BOX), errors="ignore"), out, root))
    except TableError as error:
        raise TableError(f"{name}: {root} is no whole data set, and nothing was written: {error}") from None
    if BOX[0] in frame:
        frame, cut = _cut(frame, root)
        notes = [*notes, *cut]
    table = _table(frame, out, root)
    _write(frame, out)
    lines = [audit(table), *(f"  {note}" for note in notes)]
    keys = " ".join(shlex.quote(f"data.{key}={_as_yaml(place)}") for key, place in (("table", out), ("root", root)))
    return "\n".join([*lines, f"Its paths are relative to {root}: --set {keys}"])


def _as_yaml(place: Path) -> str:
    """A path as `--set` reads it: JSON's strings are YAML's."""
    path = str(place)
    return path if re.fullmatch(r"/(?:[\w/.,+@~ -]*[\w/.])?", path) else json.dumps(path, ensure_ascii=False)


def _table(frame: pd.DataFrame, out: Path, root: Path) -> Table:
    return table_of(pa.Table.from_pandas(frame, preserve_index=False), str(out), root)


def _cut(frame: pd.DataFrame, root: Path) -> tuple[pd.DataFrame, list[str]]:
    """Cut boxes to their images: those of data sets may reach beyond the edges, where a table's may not."""
    limits, unreadable = [], []
    for path, *box in frame[["path", *BOX]].itertuples(index=False):
        try:
            with Image.open(root / path, formats=FORMATS) as image:
                limits.append([*upright_size(image), *upright_size(image)])
        except Exception:  # Pillow's plugins raise anything on damaged files
            unreadable.append(path)
            limits.append(box)
    boxes = frame[list(BOX)].clip(lower=0).clip(upper=pd.DataFrame(limits, columns=list(BOX), index=frame.index))
    changed = (boxes != frame[list(BOX)]).any(axis=1).sum()
    notes = [f"cut to their images: {changed:,} boxes"] if changed else []
    if unreadable:
        notes.append(f"not readable, with boxes as they are: {len(unreadable):,} images ({', '.join(unreadable[:3])})")
    return frame.assign(**boxes), notes


def _write(frame: pd.DataFrame, out: Path) -> None:
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(part, index=False, lineterminator="\n")
        part.replace(out)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error}") from None
    finally:
        with suppress(OSError):  # it is not there, or its folder is none
            part.unlink()
