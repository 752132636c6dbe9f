"""Checkpoints: a directory that another process, another world size, another day can continue from.

::

    checkpoints/
      step_00000054/
        extractor.safetensors   weights, all that an evaluation needs beside the config
        training.pt             criterion, optimizer, scaler: tensors and plain values only
        meta.json               position, best metric, config, versions, and the checksums of the other files
        head_*.safetensors      a sharded head, if there is one: `sharded_checkpoint`
      best, last                text files naming a step folder: resolvable on object stores too
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from oml_ray.data.filesystem import join, resolve
from oml_ray.errors import CheckpointError, StorageError, reason_of
from oml_ray.learning.weights import State
from oml_ray.training.run_directory import RunDirectory, flush_to_disk, write_atomically

FOLDER = "checkpoints"
WEIGHTS, TRAINING, META = "extractor.safetensors", "training.pt", "meta.json"
FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where training stands: the next batch to learn from."""

    epoch: int
    step: int
    """Next step inside the epoch."""
    global_step: int
    """Steps done since the start."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    extractor: State
    """Weights of the extractor."""
    training: dict[str, Any]
    """The state of `Updates` (the learning rate is a function of the step)."""
    position: Position
    """The next batch."""
    best: float | None
    """Best value of the watched metric so far."""
    meta: dict[str, Any]
    """Resolved config, table fingerprint, versions, and what else is plain data."""


def save(
    run: RunDirectory,
    checkpoint: Checkpoint,
    *,
    is_best: bool,
    keep: int,
    keep_also: Iterable[int] = (),
    write_more: Callable[[Path], list[str]] | None = None,
) -> None:
    """Write a checkpoint so that a reader sees all of it or none, then move `last` (and `best`) to it.

    Args:
        run: where to.
        checkpoint: what.
        is_best: whether `best` moves to it too.
        keep: how many of the newest to keep, beside the best.
        keep_also: steps whose checkpoints are kept besides.
        write_more: writes further files into a folder and gives their names.
    """
    name = name_of(checkpoint.position.global_step)
    final = run.path(FOLDER, name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=final.parent, ignore_cleanup_errors=True) as folder:
            staged = Path(folder)
            save_file({key: value.contiguous() for key, value in checkpoint.extractor.items()}, staged / WEIGHTS)
            with (staged / TRAINING).open("wb") as file:  # of a path, torch would not tell what the disk said
                torch.save(checkpoint.training, file)
            files = [WEIGHTS, TRAINING, *(write_more(staged) if write_more else ())]
            meta = {
                "format": FORMAT,
                "position": asdict(checkpoint.position),
                "best": checkpoint.best,
                "files": {each: _checksum(staged / each) for each in files},
                **checkpoint.meta,
            }
            write_atomically(staged / META, json.dumps(meta, indent=1).encode())
            flush_to_disk(staged / WEIGHTS)
            flush_to_disk(staged / TRAINING)
            staged.chmod(0o755)
            if final.exists():  # left by a process that died before it moved `last`
                shutil.rmtree(final)
            staged.rename(final)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors wraps what the disk says
        # Of torch it is the one before: then its archive cannot be ended either.
        said = error.__context__ if isinstance(error.__context__, OSError) else error
        raise StorageError(f"The checkpoint {final} cannot be written: {reason_of(said)}.") from None
    run.publish(FOLDER, name)
    if is_best:
        move_best(run, checkpoint.position.global_step)
    run.write_text(name, FOLDER, "last")
    prune(run, keep, keep_also)


def name_of(step: int) -> str:
    """Folder of the checkpoint of a global step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Global step of a checkpoint's folder.

    Raises:
        CheckpointError: that is no name of one.
    """
    try:
        return int(name.removeprefix("step_"))
    except ValueError:
        raise CheckpointError(f"{name!r} does not name a checkpoint, as step_00000054 would.") from None


def names(run: RunDirectory) -> list[str]:
    """Folders of a run's checkpoints, in the order of their steps."""
    return [name for name in run.names(FOLDER) if name.startswith("step_")]


def move_best(run: RunDirectory, step: int) -> None:
    """Have `best` name the checkpoint of a step."""
    run.write_text(name_of(step), FOLDER, "best")


def replace_lost_best(run: RunDirectory) -> str | None:
    """Have `best` name the newest checkpoint where its own is gone, and return that name; None where nothing is amiss.

    Someone has removed it, as the message about a damaged one tells to.
    """
    there = names(run)
    if not there or not has_lost_best(run):
        return None
    move_best(run, step_of(there[-1]))
    return there[-1]


def has_lost_best(run: RunDirectory) -> bool:
    """Whether `best` names a checkpoint that is gone."""
    best = (run.read_text(FOLDER, "best") or "").strip()
    return bool(best) and best not in names(run)


def prune(run: RunDirectory, keep: int, keep_also: Iterable[int] = ()) -> None:
    """Remove all checkpoints but the best, the newest, and some."""
    there = run.names(FOLDER)
    for name in there:
        if name.startswith(".step_"):
            run.remove(FOLDER, name)
    steps = [name for name in there if name.startswith("step_")]
    kept = {*steps[-keep:], *map(name_of, keep_also), run.read_text(FOLDER, "best"), run.read_text(FOLDER, "last")}
    for name in steps:
        if name not in kept:
            run.remove(FOLDER, name)


def latest(run: RunDirectory, *, read_more: Callable[[Path, Checkpoint], None] | None = None) -> Checkpoint | None:
    """Return the last checkpoint of a run, None before the first; `read_more` reads from its folder too."""
    steps = names(run)
    last = (run.read_text(FOLDER, "last") or "").strip()
    if not steps or not last:
        return None
    # The folder that `last` names is gone only when someone removed it, as the message about a damaged one tells to.
    with located(join(run.uri, FOLDER, last if last in steps else steps[-1])) as folder:
        found = read(folder)
        if read_more:
            read_more(folder, found)
        return found


@contextmanager
def located(uri: str) -> Iterator[Path]:
    """Have a local checkpoint folder for a path or URI of one, or of a run's `best` or `last`.

    Behind a URI it is a copy of this process's own, gone after the body of the `with`.

    Raises:
        CheckpointError: there is none.
    """
    filesystem, path = resolve(uri)
    try:
        if filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
            with filesystem.open_input_stream(path) as stream:
                name = stream.read(256).decode("utf-8", "replace").strip()
            if not re.fullmatch("step_[0-9]+", name):
                raise CheckpointError(f"{uri} is a file, but not the `best` or `last` of a run's checkpoints.")
            path = f"{path.rpartition('/')[0]}/{name}"
        if filesystem.get_file_info(f"{path}/{META}").type != pyarrow.fs.FileType.File:
            raise CheckpointError(
                f"There is no checkpoint at {path}: give a folder that holds {META}, or a run's checkpoints/best "
                "or checkpoints/last."
            )
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            yield Path(path)
            return
        # A key of an object store may hold "..", and would be copied to wherever that leads.
        for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True)):
            if ".." in info.path.split("/"):
                raise CheckpointError(
                    f"The checkpoint {uri} is not copied: its file {info.path!r} would lead out of it."
                )
        with tempfile.TemporaryDirectory(prefix="oml_ray-checkpoint-") as local:
            pyarrow.fs.copy_files(path, local, source_filesystem=filesystem)
            yield Path(local)
    except (OSError, pyarrow.ArrowException) as error:
        raise CheckpointError(f"The checkpoint {uri} cannot be read: {reason_of(error)}.") from None


def read_meta(folder: Path) -> dict[str, Any]:
    """Read `meta.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is absent, damaged or of an unknown format.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {META}: {reason_of(error)}.") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"The checkpoint {folder} is of an unknown format; this version reads format {FORMAT}.")
    position, best, files = (meta.get(key, ...) for key in ("position", "best", "files"))
    is_position = isinstance(position, dict) and position.keys() == Position.__annotations__.keys()
    if (
        not (is_position and all(type(part) is int and part >= 0 for part in position.values()))
        or not (best is None or (type(best) in (int, float) and abs(best) < math.inf))
        or not isinstance(files, dict)
    ):
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: {META}: position, best or files is not what a training writes: "
            "remove the folder to continue from an older one, or copy it again."
        )
    return meta


def read_extractor(folder: Path) -> State:
    """Read the extractor's weights of a checkpoint folder.

    Raises:
        CheckpointError: they are absent or damaged.
    """
    _check(folder, WEIGHTS, read_meta(folder))
    try:
        return load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises its own kinds
        raise CheckpointError(f"The checkpoint {folder} is damaged: {WEIGHTS}: {reason_of(error)}.") from None


def read(folder: Path) -> Checkpoint:
    """Read a whole checkpoint; nothing in it is executed.

    Raises:
        CheckpointError: it is damaged.
    """
    meta = read_meta(folder)
    extractor = read_extractor(folder)
    _check(folder, TRAINING, meta)
    try:
        training = torch.load(folder / TRAINING, "cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        raise CheckpointError(f"The checkpoint {folder} is damaged: {TRAINING}: {reason_of(error)}.") from None
    if not isinstance(training, dict):
        raise CheckpointError(f"The checkpoint {folder} is damaged: {TRAINING} holds no state of a training.")
    return Checkpoint(extractor, training, Position(**meta["position"]), meta["best"], meta)


def check(folder: Path, files: Iterable[str]) -> None:
    """Compare files of a checkpoint with what its `meta.json` says of them.

    Raises:
        CheckpointError: one is absent or damaged.
    """
    meta = read_meta(folder)
    for file in files:
        _check(folder, file, meta)


def _check(folder: Path, file: str, meta: dict[str, Any]) -> None:
    try:
        found = _checksum(folder / file)
    except OSError as error:
        raise CheckpointError(f"The checkpoint {folder} is not whole: {file}: {error.strerror}.") from None
    expected = meta.get("files", {}).get(file)
    if found != expected:
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: {file} has checksum {found}, {META} says {expected}: "
            "remove the folder to continue from an older one, or copy it again."
        )


def _checksum(path: Path) -> str:
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return f"crc32:{crc:08x}:{size}"
