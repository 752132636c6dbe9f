"""Exported indexes as their own libraries read them, against a naive search; ids are those of the gallery."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import ConfigError, EmbeddingError, StorageError
from oml_ray.retrieval.faiss_index import FaissSettings
from oml_ray.retrieval.hnswlib_index import HnswlibSettings
from oml_ray.retrieval.index_export import Tried, export_index
from oml_ray.retrieval.rows import Rows

BACKENDS: dict[str, FaissSettings | HnswlibSettings] = {
    "Flat": FaissSettings("Flat"),
    "HNSW16": FaissSettings("HNSW16", ef_construction=200, ef_search=300),
    "IVF8,Flat": FaissSettings("IVF8,Flat", nprobe=8),
    "IVF8,PQ4,RFlat": FaissSettings("IVF8,PQ4,RFlat", nprobe=8, parameters={"k_factor_rf": 100}, train_rows=2000),
    "hnswlib": HnswlibSettings(ef_search=300),
}


def rows(seed: int, num: int = 2500, dimension: int = 8) -> Rows:
    """Ids are in no order, and some are large."""
    rng = np.random.default_rng(seed)
    ids = np.unique(np.concatenate([rng.integers(0, 2**62, num), np.arange(num)]))
    return Rows(rng.choice(ids, num, replace=False), rng.normal(0.3, 1.0, (num, dimension)).astype(np.float32))


def naive(gallery: Rows, queries: np.ndarray, k: int, distance: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids (q, k) of the nearest and their distances, by the definition in float64."""
    q, g = queries.astype(np.float64)[:, None], gallery.embeddings.astype(np.float64)[None]
    if distance == "euclidean":
        all_distances = np.sqrt(((q - g) ** 2).sum(axis=2))
    else:
        all_distances = 1 - (q * g).sum(axis=2) / np.linalg.norm(q, axis=2) / np.linalg.norm(g, axis=2)
    order = np.argsort(all_distances, axis=1)[:, :k]
    return gallery.ids[order], np.take_along_axis(all_distances, order, axis=1)


def answers(path: Path, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and what the library calls distances, by nothing but the file and what its facts say."""
    facts = json.loads(path.with_name(f"{path.name}.json").read_text())["made_of"]
    if facts["query"] != "an embedding x":
        assert facts["query"] == "x / |x| of an embedding x"
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    if facts["backend"] == "faiss":
        found, ids = faiss.read_index(str(path)).search(queries, k)
        return ids, found
    graph = hnswlib.Index(space="l2", dim=facts["dimension"])
    graph.load_index(str(path))
    graph.set_ef(facts["searched_with"]["ef_search"])
    ids, found = graph.knn_query(queries, k)
    return ids.astype(np.int64), found


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_library_finds_what_a_naive_search_finds(name: str, distance: Any, tmp_path: Path) -> None:
    gallery, path = rows(0), tmp_path / "index"
    assert export_index(BACKENDS[name], gallery, path, distance=distance, block_rows=700) == Tried(100, 100)
    queries = np.random.default_rng(1).normal(0.3, 1.0, (40, 8)).astype(np.float32)
    ids, found = answers(path, queries, 3)
    expected_ids, distances = naive(gallery, queries, 3, distance)
    expected = distances**2 if distance == "euclidean" else 2 * distances
    assert (ids == expected_ids).mean() > 0.99
    np.testing.assert_allclose(found[ids == expected_ids], expected[ids == expected_ids], rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 60),
    dimension=st.integers(1, 9),
    block_rows=st.sampled_from([1, 7, 4096]),
    backend=st.sampled_from(["Flat", "hnswlib"]),
)
def test_every_row_is_there_under_its_id(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num: int, dimension: int, block_rows: int, backend: str
) -> None:
    gallery, path = rows(seed, num, dimension), tmp_path_factory.mktemp("index") / "index"
    tried = export_index(BACKENDS[backend], gallery, path, block_rows=block_rows)
    ids, found = answers(path, gallery.embeddings, 1)
    np.testing.assert_array_equal(ids[:, 0], gallery.ids)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-5)
    assert tried == Tried(num, num)


def test_facts_say_what_the_index_is_of(tmp_path: Path) -> None:
    gallery, path = rows(2), tmp_path / "folder" / "index.faiss"
    how = FaissSettings("IVF8,Flat", nprobe=3, train_rows=1000, seed=4)
    export_index(how, gallery, path, distance="cosine", facts={"table": "t", "weights": "w"})
    facts = json.loads((tmp_path / "folder" / "index.faiss.json").read_text())
    data = path.read_bytes()
    assert (facts["sha256"], facts["num_bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    made_of = facts["made_of"]
    expected = {"backend": "faiss", "factory": "IVF8,Flat", "train_rows": 1000, "seed": 4, "distance": "cosine"}
    expected |= {"dimension": 8, "rows": 2500, "table": "t", "weights": "w", "answer": "twice the cosine distance, "
                 "2 (1 - cos)", "searched_with": {"nprobe": 3, "ef_search": None}}  # fmt: skip
    assert {key: made_of[key] for key in expected} == expected
    assert faiss.try_extract_index_ivf(faiss.read_index(str(path))).nprobe == 3
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.faiss", "index.faiss.json"]


class Counted:
    """Embeddings that remember the most rows that were asked for at once."""

    ndim, dtype = 2, np.dtype(np.float32)

    def __init__(self, embeddings: np.ndarray) -> None:
        self.embeddings, self.shape, self.most = embeddings, embeddings.shape, 0

    def __getitem__(self, some: Any) -> np.ndarray:
        found = self.embeddings[some]
        self.most = max(self.most, len(found))
        return found


@pytest.mark.parametrize("name", BACKENDS)
def test_embeddings_are_read_block_by_block(name: str, tmp_path: Path) -> None:
    plain = rows(3)
    counted = Counted(plain.embeddings)
    gallery = Rows(plain.ids, counted)  # type: ignore[arg-type]
    export_index(BACKENDS[name], gallery, tmp_path / "index", block_rows=128)
    assert counted.most == 128


def test_compressed_indexes_tell_what_they_lose(tmp_path: Path) -> None:
    """Forty values on a line, cut into 2 cells: no row is told from its neighbors."""
    line = np.arange(400, dtype=np.float32)[:, None]
    tried = export_index(FaissSettings("PQ1x1"), Rows(np.arange(400), line), tmp_path / "index")
    assert tried.rows == 100
    assert tried.found < 25


@pytest.mark.parametrize("backend", ["Flat", "hnswlib"])
def test_an_index_that_answers_otherwise_from_its_file_is_not_left(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, other = BACKENDS[backend], rows(5)
    export_index(how, other, tmp_path / "other")
    right = type(how).read
    monkeypatch.setattr(
        type(how), "read", lambda self, path, dimension: right(self, str(tmp_path / "other"), dimension)
    )
    with pytest.raises(StorageError, match=r"answers otherwise after it was written"):
        export_index(how, rows(4), tmp_path / "folder" / "index")
    assert not (tmp_path / "folder").exists()


def test_what_has_no_index_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    gallery = rows(6, 50)
    flat = Rows(np.arange(2), np.zeros((2, 3), np.float32))
    for how, some, distance, error, message in (
        (FaissSettings("Nonsense"), gallery, "euclidean", ConfigError, "'Nonsense' is not one for 8 dimensions"),
        (FaissSettings("IVF64,Flat"), gallery, "euclidean", EmbeddingError, "cannot be built of 50 rows"),
        (FaissSettings("Flat"), flat, "cosine", EmbeddingError, "no direction"),
        (FaissSettings("Flat"), gallery, "dot", ConfigError, "dot"),
    ):
        with pytest.raises(error, match=message):
            export_index(how, some, tmp_path / "index", distance=distance)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())
