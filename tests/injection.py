"""Failures injected into the functions of a job: a defect, a lack of memory, a death, NaN in the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

FOLDER = Path(__file__).with_name("injected")


class Injection:
    """One function that fails at some of its calls, counted over all processes of a job."""

    def __init__(self, folder: Path, target: str, failure: str, *, first: int, times: int) -> None:
        """Describe a failure.

        Args:
            folder: where calls are counted.
            target: "module:function" or "module:Class.method".
            failure: a kind of `injected/sitecustomize.py`.
            first: number of the first call that fails, from 0.
            times: number of calls that fail.
        """
        self._count, self._first = folder / "calls", first
        self._count.write_text("0")
        paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "OML_RAY_TEST_TARGET": target,
            "OML_RAY_TEST_FAILURE": failure,
            "OML_RAY_TEST_CALLS": json.dumps([first, times]),
            "OML_RAY_TEST_COUNT": str(self._count),
        }

    @property
    def has_met(self) -> bool:
        """Whether a call has failed."""
        return int(self._count.read_text()) > self._first
