"""Writes what runs hold on storage that fails at each call in turn, or is full after each number of bytes.

Run with the environment of a `FailingStorage` as `failing_writer.py WRITER LIBRARY FOLDER STATE`: calls that fail twice
are retried, and the content is the new one; after each other failure there is one clear message, or none and the whole
new content; what is read is the old content or the new.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from failing_storage import FailingStorage

from oml_ray.data.filesystem import resolve
from oml_ray.errors import StorageError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.neighbors_file import neighbors_writer, read_neighbors
from oml_ray.retrieval.store import Manifest, Store
from oml_ray.storage import retries
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.records import Records
from oml_ray.training.run_directory import RunDirectory

FOR_GOOD = 10**6
MANIFEST = Manifest(1, 1, 64, "weights", {}, "table", "all")


def write_checkpoint(run: RunDirectory, number: int) -> None:
    state = {"w": torch.full((500,), number)}
    found = Checkpoint(state, {"moments": torch.full((5000,), number)}, Position(0, 0, number), None, {})
    checkpoints.save(run, found, is_best=True, keep=2)


def read_checkpoint(run: RunDirectory) -> int:
    found = checkpoints.latest(run)
    assert found is not None
    assert (found.extractor["w"] == found.position.global_step).all()
    assert (found.training["moments"] == found.position.global_step).all()
    with checkpoints.located(f"{run.uri}/checkpoints/best") as folder:
        checkpoints.read(folder)
    return found.position.global_step


def write_text(run: RunDirectory, number: int) -> None:
    run.write_text(str(number), f"folder_{number}", "metrics.json")
    run.write_text(str(number), "metrics.json")


def read_text(run: RunDirectory) -> int:
    return int(run.read_text("metrics.json") or -1)


def write_part(run: RunDirectory, number: int) -> None:
    store = Store(*resolve(f"{run.uri}/{number}"))
    store.begin(MANIFEST)
    store.write_part(0, {"id": np.array([number])}, np.full((1, 64), number, np.float32), {})
    run.write_text(str(number), "store")


def read_part(run: RunDirectory) -> int:
    number = int(run.read_text("store") or -1)
    for folder in (number, number + 1):
        store = Store(*resolve(f"{run.uri}/{folder}"))
        if store.manifest() == MANIFEST and not store.begin(MANIFEST):
            assert [part["id"].to_pylist() for part in store.parts(MANIFEST, ["id", "embedding"])] == [[folder]]
    return number


def write_neighbors(run: RunDirectory, number: int) -> None:
    distances = np.sort(np.random.default_rng(0).random((50, 2), np.float32), axis=1)
    neighbors = Neighbors(np.tile([number, number + 10**6], (50, 1)), distances, np.full(50, 2))
    with neighbors_writer(*resolve(f"{run.uri}/neighbors.parquet"), 2) as write:
        for _ in range(3):
            write(np.arange(50), neighbors)


def read_neighbors_file(run: RunDirectory) -> int:
    _, neighbors = read_neighbors(*resolve(f"{run.uri}/neighbors.parquet"))
    assert len(neighbors) == 150
    return int(neighbors.ids[0, 0])


def write_records(run: RunDirectory, number: int) -> None:
    records = Records(run, until_step=number - 1)
    records.history.append({"step": number})
    records.scalars("train", {"loss": 1.0}, number)
    records.publish()
    records.close()


def read_records(run: RunDirectory) -> int:
    return int(Records(run).history.rows[-1]["step"])


WRITERS: dict[str, tuple[Callable[[RunDirectory, int], Any], Callable[[RunDirectory], int]]] = {
    "checkpoint": (write_checkpoint, read_checkpoint),
    "text": (write_text, read_text),
    "part": (write_part, read_part),
    "neighbors": (write_neighbors, read_neighbors_file),
    "records": (write_records, read_records),
}


def main() -> None:
    name, library, folder, state = sys.argv[1:]
    storage = FailingStorage(Path(library), Path(folder), Path(state))
    retries.configure(retries=3, first_wait_s=0)
    (write, read), run = WRITERS[name], RunDirectory(folder, "run")
    write(run, 0)
    numbers = itertools.count(1)
    old = 0
    for disturb, reason, moments in (
        (lambda calls: storage.fail(calls, times=2), None, itertools.count()),
        (lambda calls: storage.fail(calls, times=FOR_GOOD), "Input/output error", itertools.count()),
        (storage.fill, "No space left on device", (int(1.5**power) - 1 for power in itertools.count())),
    ):
        for moment in moments:
            new = next(numbers)
            disturb(moment)
            message = None
            try:
                write(run, new)
            except StorageError as error:
                message = str(error)
            refused = storage.refused
            storage.mend()
            found = read(run)
            is_right = reason is not None and message is not None and reason in message and folder in message
            assert message is None or (is_right and "\n" not in message), message
            assert found == new or (message and found == old), (found, message)
            write(run, new)
            old = new
            if not refused:
                assert message is None
                assert moment, f"nothing of {name} was refused: its writes do not pass the library"
                break


if __name__ == "__main__":
    main()
