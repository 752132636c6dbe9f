"""The embed job killed (-9) at random moments and started again: the store is that of an unbroken run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import yaml
from helpers import write_images
from processes import Job

from oml_ray.retrieval.store import Manifest, Store, embeddings_of

KILLS = 5
BAD_ROW = 31


def write_config(folder: Path, table: Path, name: str) -> Path:
    config: dict[str, Any] = {
        "run": {"name": name, "storage": str(folder)},
        "data": {"table": str(table), "on_bad_image": "skip", "split": "all"},
        "source": {"extractor": {"name": "timm", "model": "test_vit"}, "size": 32},
        "evaluation": {"embed": {"rows_per_part": 2, "actors": 2}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def parts_of(run: Path) -> dict[str, int]:
    """Name and time of each part that is there."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "embeddings").glob("part-*.parquet")}


def rows_of(run: Path) -> tuple[Manifest, dict[int, bytes], dict[int, str]]:
    """Manifest, embedding of each row, and bad images."""
    store = Store(pyarrow.fs.LocalFileSystem(), str(run / "embeddings"))
    manifest = store.whole()
    rows: dict[int, bytes] = {}
    for part in store.parts(manifest, ["id", "embedding"]):
        for row, embedding in zip(part["id"].to_pylist(), embeddings_of(part), strict=True):
            assert row not in rows, f"row {row} is there twice"
            rows[row] = np.asarray(embedding).tobytes()
    return manifest, rows, store.bad_images(manifest)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seven starts of Ray: on a machine that is busy with other things, minutes
def test_a_killed_job_continues_to_the_store_of_an_unbroken_one(tmp_path: Path) -> None:
    table = write_images(tmp_path / "t", labels=150, instances=3, validation=50)
    (tmp_path / "t" / "images" / f"{BAD_ROW // 3}_{BAD_ROW % 3}.png").write_text("no image")
    with Job("embed", write_config(tmp_path, table, "unbroken")) as job:
        assert job.end() == (0, "")
    expected = parts_of(tmp_path / "unbroken")

    generator = random.Random(0)
    config, run = write_config(tmp_path, table, "killed"), tmp_path / "killed"
    kept: dict[str, int] = {}
    for _ in range(KILLS):
        wanted, delay = len(kept) + generator.randrange(20), generator.uniform(0, 0.2)
        with Job("embed", config) as job:
            while len(parts_of(run)) < max(wanted, 1):
                assert job.process.poll() is None, job.end()
                time.sleep(0.01)
            time.sleep(delay)
            job.kill()
        assert job.process.returncode == -signal.SIGKILL, "it ended before it was killed"
        found = parts_of(run)
        assert kept.items() <= found.items(), "a part was made again"
        assert len(found) < len(expected), "it was whole before it was killed"
        kept = found
    with Job("embed", config) as job:
        assert job.end() == (0, "")

    assert kept.items() <= parts_of(run).items()
    assert parts_of(run).keys() == expected.keys()
    manifest, rows, bad = rows_of(run)
    assert len(rows) == 449
    assert list(bad) == [BAD_ROW]
    assert (manifest, rows) == rows_of(tmp_path / "unbroken")[:2]
