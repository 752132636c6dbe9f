"""Everything that a run writes on storage that fails, or is full, at any moment: old or new, and one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import failing_writer
import pytest
from failing_storage import FailingStorage, build


@pytest.mark.parametrize("writer", failing_writer.WRITERS)
def test_a_reader_sees_the_old_or_the_new_content(writer: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    arguments = build(tmp_path), tmp_path / "run", tmp_path / "state"
    storage = FailingStorage(*arguments)
    done = subprocess.run(
        [sys.executable, failing_writer.__file__, writer, *arguments],
        env={**os.environ, **storage.environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
