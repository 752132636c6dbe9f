"""Looking at every image of a table once: what can be decoded, and a few numbers of each."""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oml_ray.data import columns as col
from oml_ray.data.columns import Ids, Mask
from oml_ray.data.doctor.fingerprints import GRID, color_grid, content_hash, perceptual_hash
from oml_ray.data.image_decoding import FORMATS
from oml_ray.data.images import ImageReader
from oml_ray.errors import ImageError, ResourceError

CHUNK_ROWS = 128
MAX_REASONS = 1000


@dataclass(frozen=True, eq=False)
class Examined:
    """What is known of the images of a table's N rows; of a row with a box, the image is what the box cuts out.

    Attributes:
        readable: bool (N,).
        sizes: int64 (N, 2), width and height of the whole image in pixels, upright as it is read; 0 where unknown.
        contents: uint64 (N, 2), content hashes; 0 where the image is not readable.
        looks: uint64 (N,), perceptual hashes; 0 where there is none.
        colors: uint8 (N, 48), colours of 4 x 4 fields; 0 where the image is not readable.
        blank: bool (N,), images of one brightness, which have no perceptual hash.
        turned: bool (N,), images whose EXIF orientation is not upright.
        transparent: bool (N,), images with transparent pixels.
        wide: bool (N,), grey images of more than 8 bits.
        reasons: row id -> why it is not readable, of the first thousand.
    """

    readable: Mask
    sizes: Ids
    contents: NDArray[np.uint64]
    looks: NDArray[np.uint64]
    colors: NDArray[np.uint8]
    blank: Mask
    turned: Mask
    transparent: Mask
    wide: Mask
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def nothing(cls, num_rows: int) -> Examined:
        """That of rows which were not looked at."""
        return cls(
            readable=np.zeros(num_rows, dtype=np.bool_),
            sizes=np.zeros((num_rows, 2), dtype=np.int64),
            contents=np.zeros((num_rows, 2), dtype=np.uint64),
            looks=np.zeros(num_rows, dtype=np.uint64),
            colors=np.zeros((num_rows, 3 * GRID**2), dtype=np.uint8),
            blank=np.zeros(num_rows, dtype=np.bool_),
            turned=np.zeros(num_rows, dtype=np.bool_),
            transparent=np.zeros(num_rows, dtype=np.bool_),
            wide=np.zeros(num_rows, dtype=np.bool_),
        )

    def put(self, rows: Ids, part: Examined) -> None:
        """Take over what is known of some rows."""
        for array in fields(self):
            if array.name != "reasons":
                getattr(self, array.name)[rows] = getattr(part, array.name)
        room = MAX_REASONS - len(self.reasons)
        self.reasons.update(list(part.reasons.items())[:room])


def examine(reader: ImageReader, *, processes: int = 1, advance: Callable[[int], None] = lambda _: None) -> Examined:
    """Decode every image of a table.

    Rows of one file follow each other, so it is read once; a few chunks of rows are in work at a time.

    Args:
        reader: of the table; its bounds hold.
        processes: how many decode beside each other; 1: this one.
        advance: is told how many rows were done.

    Returns:
        What does not depend on the number of processes.

    Raises:
        ResourceError: a process was killed.
    """
    table = reader.table
    keys = () if table.boxes is None else tuple(table.boxes.T)
    order = np.lexsort((*keys, col.encode(table.paths)[0]))  # by file, then by box, then by row
    chunks = [order[start : start + CHUNK_ROWS] for start in range(0, len(order), CHUNK_ROWS)]
    found = Examined.nothing(len(table))
    for rows, part in zip(chunks, _examined(reader, chunks, min(processes, len(chunks))), strict=True):
        found.put(rows, part)
        advance(len(rows))
    return found


def _examined(reader: ImageReader, chunks: Sequence[Ids], processes: int) -> Iterator[Examined]:
    """What is known of each chunk, in order."""
    if processes <= 1:
        yield from (_look(reader, rows) for rows in chunks)
        return
    # Spawned, not forked: the threads of other libraries may hold locks that a fork would copy.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(reader,))
    waiting = deque[Future[Examined]]()
    try:
        for rows in chunks:
            waiting.append(pool.submit(_look_here, rows))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ResourceError(
            f"{reader.table.source}: a process that decoded images was killed, most likely for its memory: set "
            "data.max_pixels to what your images need, or give the machine more memory."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_readers: list[ImageReader] = []  # of this process, if it is one of a pool


def _begin(reader: ImageReader) -> None:
    _readers[:] = [reader]


def _look_here(rows: Ids) -> Examined:
    return _look(_readers[0], rows)


def _look(reader: ImageReader, rows: Ids) -> Examined:
    """Decode some rows; those of one file follow each other."""
    result = Examined.nothing(len(rows))
    path, data, whole = "", b"", None  # of the latest file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata in files that decode nevertheless
        for place, row in enumerate(rows.tolist()):
            try:
                row_path = reader.table.paths[row].as_py()
                if row_path != path:
                    whole, data = None, reader.data(row)
                    path = row_path
                if whole is None:
                    result.sizes[place] = _announced(data)
                    whole = reader.whole(row, data)
                image, stored = whole
                result.sizes[place] = image.size
                result.turned[place] = stored.orientation != 1
                result.transparent[place], result.wide[place] = stored.is_transparent, stored.is_wide
                image = reader.crop(row, image)
            except ImageError as error:
                result.reasons[row] = str(error)
                continue
            look = perceptual_hash(image)
            result.readable[place], result.contents[place] = True, content_hash(image)
            result.looks[place], result.blank[place] = look or 0, look is None
            result.colors[place] = color_grid(image)
    return result


def _announced(data: bytes) -> tuple[int, int]:
    """Width and height that a file says its image has; 0 and 0 of what is no image."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).size
    except Exception:  # as in decode, which tells why
        return 0, 0
