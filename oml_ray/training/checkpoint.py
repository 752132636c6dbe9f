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
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from oml_ray.data.filesystem import join, resolve
from oml_ray.errors import CheckpointError, OmlRayError, StorageError, permission_denied, reason_of
from oml_ray.learning.weights import State
from oml_ray.storage.atomic_write import flush_folder, save_with_umask, write_atomically
from oml_ray.storage.copying import download
from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried
from oml_ray.training.run_directory import RunDirectory

FOLDER = "checkpoints"
WEIGHTS, TRAINING, META = "extractor.safetensors", "training.pt", "meta.json"
FORMAT = 1
REPLACED = ".replaced"


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
    staged = final.with_name(f".{name}-{uuid.uuid4().hex}")
    try:
        retried(lambda: staged.mkdir(parents=True, exist_ok=True), staged)
        _write_files(staged, checkpoint, write_more)
        _put_in_place(staged, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors wraps what the disk says
        # Of torch it is the one before: then its archive cannot be ended either.
        said = error.__context__ if isinstance(error.__context__, OSError) else error
        raise StorageError(f"The checkpoint {final} cannot be written: {reason_of(said)}.") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    run.publish(FOLDER, name)
    if is_best:
        move_best(run, checkpoint.position.global_step)
    run.write_text(name, FOLDER, "last")
    prune(run, keep, keep_also)


def _write_files(folder: Path, checkpoint: Checkpoint, write_more: Callable[[Path], list[str]] | None) -> None:
    weights = {key: value.contiguous() for key, value in checkpoint.extractor.items()}
    save_with_umask(folder / WEIGHTS, lambda path: save_file(weights, path))
    save_with_umask(folder / TRAINING, lambda path: _save_training(checkpoint.training, path))
    files = [WEIGHTS, TRAINING, *(write_more(folder) if write_more else ())]
    meta = {
        "format": FORMAT,
        "position": asdict(checkpoint.position),
        "best": checkpoint.best,
        "files": {each: _checksum(folder / each) for each in files},
        **checkpoint.meta,
    }
    write_atomically(folder / META, json.dumps(meta, indent=1).encode())
    flush_folder(folder)


def _save_training(training: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # of a path, torch would not tell what the disk said
        torch.save(training, file)


def _put_in_place(staged: Path, final: Path) -> None:
    """Move a written folder to its name. The checkpoint of the same step that has it is removed last.

    A process that dies between the two moves leaves the older one under another name: see `restore_replaced`.
    """
    replaced = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        retried(lambda: final.rename(replaced), final)
    retried(lambda: staged.rename(final), final)
    flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(run: RunDirectory) -> None:
    """Give back its name to a checkpoint whose process died while it was replaced by one of the same step.

    Only for the start of a process, when nothing is written to the run.
    """
    for replaced in run.path(FOLDER).glob(f".step_*{REPLACED}"):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
        if not final.exists():
            with suppress(OSError):  # another process of the training was faster
                replaced.rename(final)


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
    restore_replaced(run)
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
        is_replaced = name.endswith(REPLACED) and name.removeprefix(".").removesuffix(REPLACED) not in there
        if name.startswith(".step_") and not is_replaced:
            run.remove(FOLDER, name)
    steps = [name for name in there if name.startswith("step_")]
    kept = {*steps[-keep:], *map(name_of, keep_also), run.read_text(FOLDER, "best"), run.read_text(FOLDER, "last")}
    for name in steps:
        if name not in kept:
            run.remove(FOLDER, name)


def latest(run: RunDirectory, *, read_more: Callable[[Path, Checkpoint], None] | None = None) -> Checkpoint | None:
    """Return the last checkpoint of a run, None before the first; `read_more` reads from its folder too."""
    restore_replaced(run)
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
        if _type_of(filesystem, path) == pyarrow.fs.FileType.File:
            with open_input_file(filesystem, path) as stream:
                name = stream.read(256).decode("utf-8", "replace").strip()
            if not re.fullmatch("step_[0-9]+", name):
                raise CheckpointError(f"{uri} is a file, but not the `best` or `last` of a run's checkpoints.")
            path = f"{path.rpartition('/')[0]}/{name}"
        if _type_of(filesystem, f"{path}/{META}") != pyarrow.fs.FileType.File:
            raise CheckpointError(
                f"There is no checkpoint at {path}: give a folder that holds {META}, or a run's checkpoints/best "
                "or checkpoints/last."
            )
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            yield Path(path)
            return
        # A key of an object store may hold "..", and would be copied to wherever that leads.
        selector = pyarrow.fs.FileSelector(path, recursive=True)
        infos = retried(lambda: filesystem.get_file_info(selector), uri)
        for info in infos:
            if ".." in info.path.split("/"):
                raise CheckpointError(
                    f"The checkpoint {uri} is not copied: its file {info.path!r} would lead out of it."
                )
        with tempfile.TemporaryDirectory(prefix="oml_ray-checkpoint-") as local:
            for info in infos:
                if info.is_file:
                    download(filesystem, info.path, Path(local, info.path.removeprefix(f"{path}/")))
            yield Path(local)
    except PermissionError:
        raise permission_denied(uri) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise CheckpointError(f"The checkpoint {uri} cannot be read: {reason_of(error)}.") from None


def _type_of(filesystem: pyarrow.fs.FileSystem, path: str) -> pyarrow.fs.FileType:
    return retried(lambda: filesystem.get_file_info(path), path).type


def read_meta(folder: Path) -> dict[str, Any]:
    """Read `meta.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is absent, damaged or of an unknown format.
    """
    try:
        meta = json.loads(retried(lambda: (folder / META).read_text(encoding="utf-8"), folder / META))
    except PermissionError:
        raise permission_denied(folder / META) from None
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
        return retried(lambda: load_file(folder / WEIGHTS), folder / WEIGHTS)
    except OmlRayError:
        raise
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
        training = retried(lambda: torch.load(folder / TRAINING, "cpu", weights_only=True), folder / TRAINING)
    except OmlRayError:
        raise
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
        found = retried(lambda: _checksum(folder / file), folder / file)
    except PermissionError:
        raise permission_denied(folder / file) from None
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
