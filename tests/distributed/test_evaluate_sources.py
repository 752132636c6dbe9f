"""`oml-ray evaluate` of embeddings that are there: every source against naive metrics, and what is wrong with them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import write_images

from oml_ray.cli import main
from oml_ray.config import nodes
from oml_ray.data.table import Table, read_table
from oml_ray.distributed import sources
from oml_ray.distributed.embed import columns_of
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.neighbors_file import read_neighbors
from oml_ray.retrieval.store import Manifest, Store

pytestmark = pytest.mark.usefixtures("ray_session")

RANKS = [1, 3, 10]
LISTED = ("cmc", "precision", "map", "recall", "strict_precision", "ndcg")
RANKED = ("map_r", "r_precision", "ap", "mrr")
METRICS: dict[str, Any] = {
    **dict.fromkeys(LISTED, RANKS),
    **dict.fromkeys(RANKED, True),
    "fnmr_at_fmr": [0.05, 0.5],
    "pcf": [0.3, 0.9],
    "per_query": True,
    "bootstrap": {"samples": 20},
}

# Naive metrics: one query at a time, by DESIGN's definitions


@dataclass
class Answer:
    """A query's whole sorted gallery, and its metrics; None without ground truth."""

    ids: list[int]
    distances: list[float]
    values: dict[str, float] | None


def answer(query: int, gallery: np.ndarray, labels: np.ndarray, sequences: list[str], embeddings: np.ndarray) -> Answer:
    seen = []
    for row in gallery.tolist():
        in_sequence = sequences[query] != "" and sequences[query] == sequences[row]
        if row != query and not in_sequence:
            difference = embeddings[query].astype(np.float64) - embeddings[row]
            seen.append((float(np.float32(math.sqrt((difference**2).sum()))), row))
    seen.sort()
    relevant = [bool(labels[row] == labels[query]) for _, row in seen]
    values = metrics_of(relevant) if any(relevant) else None
    return Answer([row for _, row in seen], [distance for distance, _ in seen], values)


def metrics_of(relevant: list[bool]) -> dict[str, float]:
    n, values = sum(relevant), {}
    for k in RANKS:
        first = relevant[:k]
        hits = sum(first)
        precisions = [sum(first[: place + 1]) / (place + 1) for place in range(len(first)) if first[place]]
        values[f"cmc.{k}"] = float(hits > 0)
        values[f"precision.{k}"] = hits / min(n, k)
        values[f"map.{k}"] = sum(precisions) / len(precisions) if precisions else 0.0
        values[f"recall.{k}"] = hits / n
        values[f"strict_precision.{k}"] = hits / k
        gains = [1 / math.log2(place + 2) for place in range(k)]
        gained = sum(gain for gain, hit in zip(gains, first, strict=False) if hit)
        values[f"ndcg.{k}"] = gained / sum(gains[: min(n, k)])
    places = [place + 1 for place, hit in enumerate(relevant) if hit]
    precisions = [(number + 1) / place for number, place in enumerate(places)]
    values["r_precision.all"] = sum(place <= n for place in places) / n
    values["map_r.all"] = sum(precision for precision, place in zip(precisions, places, strict=True) if place <= n) / n
    values["ap.all"] = sum(precisions) / n
    values["mrr.all"] = 1 / places[0]
    return values


def fnmr_of(answers: dict[int, Answer], labels: np.ndarray, fmr: float) -> float:
    """Share of the pairs of one label that are at least as far apart as a quantile of the other pairs."""
    pairs = [
        (query, *pair) for query, found in answers.items() for pair in zip(found.ids, found.distances, strict=True)
    ]
    genuine = [distance for query, row, distance in pairs if labels[query] == labels[row]]
    impostors = [distance for query, row, distance in pairs if labels[query] != labels[row]]
    threshold = np.quantile(np.array(impostors), fmr)
    return float(np.mean([distance >= threshold for distance in genuine]))


def pcf_of(embeddings: np.ndarray, share: float) -> float:
    """(1 + how many leading components explain at most the share) / dimensions."""
    centred = embeddings - embeddings.mean(axis=0, dtype=np.float64)
    explained = np.linalg.svd(centred, compute_uv=False) ** 2
    return float((1 + (np.cumsum(explained) / explained.sum() <= share).sum()) / embeddings.shape[1])


# Instances, and the same embeddings in every form


@dataclass
class Instances:
    """Rows that are evaluated: their position is their id, `names` is what the files of a run call them."""

    names: np.ndarray
    queries: np.ndarray
    gallery: np.ndarray
    labels: np.ndarray
    categories: list[str]
    sequences: list[str]
    embeddings: np.ndarray


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 train labels and 10 validation labels of 6 instances, with all that a table may have; one has no ground truth.

    Sequences go over labels.
    """
    generator = np.random.default_rng(0)
    path = write_images(tmp_path_factory.mktemp("table"), labels=13, instances=6, validation=10, size=8)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        label = int(row["label"])
        row["category"] = ["shoes", "bags", ""][label % 3]
        row["label_name"] = f"model {label}"
        row |= {"sequence": "", **dict.fromkeys(("x_1", "y_1", "x_2", "y_2"), "")}
        if number % 5 == 0:
            row |= {"x_1": "1", "y_1": "0", "x_2": "7", "y_2": "8"}
        if row["split"] == "validation":
            role = 2 if number % 6 == 0 else generator.integers(3)
            row |= {"is_query": str(role != 1), "is_gallery": str(role != 0)}
            row["sequence"] = "lonely" if label == 12 else str(generator.choice(["", "a", "b", "c", "d", "e"]))
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def embeddings(table: Path) -> np.ndarray:
    """(78, 12) of every row of the table: multiples of 2**-10, whose distances are exact in float64, and some twins."""
    generator = np.random.default_rng(1)
    labels = np.arange(78) // 6
    found = 0.6 * generator.normal(size=(13, 12))[labels] + generator.normal(size=(78, 12))
    found[generator.integers(18, 78, 20)] = found[generator.integers(18, 78, 20)]
    return (np.round(found * 1024) / 1024).astype(np.float32)


@pytest.fixture(scope="module")
def instances(table: Path, embeddings: np.ndarray) -> Instances:
    """The table's rows."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    return Instances(
        np.arange(len(rows)),
        np.flatnonzero([row["is_query"] == "True" for row in rows]),
        np.flatnonzero([row["is_gallery"] == "True" for row in rows]),
        np.array([int(row["label"]) for row in rows]),
        [row["category"] for row in rows],
        [row["sequence"] for row in rows],
        embeddings,
    )


def write_store(
    folder: Path, table: Table, rows: np.ndarray, embeddings: np.ndarray, split: str, bad: int | None = None
) -> str:
    """A store as `oml-ray embed` makes it, of embeddings that are known, without a row whose image was unreadable."""
    manifest = Manifest(len(rows), 7, embeddings.shape[1], "weights", {"size": 8}, table.fingerprint, split)
    store = Store(pyarrow.fs.LocalFileSystem(), str(folder / "run" / "embeddings"))
    for part in store.begin(manifest):
        asked = rows[part * 7 : (part + 1) * 7]
        ids = asked[asked != bad]
        reasons = {int(row): "the file is gone" for row in asked[asked == bad]}
        store.write_part(part, columns_of(table, ids), embeddings[ids], reasons)
    return str(folder / "run")


def write_parquet(folder: Path, instances: Instances) -> tuple[str, Instances]:
    """Validation rows of the table under ids of their own, in another order, all of them query and gallery."""
    rows = np.random.default_rng(2).permutation(np.arange(18, 78))
    own = Instances(
        10**12 + 7 * rows[::-1],
        np.arange(60),
        np.arange(60),
        instances.labels[rows],
        [instances.categories[row] for row in rows],
        [instances.sequences[row] for row in rows],
        instances.embeddings[rows],
    )
    columns = {
        "id": own.names,
        "label": own.labels,
        "category": [name or None for name in own.categories],
        "sequence": own.sequences,
        "embedding": pa.array(own.embeddings.astype(np.float64).tolist()),
        "colour": ["red"] * 60,
    }
    pq.write_table(pa.table(columns), folder / "own.parquet", row_group_size=11)
    return str(folder / "own.parquet"), own


def config_of(folder: Path, source: dict[str, str], **more: Any) -> str:
    config = {"run": {"name": "evaluation", "storage": str(folder)}, "source": source, **more}
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "evaluation.yaml")


# The tests

GALLERIES: dict[str, dict[str, Any]] = {
    "store": {"shards": 1},
    "store_and_table": {"shards": 3, "block_rows": 16},
    "parquet": {"shards": 2, "precision": "certified", "block_rows": 16},
    "npy": {"shards": 1, "precision": "certified"},
}
BAD = 40  # a row that stores left out
COMPARED = [
    {"backend": "faiss", "factory": "IVF4,Flat", "nprobe": 1, "shards": 1},
    {"backend": "hnswlib", "ef_search": 100, "shards": 1},
]


SLOW = {"store_and_table", "npy", "dimensions within a file", "part overwritten", "nprobe of a flat index"}


def quick_and_slow(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; those that start more actors than `make test` has time for are marked."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.fixture(scope="module", params=quick_and_slow(GALLERIES))
def evaluated(
    request: pytest.FixtureRequest, table: Path, instances: Instances, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Instances]:
    """The kind of source, the run that evaluated it, and what it was of."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    given: dict[str, Any] = {} if kind in ("store", "parquet") else {"data": {"table": str(table)}}
    what = instances
    if kind.startswith("store"):
        split = "all" if kind == "store" else "validation"
        rows = np.arange(0 if kind == "store" else 18, 78)
        source = {"store": write_store(folder, read_table(table), rows, instances.embeddings, split, bad=BAD)}
        present = {role: getattr(what, role)[getattr(what, role) != BAD] for role in ("queries", "gallery")}
        what = replace(what, **present)
    elif kind == "parquet":
        path, what = write_parquet(folder, instances)
        source = {"embeddings": path}
    else:
        np.save(folder / "all.npy", instances.embeddings)
        source = {"embeddings": str(folder / "all.npy")}
    evaluation: dict[str, Any] = {"gallery": GALLERIES[kind], "metrics": METRICS, "neighbors": True}
    if kind == "npy":
        evaluation["compare"] = COMPARED
    assert main(["evaluate", config_of(folder, source, evaluation=evaluation, **given)]) == 0
    return kind, folder / "evaluation", what


def test_a_source_gives_the_naive_numbers(evaluated: tuple[str, Path, Instances]) -> None:
    """Metrics overall and by category, those of each query, and neighbors, whatever the shards and the precision."""
    _, run, what = evaluated
    arguments = what.gallery, what.labels, what.sequences, what.embeddings
    expected = {query: answer(query, *arguments) for query in what.queries.tolist()}
    document = json.loads((run / "metrics.json").read_text())
    lost = [query for query, found in expected.items() if found.values is None]
    assert lost
    assert document["counts"]["queries"] == len(what.queries)
    assert document["counts"]["gallery"] == len(what.gallery)
    assert document["counts"]["without_ground_truth"] == len(lost)

    groups: dict[str, list[dict[str, float]]] = {"": [], "shoes": [], "bags": []}
    for query, found in expected.items():
        for name in {"", what.categories[query]}:
            groups[name] += [] if found.values is None else [found.values]
    assert set(document["categories"]) == {"shoes", "bags"}
    for name, rows in groups.items():
        summary = document["categories"][name] if name else document["overall"]
        means = {
            f"{family}.{k}": entry["value"]
            for family, by_k in summary.items()
            for k, entry in by_k.items()
            if family in (*LISTED, *RANKED)
        }
        assert means == pytest.approx({key: np.mean([row[key] for row in rows]) for key in rows[0]}, abs=1e-12)
        members = [row for row in what.gallery.tolist() if not name or what.categories[row] == name]
        fractions = {share: pcf_of(what.embeddings[members], share) for share in METRICS["pcf"]}
        assert {float(share): entry["value"] for share, entry in summary["pcf"].items()} == pytest.approx(fractions)
    fnmr = {float(fmr): entry["value"] for fmr, entry in document["overall"]["fnmr_at_fmr"].items()}
    assert fnmr == pytest.approx({fmr: fnmr_of(expected, what.labels, fmr) for fmr in METRICS["fnmr_at_fmr"]})

    ids, neighbors = read_neighbors(pyarrow.fs.LocalFileSystem(), str(run / "neighbors.parquet"))
    assert sorted(ids.tolist()) == sorted(what.names[what.queries].tolist())
    by_name = {int(what.names[query]): found for query, found in expected.items()}
    for row, name in enumerate(ids.tolist()):
        assert neighbors.ids[row].tolist() == what.names[by_name[name].ids[:10]].tolist()
        assert neighbors.distances[row].tolist() == by_name[name].distances[:10]

    per_query = pq.read_table(run / "per_query.parquet").to_pylist()
    assert len(per_query) == len(what.queries)
    for found_row in per_query:
        values = by_name[found_row.pop("query_id")].values
        assert found_row == (pytest.approx(values, abs=1e-12) if values else dict.fromkeys(found_row))


def test_a_file_may_hold_the_rows_of_the_split_alone(table: Path, embeddings: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "some.npy", embeddings[18:])
    data = nodes.SplitData(table=str(table))
    embedded = sources.from_files(str(tmp_path / "some.npy"), read_table(data.table), data)
    assert embedded.embeddings.ids().tolist() == list(range(18, 78))
    (block,) = embedded.blocks(np.array([20, 77]), 100)
    np.testing.assert_array_equal(block.embeddings, embeddings[[20, 77]])


def test_images_that_the_store_left_out_are_counted_and_named(evaluated: tuple[str, Path, Instances]) -> None:
    kind, run, _ = evaluated
    counts, report = json.loads((run / "metrics.json").read_text())["counts"], (run / "report.html").read_text()
    assert counts["bad_images"] == (1 if kind.startswith("store") else 0)
    assert ("the file is gone" in report) == kind.startswith("store")
    assert {"store": "row 40", "store_and_table": "6_4.png"}.get(kind, "") in report


def test_pictures_are_shown_where_there_are_images(evaluated: tuple[str, Path, Instances]) -> None:
    kind, run, _ = evaluated
    report = (run / "report.html").read_text()
    assert ("data:image/jpeg" in report) == (kind in ("store_and_table", "npy"))
    assert bool(re.search(r"row \d+, label (\d+) \(model \1\)", report)) == (kind in ("store_and_table", "npy"))


def test_ways_of_searching_are_compared_with_exact_search(evaluated: tuple[str, Path, Instances]) -> None:
    kind, run, _ = evaluated
    document, report = json.loads((run / "metrics.json").read_text()), (run / "report.html").read_text()
    names = ["faiss shards=1 factory=IVF4,Flat nprobe=1", "hnswlib shards=1 ef_search=100"]
    if kind != "npy":
        assert "comparisons" not in document
        assert "hnswlib" not in report
        return
    assert [setting["name"] for setting in document["comparisons"]] == names
    assert all(name in report for name in names)
    coarse, fine = document["comparisons"]
    assert coarse["k"] == fine["k"] == 10
    assert 0 < coarse["ann_recall"] < fine["ann_recall"] == 1
    assert coarse["metrics"]["cmc"]["10"]["change"] < 0
    assert fine["metrics"].keys() == set(LISTED), "the others are counted exactly, whatever finds the neighbors"
    for setting in document["comparisons"]:
        assert setting["queries_per_s"] > 0
        assert setting["num_bytes"] > 0
        for family, by_k in setting["metrics"].items():
            for k, entry in by_k.items():
                exact = document["overall"][family][k]["value"]
                assert entry["value"] == pytest.approx(exact + entry["change"])
                assert entry["change_ci95"][0] <= entry["change"] <= entry["change_ci95"][1]
    assert all(entry["change"] == 0 for by_k in fine["metrics"].values() for entry in by_k.values())


# What is wrong with a source, or with how it is evaluated

Case = tuple[dict[str, Any], str]


@dataclass
class Given:
    """What a bad case starts from."""

    folder: Path
    table: Path
    embeddings: np.ndarray

    @property
    def data(self) -> dict[str, str]:
        return {"table": str(self.table)}

    def npy(self, rows: int = 78) -> dict[str, str]:
        np.save(self.folder / "bad.npy", self.embeddings[:rows])
        return {"embeddings": str(self.folder / "bad.npy")}

    def parquet(self, rows: list[Any] | None = None, **columns: Any) -> dict[str, str]:
        """Six embeddings of three labels."""
        rows = self.embeddings[:6].tolist() if rows is None else rows
        columns = {"label": [1, 1, 2, 2, 3, 3], "embedding": pa.array(rows, pa.list_(pa.float32())), **columns}
        return self.written({name: column for name, column in columns.items() if column is not None})

    def written(self, columns: dict[str, Any], name: str = "bad.parquet") -> dict[str, str]:
        pq.write_table(pa.table(columns), self.folder / name, compression="none")
        return {"embeddings": str(self.folder / "bad.parquet")}

    def store(self, rows: np.ndarray | None = None, split: str = "validation") -> dict[str, str]:
        rows = np.arange(18, 78) if rows is None else rows
        return {"store": write_store(self.folder, read_table(str(self.table)), rows, self.embeddings, split)}

    def part(self, number: int) -> Path:
        return self.folder / "run" / "embeddings" / f"part-{number:06d}.parquet"


def ragged(given: Given) -> Case:
    rows = given.embeddings[:6].tolist()
    rows[4] = rows[4][:5]
    return {"source": given.parquet(rows)}, "1 not of 12 values (row 4 has 5)"


def parts_of_two_dimensions(given: Given) -> Case:
    (given.folder / "parts").mkdir()
    for dimension in (3, 4):
        vectors = pa.FixedSizeListArray.from_arrays(np.zeros(2 * dimension, np.float32), dimension)
        name = given.folder / "parts" / f"{dimension}.parquet"
        pq.write_table(pa.table({"label": [1, 1], "embedding": vectors}), name)
    return {"source": {"embeddings": str(given.folder / "parts")}}, "found embeddings of dimension 3 in "


def not_finite(given: Given) -> Case:
    rows = given.embeddings[:6].tolist()
    rows[1][0], rows[5][3] = math.nan, math.inf
    return {"source": given.parquet(rows)}, "2 with NaN, infinite or empty values (row 1, row 5)"


def no_gallery(given: Given) -> Case:
    flags = {"is_query": [True] * 6, "is_gallery": [False] * 6}
    return {"source": given.parquet(**flags)}, "a query's label is not in the gallery: 6 rows"


def no_queries(given: Given) -> Case:
    flags = {"is_query": [False] * 6, "is_gallery": [True] * 6}
    return {"source": given.parquet(**flags)}, "has 0 queries and 6 gallery rows"


def no_embeddings(given: Given) -> Case:
    return {"source": given.parquet([], label=pa.array([], pa.int64()))}, "holds no embeddings"


def rank_0(given: Given) -> Case:
    metrics = {"cmc": [0]}
    return {
        "source": given.parquet(),
        "evaluation": {"metrics": metrics},
    }, "evaluation.metrics.cmc.0: should be greater"


def part_missing(given: Given) -> Case:
    source = given.store()
    given.part(2).unlink()
    return {"source": source}, "is not whole: 1 of 9 parts are missing (part-000002.parquet)"


def part_cut_short(given: Given) -> Case:
    source = given.store()
    given.part(3).write_bytes(given.part(3).read_bytes()[:-100])
    return {"source": source}, "part-000003.parquet cannot be read as Parquet"


def part_overwritten(given: Given) -> Case:
    """The footer is whole, the embeddings are not."""
    source = given.store()
    content = bytearray(given.part(3).read_bytes())
    group = pq.read_metadata(given.part(3)).row_group(0)
    start = group.column(group.num_columns - 1).dictionary_page_offset
    content[start : start + 64] = bytes(64)
    given.part(3).write_bytes(content)
    return {"source": source}, "part-000003.parquet cannot be read as Parquet"


def no_store(given: Given) -> Case:
    return {"source": {"store": str(given.folder / "nowhere")}}, "is no embeddings store: it has no manifest.json"


def no_labels(given: Given) -> Case:
    return {"source": given.parquet(label=None, path=list("abcdef"))}, "has no column label"


def embeddings_alone(given: Given) -> Case:
    return {"source": given.parquet(label=None)}, "metrics need labels: set data.table"


def npy_alone(given: Given) -> Case:
    return {"source": given.npy()}, "bad.npy holds embeddings alone; metrics need labels: set data.table"


def other_number_of_rows(given: Given) -> Case:
    return {"source": given.npy(50), "data": given.data}, "has 50 rows, but the table "


def store_of_another_table(given: Given) -> Case:
    other = given.folder / "other.csv"
    other.write_text(given.table.read_text().replace("shoes", "boots"))
    return {"source": given.store(), "data": {"table": str(other), "root": str(given.table.parent)}}, "is not the table"


def store_of_the_train_split(given: Given) -> Case:
    source = given.store(np.arange(18), "train")
    return {"source": source, "data": given.data}, "was made with data.split: train and lacks 60 validation rows"


def store_of_the_train_split_alone(given: Given) -> Case:
    return {"source": given.store(np.arange(18), "train")}, "has 0 queries and 0 gallery rows"


def rows_without_embedding(given: Given) -> Case:
    columns = {"id": np.arange(70), "embedding": given.embeddings[:70].tolist()}
    return {"source": given.written(columns), "data": given.data}, "has no embedding for 8 rows that are queries or"


def train_split(given: Given) -> Case:
    return {"source": given.npy(), "data": {**given.data, "split": "train"}}, "data.split: train rows are neither"


def gallery_case(expected: str, **gallery: Any) -> Callable[[Given], Case]:
    return lambda given: ({"source": given.parquet(), "evaluation": {"gallery": gallery}}, expected)


def actors(given: Given) -> Case:
    evaluation = {"embed": {"actors": [3, 1]}}
    return {"source": given.parquet(), "evaluation": evaluation}, "the least must not be above the most, found [3, 1]"


CASES: dict[str, Callable[[Given], Case]] = {
    "dimensions within a file": ragged,
    "dimensions of parts": parts_of_two_dimensions,
    "not finite": not_finite,
    "no gallery": no_gallery,
    "no queries": no_queries,
    "no embeddings": no_embeddings,
    "k is 0": rank_0,
    "part missing": part_missing,
    "part cut short": part_cut_short,
    "part overwritten": part_overwritten,
    "no store": no_store,
    "no labels": no_labels,
    "embeddings alone": embeddings_alone,
    "npy alone": npy_alone,
    "other number of rows": other_number_of_rows,
    "store of another table": store_of_another_table,
    "store of the train split": store_of_the_train_split,
    "store of the train split alone": store_of_the_train_split_alone,
    "rows without an embedding": rows_without_embedding,
    "train split": train_split,
    "unknown backend": gallery_case("'annoy'", backend="annoy"),
    "faiss factory": gallery_case("the factory string 'IVFx,Flat' is not one", backend="faiss", factory="IVFx,Flat"),
    "nprobe of a flat index": gallery_case("'Flat' has no nprobe", backend="faiss", factory="Flat", nprobe=4),
    "actors": actors,
}


@pytest.mark.parametrize("name", quick_and_slow(CASES))
def test_bad_input(
    name: str, table: Path, embeddings: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, expected = CASES[name](Given(tmp_path, table, embeddings.copy()))
    config.setdefault("evaluation", {}).setdefault("gallery", {})["shards"] = 1
    assert main(["evaluate", config_of(tmp_path, **config)]) == 2
    error = capfd.readouterr().err
    assert expected in error
    assert error.startswith("oml-ray: ")
    assert error.count("\n") == 1 + error.count("\n  "), "one message, whose further lines are indented"
    assert not (tmp_path / "evaluation" / "metrics.json").exists()
    assert not (tmp_path / "evaluation" / "report.html").exists()


def test_one_wrong_bit_in_a_store_is_noticed(table: Path, embeddings: np.ndarray, tmp_path: Path) -> None:
    given = Given(tmp_path, table, embeddings)
    given.store()
    content = bytearray(given.part(3).read_bytes())
    group = pq.read_metadata(given.part(3)).row_group(0)
    column = group.column(group.num_columns - 1)
    content[column.dictionary_page_offset + column.total_compressed_size // 2] ^= 1
    given.part(3).write_bytes(content)
    store = Store(pyarrow.fs.LocalFileSystem(), str(given.part(3).parent))
    with pytest.raises(EmbeddingError, match=r"part-000003\.parquet is damaged"):
        list(store.parts(store.whole(), ["id", "embedding"]))
