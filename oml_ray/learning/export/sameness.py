"""What every exported model must do: give the extractor's own embeddings, whatever the size of the batch."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from oml_ray.errors import ExportError, StorageError, reason_of
from oml_ray.learning.extractors import Extractor, Size, sides

TOLERANCE = 1e-4  # of float32 embeddings of unit length, or of the largest value where they are longer
BATCHES = (1, 2, 5)


@torch.no_grad()
def largest_difference(extractor: Extractor, exported: Callable[[Tensor], Tensor], size: Size, *, what: str) -> float:
    """Compare exported and own embeddings of random images, in batches of several sizes.

    Args:
        extractor: in evaluation mode.
        exported: images uint8 (n, 3, height, width) -> embeddings (n, D).
        size: side of the images in pixels, or their height and width.
        what: how messages call the exported model.

    Returns:
        The largest absolute difference, as a share of the largest value where that is above 1.

    Raises:
        ExportError: a batch cannot be embedded, or its embeddings differ by more than `TOLERANCE`.
    """
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for n in BATCHES:
        images = torch.randint(0, 256, (n, 3, *sides(size)), dtype=torch.uint8, generator=generator)
        expected = extractor(images)
        try:
            found = exported(images)
        except Exception as error:  # runtimes raise many kinds
            raise ExportError(f"{what} cannot embed a batch of {n}: {reason_of(error)}.") from None
        if found.shape != expected.shape:
            raise ExportError(
                f"{what} gives embeddings of shape {tuple(found.shape)} where torch gives {tuple(expected.shape)}."
            )
        difference = float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))
        if not difference <= TOLERANCE:  # NaN too
            raise ExportError(
                f"{what} differs from torch by {difference:.2g} in a batch of {n}; {TOLERANCE:g} is allowed: "
                "export another form, or look whether the checkpoint's own embeddings are finite."
            )
        largest = max(largest, difference)
    return largest


@contextmanager
def evaluating(extractor: Extractor) -> Iterator[None]:
    """Have an extractor in evaluation mode, and afterwards as it was."""
    was = extractor.training
    extractor.eval()
    try:
        yield
    finally:
        extractor.train(was)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch logs and prints while it traces: a failure is told by its exception, in one message."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have a full disk and its like told in one message.

    Raises:
        StorageError: the body could not write.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        raise StorageError(f"{path} cannot be written: {reason_of(error)}.") from None
