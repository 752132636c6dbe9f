"""What the data set doctor found, as its page shows it: words, numbers and pictures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from oml_ray.data.columns import Ids
from oml_ray.data.doctor import Diagnosis
from oml_ray.data.doctor.measures import TINY_SHARE, TINY_SIDE, quantiles
from oml_ray.data.doctor.repeats import NEAR_BITS, Repeats
from oml_ray.data.images import ImageReader
from oml_ray.distributed.reporting import THUMBNAIL
from oml_ray.errors import ImageError
from oml_ray.retrieval.report.doctor_page import Finding, Measure
from oml_ray.retrieval.report.search_page import SearchItem
from oml_ray.retrieval.suspects import NUM_VOTES, Suspects

GROUPS_SHOWN = 24  # of each finding: a page must not grow with the faults of the data

ONE_SPLIT = "The store holds one split: copies between splits need one made with data.split: all."
_LEAK = "A model is tested on what it was trained on."
_TWO_LABELS = "One of the two labels is wrong, or the picture shows both."


def of_images(reader: ImageReader, diagnosis: Diagnosis) -> list[Finding]:
    """What was found in the images themselves."""
    found, measured = diagnosis.repeats, diagnosis.measures
    exact = "Equal pixels, whatever the files."
    near = (
        f"Perceptual hashes that differ in at most {NEAR_BITS} of 64 bits, which is the number, and nearly equal "
        "colours: most likely resized or compressed anew."
    )
    return [
        Finding("Images that cannot be read", "", len(diagnosis.unreadable)),
        _pairs(reader, found.exact_splits, "Pictures in both splits", f"{exact} {_LEAK}", with_distance=False),
        _pairs(reader, found.exact_labels, "Pictures under two labels", f"{exact} {_TWO_LABELS}", with_distance=False),
        _pairs(reader, found.near_splits, "Near copies in both splits", f"{near} {_LEAK}"),
        _pairs(reader, found.near_labels, "Near copies under two labels", f"{near} {_TWO_LABELS}"),
        _rows(reader, diagnosis.blank, "Images of one brightness", "No near copies are looked for among them."),
        _rows(
            reader,
            measured.tiny,
            "Tiny images",
            f"A side of the image, or of its box, has less than {TINY_SIDE} pixels.",
        ),
        _rows(reader, measured.outside, "Boxes that leave their image", "Such rows cannot be read."),
        _rows(reader, measured.small, "Small boxes", f"They cover less than {TINY_SHARE:.0%} of their image."),
    ]


def of_embeddings(reader: ImageReader, copies: Suspects | None, wrong: Suspects, most: float) -> list[Finding]:
    """What was found by the embeddings; copies lie within the cosine distance `most`."""
    meaning = f"The nearest train row of a validation row lies within the cosine distance {most}. {_LEAK}"
    votes = (
        f"The {NUM_VOTES} nearest neighbors all have one label, which is another one (edited nearest neighbors, Wilson "
        "1972, with all votes). The first picture is the row in doubt; the numbers are cosine distances."
    )
    found = [] if copies is None else [_suspects(reader, copies, "Near copies in both splits, by embeddings", meaning)]
    return [*found, _suspects(reader, wrong, "Labels that may be wrong", votes)]


def of_labels(overlap: Ids) -> Finding:
    """That labels are in both splits; a list of its own names them."""
    return Finding("Rows of labels in both splits", "", int(overlap[:, 1:].sum()))


def measured(diagnosis: Diagnosis) -> list[Measure]:
    """How sizes and boxes are spread."""
    values = diagnosis.measures.values
    return [Measure(name, known, quantiles(known)) for name, known in values.items()]


def _pairs(reader: ImageReader, found: Repeats, title: str, meaning: str, *, with_distance: bool = True) -> Finding:
    shown = zip(found.pairs[:GROUPS_SHOWN].tolist(), found.distances.tolist(), strict=False)
    groups = [
        [_item(reader, one), _item(reader, other, distance if with_distance else None)]
        for (one, other), distance in shown
    ]
    return Finding(title, meaning, len(found.rows), found.num_pairs, groups)


def _rows(reader: ImageReader, rows: Ids, title: str, meaning: str) -> Finding:
    return Finding(title, meaning, len(rows), len(rows), [[_item(reader, row)] for row in rows[:GROUPS_SHOWN].tolist()])


def _suspects(reader: ImageReader, found: Suspects, title: str, meaning: str) -> Finding:
    groups: list[Sequence[SearchItem]] = []
    for place, row in enumerate(found.shown[:GROUPS_SHOWN].tolist()):
        count = int(found.neighbors.counts[place])
        near = zip(
            found.neighbors.ids[place, :count].tolist(), found.neighbors.distances[place, :count].tolist(), strict=True
        )
        groups.append([_item(reader, row), *(_item(reader, other, distance) for other, distance in near)])
    return Finding(title, meaning, len(found.ids), len(found.ids), groups)


def _item(reader: ImageReader, row: int, distance: float | None = None) -> SearchItem:
    """A row with its picture, or with why there is none."""
    table = reader.table
    split = "train" if table.is_train[row] else "validation"
    title, path = f"row {row}, label {table.label_text(row)}, {split}", table.paths[row].as_py()
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata in files that decode nevertheless
            image = reader.read(row)
    except ImageError as error:
        return SearchItem(title, path, None, str(error), distance)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=85)
    return SearchItem(title, path, buffer.getvalue(), "", distance)
