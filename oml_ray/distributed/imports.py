"""Imports of large libraries at less cost."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import in the body of a `with` while Python looks for no garbage, nor looks through what is there later.

    Imports make hundreds of thousands of objects that stay: to look through them again and again takes a third of the
    time that torch with timm needs.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # Triton calls what is left at the end leaked, on stderr
