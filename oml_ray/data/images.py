"""Images: from a row of the table to decoded, bounded, transformed pixels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oml_ray.data.filesystem import read_bytes
from oml_ray.data.image_decoding import crop, decode_whole
from oml_ray.data.image_modes import Exif, StoredAs
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.data.transforms import Pixels, Transform
from oml_ray.errors import ImageError, StorageError, StorageUnavailableError

OnBadImage = Literal["error", "skip"]


@dataclass(frozen=True)
class Batch:
    """Images of some positions of a global batch, or of some rows of an evaluation.

    Attributes:
        ids: int64 (n,), row ids that the pixels come from.
        images: uint8 (n, 3, size, size).
        bad: int64 (m,), row ids of the unreadable images met on the way.
        reasons: m messages, one for each bad row.
    """

    ids: Ids
    images: Pixels
    bad: Ids
    reasons: Sequence[str]


class ImageReader:
    """Reads rows of a table as images; cheap to send between processes."""

    def __init__(
        self, table: Table, *, max_pixels: int, exif: Exif = "apply", background: Sequence[int] = (255, 255, 255)
    ) -> None:
        """Read images of `table` that have at most `max_pixels` pixels; `exif` and `background` as in `decode`."""
        self.table, self.max_pixels, self.exif, self.background = table, max_pixels, exif, tuple(background)

    def read(self, row: int) -> Image.Image:
        """Return the RGB image of one row, cut to its box.

        Raises:
            ImageError: the file is absent or cannot be used.
        """
        return self.crop(row, self.whole(row, self.data(row))[0])

    def data(self, row: int) -> bytes:
        """Return the file of one row's image.

        Raises:
            ImageError: it is absent or cannot be read. StorageUnavailableError: the storage failed at every retry; that
                says nothing about the image, and `data.on_bad_image: skip` does not pass over it.
        """
        try:
            return read_bytes(self.table.uri(row))
        except StorageUnavailableError:
            raise
        except StorageError as error:
            raise ImageError(f"{self._name(row)}: {error}") from None

    def whole(self, row: int, data: bytes) -> tuple[Image.Image, StoredAs]:
        """Return the whole RGB image out of one row's file, and how the file stores it.

        Raises:
            ImageError: the file cannot be used.
        """
        return decode_whole(data, self._name(row), self.max_pixels, exif=self.exif, background=self.background)

    def crop(self, row: int, image: Image.Image) -> Image.Image:
        """Return what one row's box cuts out of its whole image.

        Raises:
            ImageError: the box leaves the image.
        """
        boxes = self.table.boxes
        box = None if boxes is None or boxes[row, 0] < 0 else tuple(boxes[row].tolist())
        return crop(image, self._name(row), box)

    def _name(self, row: int) -> str:
        return f"{self.table.source}, row {row}, image {self.table.uri(row)}"


def nothing_of(transform: Transform) -> Pixels:
    """No images: uint8 (0, 3, size, size)."""
    return np.empty((0, 3, transform.size, transform.size), dtype=np.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore what Pillow warns of: odd metadata in files that decode nevertheless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class TrainingLoader:
    """Loads slices of planned batches; an image depends on (seed, epoch, step, position) alone."""

    @property
    def nothing(self) -> Pixels:
        """A batch's images without any: their shape and type."""
        return nothing_of(self.transform)

    def __init__(self, reader: ImageReader, transform: Transform, *, seed: int, on_bad_image: OnBadImage) -> None:
        """Load with `reader`, augment with `transform` under `seed`."""
        self.reader, self.transform, self.seed, self.on_bad_image = reader, transform, seed, on_bad_image

    def load(self, ids: Ids, *, epoch: int, step: int, first_position: int) -> Batch:
        """Load one slice of a global batch.

        Args:
            ids: int64 (n,), planned rows at positions first_position, first_position + 1, ...
            epoch: epoch of the plan.
            step: step inside the epoch.
            first_position: position of ids[0] in the global batch.

        Raises:
            ImageError: an image is bad and `on_bad_image` is "error", or a label has no readable image left.
        """
        with _quiet():
            return self._load(ids, epoch, step, first_position)

    def _load(self, ids: Ids, epoch: int, step: int, first_position: int) -> Batch:
        used = np.array(ids, dtype=np.int64)
        images = np.empty((len(ids), 3, self.transform.size, self.transform.size), dtype=np.uint8)
        bad: dict[int, str] = {}
        bits = np.random.Philox(key=0)
        generator, start = np.random.Generator(bits), bits.state
        for index, row in enumerate(ids.tolist()):
            # A new Philox would draw from the system's entropy first, only to leave it unused.
            bits.state = {**start, "state": {**start["state"], "key": self._key(epoch, step, first_position + index)}}
            try:
                image = self.reader.read(row)
            except ImageError as error:
                if self.on_bad_image == "error":
                    raise
                bad[row] = str(error)
                used[index], image = self._substitute(row, generator, bad)
            images[index] = self.transform(image, generator)
        return Batch(used, images, np.array(list(bad), dtype=np.int64), list(bad.values()))

    def _key(self, epoch: int, step: int, position: int) -> NDArray[np.uint64]:
        # Philox takes a 128-bit key: 64 bits of seed and position, 64 bits of epoch and step.
        low = (self.seed % 2**32) << 32 | position % 2**32
        high = (epoch % 2**32) << 32 | step % 2**32
        return np.array([low, high], dtype=np.uint64)

    def _substitute(self, row: int, generator: np.random.Generator, bad: dict[int, str]) -> tuple[int, Image.Image]:
        """Another instance of the same label, drawn from the position's own generator."""
        table = self.reader.table
        label = table.labels[row]
        others = np.flatnonzero((table.labels == label) & table.is_train)
        for other in generator.permutation(others[others != row]).tolist():
            try:
                return other, self.reader.read(other)
            except ImageError as error:
                bad[other] = str(error)
        raise ImageError(
            f"{table.source}: label {label} has no readable train image (first: {bad[row]}): "
            "replace the files or remove the label."
        )


class EvaluationLoader:
    """Loads rows in order with nothing random; bad images are left out and listed."""

    @property
    def nothing(self) -> Pixels:
        """A batch's images without any: their shape and type."""
        return nothing_of(self.transform)

    def __init__(self, reader: ImageReader, transform: Transform, *, on_bad_image: OnBadImage) -> None:
        """Load with `reader` and `transform`."""
        self.reader, self.transform, self.on_bad_image = reader, transform, on_bad_image

    def load(self, ids: Ids) -> Batch:
        """Load the rows `ids` int64 (n,); the batch holds only the readable ones.

        Raises:
            ImageError: an image is bad and `on_bad_image` is "error".
        """
        with _quiet():
            return self._load(ids)

    def _load(self, ids: Ids) -> Batch:
        generator = np.random.Generator(np.random.Philox(key=0))
        images = np.empty((len(ids), 3, self.transform.size, self.transform.size), dtype=np.uint8)
        kept: list[int] = []
        bad: dict[int, str] = {}
        for row in ids.tolist():
            try:
                images[len(kept)] = self.transform(self.reader.read(row), generator)
            except ImageError as error:
                if self.on_bad_image == "error":
                    raise
                bad[row] = str(error)
            else:
                kept.append(row)
        return Batch(
            np.array(kept, dtype=np.int64), images[: len(kept)], np.array(list(bad), dtype=np.int64), list(bad.values())
        )
