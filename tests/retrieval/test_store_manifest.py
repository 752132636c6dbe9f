"""Manifests of stores: the rules of image decoding are kept, and stores by other rules are not continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.store import Manifest, Store

WHITE = {"exif": "apply", "background": [255, 255, 255]}
MADE = Manifest(2, 1, 4, "weights", {"name": "resize"}, "table", "all", decoding=WHITE)


def begun(folder: Path) -> Store:
    """A store with the first of its two parts."""
    store = Store(pyarrow.fs.LocalFileSystem(), str(folder))
    assert store.begin(MADE) == [0, 1]
    store.write_part(0, {"id": np.array([0])}, np.zeros((1, 4), dtype=np.float32), {})
    return store


def test_the_same_rules_continue_a_store(tmp_path: Path) -> None:
    store = begun(tmp_path)
    assert store.manifest() == MADE
    assert store.begin(MADE) == [1]


@pytest.mark.parametrize("decoding", [{**WHITE, "exif": "ignore"}, {**WHITE, "background": [0, 0, 0]}])
def test_other_rules_do_not_continue_a_store(decoding: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(EmbeddingError, match=r"made by something else: decoding \(.* there, .* now\)"):
        begun(tmp_path).begin(replace(MADE, decoding=decoding))


def test_a_store_of_an_older_version_is_read_but_not_continued(tmp_path: Path) -> None:
    store = begun(tmp_path)
    store.write_part(1, {"id": np.array([1])}, np.zeros((1, 4), dtype=np.float32), {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["decoding"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert store.whole() == replace(MADE, decoding=None)
    with pytest.raises(EmbeddingError, match=r"ignored EXIF orientation and transparency.*run.resume: never"):
        store.begin(MADE)
