"""All that the doctor finds in the images of a table, and how it is told in a few lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oml_ray.data.columns import Ids
from oml_ray.data.doctor.examined import Examined
from oml_ray.data.doctor.measures import TINY_SHARE, TINY_SIDE, Measures, measures, quantiles
from oml_ray.data.doctor.repeats import NEAR_BITS, AllRepeats, repeats
from oml_ray.data.table import Table


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What the images of a table tell.

    Attributes:
        num_rows: rows of the table.
        unreadable: int64, rows that cannot be decoded. reasons: row id -> why, of the first thousand.
        blank: int64, rows whose image is of one brightness.
        turned: int64, rows whose EXIF orientation is not upright.
        transparent: int64, rows whose image has transparent pixels.
        wide: int64, rows whose image is grey of more than 8 bits.
        repeats: copies over the splits and over labels.
        measures: sizes and boxes.
    """

    num_rows: int
    unreadable: Ids
    reasons: dict[int, str]
    blank: Ids
    turned: Ids
    transparent: Ids
    wide: Ids
    repeats: AllRepeats
    measures: Measures


def diagnose(table: Table, examined: Examined) -> Diagnosis:
    """Judge what is known of a table's images."""
    return Diagnosis(
        len(table),
        np.flatnonzero(~examined.readable),
        dict(sorted(examined.reasons.items())),
        np.flatnonzero(examined.blank),
        np.flatnonzero(examined.turned),
        np.flatnonzero(examined.transparent),
        np.flatnonzero(examined.wide),
        repeats(table, examined),
        measures(table, examined),
    )


def told(diagnosis: Diagnosis) -> str:
    """Tell a diagnosis in a few lines; without findings there is no line that warns."""
    measured, found = diagnosis.measures, diagnosis.repeats
    lines = [f"images: {diagnosis.num_rows - len(diagnosis.unreadable)} of {diagnosis.num_rows} are readable"]
    for name, values in measured.values.items():
        low, middle, high = (quantiles(values)[place] for place in (0, 3, -1))
        lines.append(f"  {name}: {low:.4g} to {high:.4g}, median {middle:.4g}")
    for rows, what in (
        (diagnosis.unreadable, "images cannot be read"),
        (found.exact_splits.rows, "rows have a picture that is also in the other split"),
        (found.exact_labels.rows, "rows have a picture that is also under another label"),
        (found.near_splits.rows, f"rows have a near copy (at most {NEAR_BITS} of 64 bits) in the other split"),
        (found.near_labels.rows, f"rows have a near copy (at most {NEAR_BITS} of 64 bits) under another label"),
        (diagnosis.blank, "images are of one brightness, and not looked for near copies"),
        (measured.tiny, f"images or boxes have a side of less than {TINY_SIDE} pixels"),
        (measured.outside, "boxes leave their image"),
        (measured.small, f"boxes cover less than {TINY_SHARE:.0%} of their image"),
    ):
        if len(rows):
            lines.append(f"  warning: {named(rows, what)}")
    return "\n".join([*lines, *(f"  note: {note}" for note in decoding_notes(diagnosis))])


def decoding_notes(diagnosis: Diagnosis) -> list[str]:
    """Notes on images that are read by a rule of the config or of `image_modes`; these are no faults."""
    rules = (
        (diagnosis.turned, "images have an EXIF orientation (data.exif: apply turns them upright, ignore does not)"),
        (diagnosis.transparent, "images have transparent pixels, composited over data.background"),
        (diagnosis.wide, "grey images have more than 8 bits, scaled to 8 (16-bit: value / 257; others: own range)"),
    )
    return [named(rows, what) for rows, what in rules if len(rows)]


def named(rows: Ids, what: str) -> str:
    """How many rows something is true of, and the first of them.

    Example:
        >>> named(np.array([3, 8]), "images are blank")
        '2 images are blank: rows 3, 8'
    """
    return f"{len(rows):,} {what}: rows {', '.join(map(str, rows[:5].tolist()))}" + (", ..." if len(rows) > 5 else "")
