"""What decode tasks run, and the blocks by which they hand over what they loaded.

A process that decodes images imports neither torch nor a network: they would take longer, and more memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from oml_ray import errors
from oml_ray.data.images import Batch
from oml_ray.data.samplers import Ids
from oml_ray.errors import OmlRayError

Row = dict[str, Any]


def load_training(loaders: ray.ObjectRef[Any], planned: ray.ObjectRef[Any], first_position: int, rows: Row) -> Row:
    loader, (ids, places) = fetched(loaders)[0], fetched(planned)
    outcomes = [
        attempt(loader.load, ids[row], epoch=places[row][0], step=places[row][1], first_position=first_position)
        for row in rows["id"].tolist()
    ]
    return pack(outcomes, ids.shape[1], loader.nothing)


def load_evaluation(loaders: ray.ObjectRef[Any], ids: ray.ObjectRef[Any], batch_size: int, rows: Row) -> Row:
    loader, wanted = fetched(loaders)[1], fetched(ids)
    starts = (rows["id"] * batch_size).tolist()
    outcomes = [attempt(loader.load, wanted[start : start + batch_size]) for start in starts]
    return pack(outcomes, batch_size, loader.nothing)


def load_part(shared: ray.ObjectRef[Any], rows_per_part: int, block: Row) -> Row:
    loader, rows, missing = fetched(shared)
    parts = missing[block["id"]]
    outcomes = [
        attempt(loader.load, rows[part * rows_per_part : (part + 1) * rows_per_part]) for part in parts.tolist()
    ]
    return {"part": parts, **pack(outcomes, min(rows_per_part, len(rows)), loader.nothing)}


def attempt(load: Callable[..., Batch], ids: Ids, **place: int) -> Batch | OmlRayError:
    """Load a batch, or return the user's error: what a task raises, Ray Data delivers as text only."""
    try:
        return load(ids, **place)
    except OmlRayError as error:
        return error


def pack(outcomes: Sequence[Batch | OmlRayError], size: int, nothing: NDArray[Any]) -> Row:
    """Columns of a block whose rows are batches (or what went wrong with them).

    Args:
        outcomes: batches of at most `size` images.
        size: images to pad every row to.
        nothing: images (0, ...), which tell shape and type of all.
    """
    images = np.zeros((len(outcomes), size, *nothing.shape[1:]), dtype=nothing.dtype)
    ids = np.full((len(outcomes), size), -1, dtype=np.int64)
    counts, notes = np.zeros(len(outcomes), dtype=np.int64), []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, OmlRayError):
            notes.append(error_note(outcome))
            continue
        counts[index] = count = len(outcome.ids)
        images[index, :count], ids[index, :count] = outcome.images, outcome.ids
        notes.append(json.dumps({"bad": outcome.bad.tolist(), "reasons": list(outcome.reasons)}))
    return {"images": images, "ids": ids, "count": counts, "note": notes}


def unpack(block: Row, index: int) -> Batch:
    """One batch of a packed block, in memory of its own (blocks are read-only views of the object store).

    Raises:
        OmlRayError: what went wrong with it where it was loaded.
    """
    note = json.loads(raise_noted(block["note"][index]))
    count = int(block["count"][index])
    images, ids = block["images"][index][:count], block["ids"][index][:count]
    return Batch(ids.copy(), images.copy(), np.array(note["bad"], dtype=np.int64), note["reasons"])


def error_note(error: OmlRayError) -> str:
    """A user's error as a text that travels in a column."""
    return json.dumps({"error": type(error).__name__, "message": str(error)})


def raise_noted(note: str) -> str:
    """Raise the error of a note; return other notes."""
    if note.startswith('{"error"'):
        found = json.loads(note)
        raise getattr(errors, found["error"])(found["message"])
    return note


@lru_cache(maxsize=4)
def fetched(reference: ray.ObjectRef[Any]) -> Any:
    """What a reference stands for, fetched once in each process."""
    return ray.get(reference)
