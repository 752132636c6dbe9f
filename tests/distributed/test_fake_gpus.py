"""Verbs with `scaling.use_gpu` on a Ray that announces four GPUs which do not exist: Ray schedules as with real ones,
tensors stay on the CPU, and the numbers are those of a run without GPUs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import ray
import yaml
from helpers import train_config

from oml_ray.cli import main
from oml_ray.config import nodes
from oml_ray.distributed.gallery import GalleryPool
from oml_ray.distributed.runtime.devices import FAKE_GPUS
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session
from oml_ray.distributed.shard import Part
from oml_ray.retrieval.user_embeddings import UserEmbeddings

pytestmark = [pytest.mark.usefixtures("four_gpus"), pytest.mark.timeout(240)]

GPUS = {"use_gpu": True}
EXTRACTOR = {"name": "timm", "model": "test_vit"}
ONE_EPOCH = {"epochs": 1, "precision": "fp64"}
METRICS = {"cmc": [1, 2], "precision": [2], "map": [2], "bootstrap": {"samples": 20}}


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    """A Ray of eight CPUs and four GPUs that do not exist, with the dashboard that early stopping of trials needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAKE_GPUS, "4")
        with session(Needs(8, 4, "tests"), dashboard=True):
            yield
    assert not ray.is_initialized()


def run(verb: str, folder: Path, config: dict[str, Any]) -> Path:
    """Run a verb to its end; return the run's folder."""
    folder.mkdir(exist_ok=True)
    config = {**config, "run": {"name": verb, "storage": str(folder), **config.get("run", {})}}
    path = folder / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main([verb, str(path)]) == 0
    return folder / config["run"]["name"]


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


def embed(table: Path, folder: Path, **keys: Any) -> Path:
    config = {
        "data": {"table": str(table), "split": "all"},
        "source": {"extractor": EXTRACTOR, "size": 32},
        "evaluation": {"embed": {"actors": 2, "rows_per_part": 11}},
        "scaling": GPUS,
    }
    return run("embed", folder, {**config, **keys})


@pytest.fixture(scope="module")
def store(small_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole table, embedded on GPUs."""
    return embed(small_table, tmp_path_factory.mktemp("store"))


def evaluate_store(store: Path, folder: Path, gallery: dict[str, Any], **evaluation: Any) -> Any:
    scaling = evaluation.pop("scaling", GPUS)
    evaluation = {"metrics": METRICS, "gallery": gallery, **evaluation}
    source = {"store": str(store)}
    return metrics(run("evaluate", folder, {"source": source, "evaluation": evaluation, "scaling": scaling}))


def test_embedding_and_evaluation_of_the_store(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = evaluate_store(store, tmp_path / "gpu", {"shards": 3})
    assert "on the CPU" not in capfd.readouterr().out
    expected = evaluate_store(store, tmp_path / "cpu", {"shards": 3}, scaling={})
    assert found["overall"] == expected["overall"]
    assert found["counts"]["queries"] == 12


@pytest.mark.parametrize(("shards", "expected"), [(3, [1, 1, 1]), (6, [2, 2, 2])])
def test_shards_spread_over_the_gpus(shards: int, expected: list[int], tmp_path: Path) -> None:
    np.save(tmp_path / "embeddings.npy", np.ones((8, 2), dtype=np.float32))
    embeddings = UserEmbeddings(pyarrow.fs.LocalFileSystem(), str(tmp_path / "embeddings.npy"))
    part = Part(embeddings, np.arange(8), np.zeros(8, np.int64), None)
    pool = GalleryPool(part, nodes.ExactGallery(shards=shards), use_gpu=True)
    try:
        gpus_of = ray.get([shard.__ray_call__.remote(lambda _: ray.get_gpu_ids()) for shard in pool.shards])
    finally:
        pool.close()
    assert sorted(Counter(gpu for (gpu,) in gpus_of).values()) == expected


@pytest.mark.slow
def test_an_index_without_a_gpu_form_stays_on_the_cpu(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    found = evaluate_store(
        store,
        tmp_path,
        {"backend": "faiss", "factory": "HNSW8", "shards": 2, "ef_search": 64},
        compare=[
            {"backend": "faiss", "factory": "IVF2,Flat", "nprobe": 2, "shards": 1},
            {"backend": "hnswlib", "shards": 1},
        ],
        rerank=[{"name": "k_reciprocal", "k1": 3, "k2": 2}],
        depth=8,
    )
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if "on the CPU" in line] == [
        "# evaluation.gallery is searched on the CPU: FAISS has no GPU form of IndexHNSWFlat",
        "# evaluation.compare.1 is searched on the CPU: hnswlib has no GPU form",
    ]
    assert lines.index(lines[0]) == 0
    assert len(found["comparisons"]) == 2


@pytest.mark.slow
def test_images_that_are_embedded_for_an_evaluation_and_for_a_search(small_table: Path, tmp_path: Path) -> None:
    config = {
        "data": {"table": str(small_table)},
        "source": {"extractor": EXTRACTOR, "size": 32},
        "evaluation": {"metrics": METRICS},
        "scaling": GPUS,
    }
    found = run("evaluate", tmp_path, config)
    assert metrics(found)["counts"]["queries"] == 12
    config = {
        "source": {"extractor": EXTRACTOR, "size": 32},
        "queries": str(small_table.parent / "images"),
        "gallery": str(found),
        "k": 3,
        "scaling": GPUS,
    }
    assert metrics(run("search", tmp_path, config))["counts"]["neighbors"] == 22 * 4 * 3


@pytest.mark.slow
def test_asynchronous_validation_beside_an_elastic_training(small_table: Path, tmp_path: Path) -> None:
    """As many workers as there is room for leave the GPU that validation embeds and searches on."""
    config = train_config(
        small_table,
        tmp_path,
        scaling={"use_gpu": True, "num_workers": [1, 4]},
        training=ONE_EPOCH,
        validation={"mode": "async"},
        evaluation={"metrics": METRICS, "gallery": {"shards": 3}},
    )
    history = (run("train", tmp_path, config) / "history.jsonl").read_text()
    rows = [json.loads(line) for line in history.splitlines()]
    assert [row["epoch"] for row in rows if row["kind"] == "validation"] == [-1, 0]


@pytest.mark.slow
def test_a_postprocessor_of_two_workers(small_table: Path, store: Path, tmp_path: Path) -> None:
    config = train_config(small_table, tmp_path, scaling=GPUS, evaluation={"metrics": METRICS, "depth": 6})
    config["training"] = ONE_EPOCH
    del config["extractor"]
    config |= {
        "data": {"table": str(small_table), "store": str(store)},
        "model": {"name": "concat_siamese", "extractor": EXTRACTOR, "mlp_hidden_dims": [8], "top_n": 3},
        "criterion": {"name": "pairs_bce"},
        "sampler": {"name": "hard_pairs", "n_pairs": 10, "n_positives": 2, "n_negatives": 4, "depth": 12},
    }
    stages = metrics(run("train", tmp_path, config))["reranking"]
    assert [stage["name"].split()[0] for stage in stages] == ["search", "pairwise"]


@pytest.mark.slow
def test_a_sweep(small_table: Path, tmp_path: Path) -> None:
    """Two trials side by side, each with a GPU for its worker; the best is evaluated on GPUs."""
    base = train_config(small_table, tmp_path, training=ONE_EPOCH, validation={"at_start": False})
    base["scaling"] = {"use_gpu": True, "num_workers": 1}
    config = {"base": base, "space": {"criterion.margin": {"grid": [0.1, 0.2]}}, "tune": {"num_samples": 1}}
    found = json.loads((run("sweep", tmp_path, config) / "results.json").read_text())
    assert found["counts"] == {"finished": 2, "stopped": 0, "failed": 0}
