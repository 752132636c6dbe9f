"""Checkpoints of a sharded head: parts of fixed ranges of labels, whatever the number of ranks that write or read.

::

    head_0000000000_0000065536.safetensors   proxies and optimizer state of the labels at positions [0, 65536)
    head_0000065536_0000100000.safetensors   the last part may be smaller

Rank 0 writes one part after the other and never holds more than one beside its own rows; a rank that reads opens only
those that overlap its own rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oml_ray.errors import CheckpointError, StorageError, reason_of
from oml_ray.learning.sharded_head import ShardedHead
from oml_ray.storage.atomic_write import save_with_umask
from oml_ray.storage.retries import retried

ROWS_PER_PART = 65_536
NAME = re.compile(r"head_(\d{10})_(\d{10})\.safetensors")


def write_parts(head: ShardedHead, folder: Path, *, rows_per_part: int = ROWS_PER_PART) -> list[str]:
    """Write the rows of all ranks; called by rank 0 while all others call `send_parts`.

    Args:
        head: of rank 0.
        folder: local, where to.
        rows_per_part: labels of a part, the same on all ranks.

    Returns:
        Names of the files.

    Raises:
        StorageError: a part cannot be written.
    """
    names = []
    for start, stop in _ranges(head, rows_per_part):
        part = {
            name: torch.empty((stop - start, *own.shape[1:]), dtype=own.dtype, device=own.device)
            for name, own in head.shard_state().items()
        }
        for rank, first, last in _owners(head, start, stop):
            for name, own in head.shard_state().items():
                rows = part[name][first - start : last - start]
                if rank == 0:
                    rows.copy_(own[first:last])
                else:
                    dist.recv(rows, src=rank)
        names.append(f"head_{start:010d}_{stop:010d}.safetensors")
        try:
            tensors = {name: rows.cpu() for name, rows in part.items()}
            save_with_umask(folder / names[-1], partial(save_file, tensors))
        except (OSError, RuntimeError, SafetensorError) as error:  # safetensors wraps what the disk says
            raise StorageError(f"{folder / names[-1]} cannot be written: {reason_of(error)}.") from None
    return names


def send_parts(head: ShardedHead, *, rows_per_part: int = ROWS_PER_PART) -> None:
    """Send the own rows to rank 0, part by part; called by all other ranks while rank 0 calls `write_parts`."""
    for start, stop in _ranges(head, rows_per_part):
        for rank, first, last in _owners(head, start, stop):
            if rank == dist.get_rank():
                for own in head.shard_state().values():
                    dist.send(own[first - head.start : last - head.start], dst=0)


def overlapping(head: ShardedHead, names: Iterable[str]) -> list[str]:
    """Pick from the names of files those parts that hold rows of this rank, in the order of their labels."""
    return [
        match.string
        for match in map(NAME.fullmatch, sorted(names))
        if match and int(match[1]) < head.stop and int(match[2]) > head.start
    ]


def read_parts(head: ShardedHead, folder: Path) -> None:
    """Load the own rows from the parts that hold them; on each rank for itself.

    Args:
        head: of any rank of any world size.
        folder: local, where the parts lie; those that do not overlap the own rows may be absent.

    Raises:
        CheckpointError: a part is absent or damaged, or of another head.
    """
    reached = head.start
    for name in overlapping(head, (file.name for file in folder.iterdir())):
        start, stop = (int(bound) for bound in NAME.fullmatch(name).groups())  # type: ignore[union-attr]
        if start > reached or stop > head.num_labels:
            break
        first, last = max(start, head.start), min(stop, head.stop)
        try:
            head.load_rows(
                first, retried(partial(_read_rows, folder / name, first - start, last - start), folder / name)
            )
        except ValueError as error:
            raise CheckpointError(f"The checkpoint {folder} is of another architecture: {name}: {error}") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name}: {reason_of(error)}.") from None
        reached = stop
    if reached < head.stop:
        raise CheckpointError(
            f"The checkpoint {folder} has no part with the label at position {reached} of {head.num_labels}: "
            "copy it again, or continue from an older one."
        )


def _read_rows(path: Path, first: int, last: int) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_slice(key)[first:last] for key in file.keys()}  # noqa: SIM118


def _ranges(head: ShardedHead, rows_per_part: int) -> Iterator[tuple[int, int]]:
    for start in range(0, head.num_labels, rows_per_part):
        yield start, min(start + rows_per_part, head.num_labels)


def _owners(head: ShardedHead, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Ranks that hold rows of [start, stop), and which ones: (rank, first, last)."""
    for rank in range(head.world_size):
        first, last = max(start, head.bounds[rank]), min(stop, head.bounds[rank + 1])
        if first < last:
            yield rank, first, last
