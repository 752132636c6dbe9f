"""The images that a suite works on: of a table that is given, or generated."""

from __future__ import annotations

from pathlib import Path

from oml_ray.data.figures import write_figures


def images_of(table: str | None, root: str | None, folder: Path) -> tuple[str, str]:
    """Path of a CSV table of images, and what its paths are relative to.

    Args:
        table: the path, e.g. of emoji's; None for the generated figures.
        root: what its paths are relative to; None for its folder.
        folder: for the generated ones.
    """
    table = table or str(write_figures(folder / "figures"))
    return table, root or str(Path(table).parent)
