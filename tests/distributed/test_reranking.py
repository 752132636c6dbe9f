"""`evaluation.rerank`: what runs over shards and files against the same methods on plain arrays in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import yaml

from oml_ray.cli import main
from oml_ray.retrieval import exact
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.neighbors_file import read_neighbors
from oml_ray.retrieval.rerank.diffusion import diffusion
from oml_ray.retrieval.rerank.expansion import expanded
from oml_ray.retrieval.rerank.graph import graph_of
from oml_ray.retrieval.rerank.k_reciprocal import k_reciprocal
from oml_ray.retrieval.rerank.normalisation import csls, statistics_of, z_norm
from oml_ray.retrieval.rerank.thresholding import adaptive_threshold, constant_threshold
from oml_ray.retrieval.rows import Rows

pytestmark = pytest.mark.usefixtures("ray_session")

DEPTH, NUM, LABELS = 12, 60, 12


@dataclass
class Instances:
    """Rows of a file: positions are ids."""

    embeddings: np.ndarray
    labels: np.ndarray
    sequences: np.ndarray
    queries: np.ndarray
    gallery: np.ndarray

    def rows(self, ids: np.ndarray, embeddings: np.ndarray | None = None) -> Rows:
        found = self.embeddings[ids] if embeddings is None else embeddings
        return Rows(ids, found, self.sequences[ids])

    def write(self, path: Path) -> str:
        roles = {name: np.isin(np.arange(NUM), getattr(self, name)) for name in ("queries", "gallery")}
        columns = {
            "label": self.labels,
            "split": ["validation"] * NUM,
            "is_query": roles["queries"],
            "is_gallery": roles["gallery"],
            "sequence": pa.array([None if code < 0 else f"s{code}" for code in self.sequences], pa.string()),
            "embedding": pa.array(self.embeddings.tolist(), pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), path, row_group_size=13)
        return str(path)


@pytest.fixture(scope="module", params=["all among all", "queries apart"])
def instances(request: pytest.FixtureRequest) -> Instances:
    """Unit vectors; sequences go over labels."""
    generator = np.random.default_rng(3)
    labels = np.arange(NUM) % LABELS
    found = generator.normal(size=(LABELS, 8))[labels] + 0.9 * generator.normal(size=(NUM, 8))
    embeddings = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    sequences = generator.integers(-1, 15, NUM)
    order = generator.permutation(NUM)
    everything = np.arange(NUM)
    apart = request.param == "queries apart"
    queries, gallery = (np.sort(order[:20]), np.sort(order[15:])) if apart else (everything, everything)
    return Instances(embeddings, labels, sequences, queries, gallery)


@dataclass
class Plain:
    """A search in one process, by the library's functions on arrays."""

    of: Instances
    asking: Rows
    gallery: Rows
    neighbors: Neighbors

    @staticmethod
    def search(of: Instances, asking: Rows, gallery: Rows) -> Plain:
        return Plain(of, asking, gallery, exact.search(asking, gallery, DEPTH))

    def query_expansion(self, **arguments: Any) -> Plain:
        return Plain.search(self.of, expanded(self.asking, self.neighbors, self.gallery, **arguments), self.gallery)

    def database_augmentation(self, n: int, **arguments: Any) -> Plain:
        near = exact.search(self.gallery, self.gallery, n)
        return Plain.search(self.of, self.asking, expanded(self.gallery, near, self.gallery, n=n, **arguments))

    def union(self) -> Rows:
        """Queries and gallery; what is both, as in the gallery."""
        others = np.setdiff1d(self.asking.ids, self.gallery.ids)
        ids = np.union1d(self.gallery.ids, others)
        embeddings = np.empty((len(ids), self.gallery.dim), np.float32)
        for rows, wanted in ((self.gallery, self.gallery.ids), (self.asking, others)):
            embeddings[np.searchsorted(ids, wanted)] = rows.take(np.searchsorted(rows.ids, wanted))
        return self.of.rows(ids, embeddings)

    def with_list(self, neighbors: Neighbors) -> Plain:
        return Plain(self.of, self.asking, self.gallery, neighbors)

    def k_reciprocal(self, k1: int, k2: int, scales: str = "farthest", **arguments: Any) -> Plain:
        rows = self.union()
        arguments["scales"] = np.ones(len(rows)) if scales == "none" else None
        graph = graph_of(rows.ids, exact.search(rows, rows, max(k1, k2 - 1)))
        return self.with_list(k_reciprocal(self.neighbors, self.asking.ids, graph, rows, k1=k1, k2=k2, **arguments))

    def diffusion(self, edges: int, **arguments: Any) -> Plain:
        rows = self.union()
        graph = graph_of(rows.ids, exact.search(rows, rows, edges))
        return self.with_list(diffusion(self.neighbors, self.asking.ids, graph, **arguments))

    def statistics(self, n: int) -> Any:
        return statistics_of(self.gallery.ids, exact.search(self.gallery, self.asking, n), n)

    def z_norm(self, n: int, symmetric: bool) -> Plain:
        return self.with_list(z_norm(self.neighbors, self.statistics(n) if symmetric else None, n=n))

    def csls(self, n: int) -> Plain:
        return self.with_list(csls(self.neighbors, self.statistics(n), n=n))

    def constant_threshold(self, threshold: float) -> Plain:
        return self.with_list(constant_threshold(self.neighbors, threshold))

    def adaptive_threshold(self, factor: float) -> Plain:
        return self.with_list(adaptive_threshold(self.neighbors, factor))


def cmc_at_1(neighbors: Neighbors, of: Instances, has_truth: np.ndarray) -> float:
    hits = [
        bool(count) and of.labels[row[0]] == of.labels[query]
        for row, count, query in zip(neighbors.ids, neighbors.counts, of.queries, strict=True)
    ]
    return float(np.mean(np.array(hits)[has_truth]))


def ranked(neighbors: Neighbors, plain: Plain) -> list[dict[str, float] | None]:
    """Metrics by rank of each query: the list first, then the rest of the gallery as it was searched."""
    of = plain.of
    everything = exact.search(plain.asking, plain.gallery, len(plain.gallery))
    found: list[dict[str, float] | None] = []
    for place, query in enumerate(of.queries):
        first = neighbors.ids[place, : neighbors.counts[place]].tolist()
        rest = everything.ids[place, : everything.counts[place]].tolist()
        order = first + [row for row in rest if row not in first]
        relevant = [bool(of.labels[row] == of.labels[query]) for row in order]
        n = sum(relevant)
        places = [rank + 1 for rank, hit in enumerate(relevant) if hit]
        precisions = [(number + 1) / rank for number, rank in enumerate(places)]
        near = [precision for precision, rank in zip(precisions, places, strict=True) if rank <= n]
        found.append(
            {"map_r.all": sum(near) / n, "ap.all": sum(precisions) / n, "mrr.all": 1 / places[0]} if n else None
        )
    return found


LISTS: dict[str, list[dict[str, Any]]] = {
    "expansion, then graph": [
        {"name": "query_expansion", "n": 3, "alpha": 2.0},
        {"name": "k_reciprocal", "k1": 6, "k2": 3, "weight": 0.3},
    ],
    "augmentation, then expansion": [
        {"name": "database_augmentation", "n": 4, "alpha": 0.0},
        {"name": "query_expansion", "n": 2, "normalize": False},
    ],
    "graphs": [
        {"name": "diffusion", "edges": 7, "gamma": 2.0, "truncated": True},
        {"name": "k_reciprocal", "k1": 5, "k2": 2, "weight": 0.1, "scales": "none"},
    ],
    "normalisation": [{"name": "csls", "n": 4}, {"name": "z_norm", "n": 5, "symmetric": False}],
}
SHORTENING = [
    {"name": "z_norm", "n": 6, "symmetric": True},
    {"name": "constant_threshold", "threshold": 0.5},
    {"name": "adaptive_threshold", "factor": 1.5},
]


def evaluate(folder: Path, instances: Instances, rerank: list[dict[str, Any]], metrics: dict[str, Any]) -> Path:
    config = {
        "run": {"name": "evaluation", "storage": str(folder)},
        "source": {"embeddings": instances.write(folder / "own.parquet")},
        "evaluation": {
            "rerank": rerank,
            "depth": DEPTH,
            "neighbors": True,
            "gallery": {"shards": 2, "block_rows": 16},
            "metrics": {"cmc": [1], "bootstrap": {"samples": 20}, **metrics},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(folder / "config.yaml")]) == 0
    return folder / "evaluation"


def neighbors_in(run: Path, queries: np.ndarray) -> Neighbors:
    found, neighbors = read_neighbors(pyarrow.fs.LocalFileSystem(), str(run / "neighbors.parquet"))
    order = np.argsort(found)
    assert found[order].tolist() == queries.tolist()
    return neighbors.select(order)


@pytest.mark.parametrize(
    "name", ["expansion, then graph", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LISTS)[1:])]
)
def test_lists_of_rerankers_give_what_they_give_on_arrays(name: str, instances: Instances, tmp_path: Path) -> None:
    run = evaluate(tmp_path, instances, LISTS[name], {"map_r": True, "ap": True, "mrr": True, "per_query": True})
    plain = Plain.search(instances, instances.rows(instances.queries), instances.rows(instances.gallery))
    stages = [plain]
    for node in LISTS[name]:
        arguments = {key: value for key, value in node.items() if key != "name"}
        stages.append(getattr(stages[-1], node["name"])(**arguments))
    found = neighbors_in(run, instances.queries)
    assert found.ids.tolist() == stages[-1].neighbors.ids.tolist()
    np.testing.assert_array_equal(found.distances, stages[-1].neighbors.distances)

    document = json.loads((run / "metrics.json").read_text())
    assert [stage["name"].split()[0] for stage in document["reranking"]] == [
        "search",
        *(n["name"] for n in LISTS[name]),
    ]
    expected = [ranked(stage.neighbors, stage) for stage in stages]
    has_truth = np.array([values is not None for values in expected[0]])
    for told, stage, values in zip(document["reranking"], stages, expected, strict=True):
        cmc = cmc_at_1(stage.neighbors, instances, has_truth)
        assert told["metrics"]["cmc"]["1"]["value"] == pytest.approx(cmc, abs=1e-12)
        before = cmc_at_1(stages[0].neighbors, instances, has_truth)
        assert told["metrics"]["cmc"]["1"]["change"] == pytest.approx(cmc - before, abs=1e-12)
        for family in ("map_r", "ap", "mrr"):
            mean = np.mean([each[f"{family}.all"] for each in values if each is not None])
            assert told["metrics"][family]["all"]["value"] == pytest.approx(mean, abs=1e-12)
    last = document["reranking"][-1]["metrics"]["map_r"]["all"]["value"]
    assert document["overall"]["map_r"]["all"]["value"] == pytest.approx(last, abs=1e-12)
    assert not (run / "reranking").exists()
    assert "Re-ranking" in (run / "report.html").read_text()


@pytest.mark.slow
def test_thresholds_shorten_the_lists(instances: Instances, tmp_path: Path) -> None:
    run = evaluate(tmp_path, instances, SHORTENING, {})
    plain = Plain.search(instances, instances.rows(instances.queries), instances.rows(instances.gallery))
    for node in SHORTENING:
        plain = getattr(plain, node["name"])(**{key: value for key, value in node.items() if key != "name"})
    found = neighbors_in(run, instances.queries)
    assert found.ids.tolist() == plain.neighbors.ids.tolist()
    assert (found.counts < DEPTH).any()
    assert (found.counts > 0).any()


def test_indexes_are_searched_again_too(instances: Instances, tmp_path: Path) -> None:
    """A FAISS index of all is exact, and kept on disk for the gallery alone that was there first."""
    rerank = [{"name": "database_augmentation", "n": 3}, {"name": "k_reciprocal", "k1": 5, "k2": 2}]
    kept = tmp_path / "index"
    config = {
        "run": {"name": "evaluation", "storage": str(tmp_path)},
        "source": {"embeddings": instances.write(tmp_path / "own.parquet")},
        "evaluation": {
            "rerank": rerank,
            "depth": DEPTH,
            "neighbors": True,
            "gallery": {"backend": "faiss", "factory": "Flat", "shards": 1, "index": str(kept), "rescore_factor": 5},
            "metrics": {"bootstrap": {"samples": 20}},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(tmp_path / "config.yaml")]) == 0
    plain = Plain.search(instances, instances.rows(instances.queries), instances.rows(instances.gallery))
    expected = plain.database_augmentation(n=3).k_reciprocal(k1=5, k2=2)
    assert neighbors_in(tmp_path / "evaluation", instances.queries).ids.tolist() == expected.neighbors.ids.tolist()
    assert len(list(kept.iterdir())) == 2  # the index and what says what it is of


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        ({"rerank": [{"name": "constant_threshold", "threshold": 1.0}], "metrics": {"ap": True}}, "metrics.ap"),
        (
            {
                "rerank": [{"name": "csls"}],
                "metrics": {"map_r": True},
                "gallery": {"backend": "faiss", "factory": "Flat"},
            },
            "gallery.backend: exact",
        ),
        ({"rerank": [{"name": "csl"}]}, "k_reciprocal"),
        ({"rerank": [{"name": "csls"}, {"name": "trivial_distance"}]}, "trivial_distance cannot follow csls"),
        ({"rerank": [{"name": "diffusion", "alpha": 1.0}]}, "alpha"),
    ],
)
def test_what_cannot_be_reranked_is_refused(
    evaluation: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "run": {"name": "r", "storage": str(tmp_path)},
        "source": {"embeddings": "x.npy"},
        "evaluation": evaluation,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(tmp_path / "config.yaml")]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err
