"""What the tests of all converters share: images of a made-up data set, and its table, checked and as rows."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

from oml_ray.data.converters import convert
from oml_ray.data.table import check_files_exist, read_table


def write_images(folder: Path, *names: str, size: tuple[int, int] = (40, 30)) -> None:
    """Write images of this width and height."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name, format="JPEG")


def converted(name: str, source: Path, **options: object) -> tuple[str, list[str], list[str]]:
    """Convert, read the table back as everyone would, and give its header, its rows as written, and what was told."""
    target = source.parent / "tables" / f"{name}.csv"
    told = convert(name, source, target, **options).splitlines()
    check_files_exist(read_table(target, source))
    with open(target, newline="", encoding="utf-8") as file:
        header, *rows = [",".join(row) for row in csv.reader(file)]
    return header, rows, told
