"""Models of pairs through Ray: trained on a store, applied by `evaluation.rerank`, at two world sizes and as killed."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.fs
import pytest
import yaml
from helpers import train_config
from safetensors.torch import load_file

from oml_ray.cli import main
from oml_ray.retrieval.neighbors_file import read_neighbors

pytestmark = pytest.mark.usefixtures("ray_session")

EXTRACTOR = {"name": "timm", "model": "test_resnet", "embedding_dim": 16}
EVALUATION: dict[str, Any] = {
    "metrics": {"cmc": [1, 2], "precision": [2], "map": [2], "map_r": True, "bootstrap": {"samples": 50}},
    "depth": 6,
    "neighbors": True,
    "gallery": {"shards": 1},
}


def write(config: dict[str, Any], folder: Path) -> str:
    path = folder / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def embed(table: Path, storage: Path) -> Path:
    config = {
        "run": {"name": "embedded", "storage": str(storage)},
        "data": {"table": str(table), "split": "all"},
        "source": {"extractor": EXTRACTOR, "size": 32},
    }
    assert main(["embed", write(config, storage)]) == 0
    return storage / "embedded"


@pytest.fixture(scope="module")
def store(small_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole small table, by an extractor that has learned nothing."""
    return embed(small_table, tmp_path_factory.mktemp("store"))


def pair_config(table: Path, store: Path, storage: Path, **nodes: Any) -> dict[str, Any]:
    """A training of pairs without batch statistics, in float64."""
    config = train_config(table, storage)
    del config["extractor"]
    return {
        **config,
        "data": {"table": str(table), "store": str(store)},
        "model": {
            "name": "concat_siamese",
            "extractor": {"name": "timm", "model": "test_vit"},
            "mlp_hidden_dims": [8],
            "top_n": 3,
        },
        "criterion": {"name": "pairs_bce"},
        "sampler": {"name": "hard_pairs", "n_pairs": 10, "n_positives": 2, "n_negatives": 4, "depth": 12},
        "evaluation": EVALUATION,
        **nodes,
    }


@pytest.fixture(scope="module")
def trained(small_table: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", write(pair_config(small_table, store, folder, scaling={"num_workers": 2}), folder)]) == 0
    return folder / "run"


def weights(run: Path) -> dict[str, Any]:
    name = (run / "checkpoints" / "last").read_text()
    return load_file(run / "checkpoints" / name / "extractor.safetensors")


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row for row in history if row["kind"] == kind]


def metrics(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text()))


def neighbors(run: Path) -> tuple[list[Any], ...]:
    queries, found = read_neighbors(pyarrow.fs.LocalFileSystem(), str(run / "neighbors.parquet"))
    order = np.argsort(queries)
    return queries[order].tolist(), found.ids[order].tolist(), found.distances[order].tolist()


def evaluate(
    folder: Path, source: Path, rerank: list[dict[str, Any]], table: Path | None = None, **evaluation: Any
) -> tuple[int, Path]:
    config = {
        "run": {"name": "evaluation", "storage": str(folder)},
        "source": {"store": str(source)},
        "evaluation": {**EVALUATION, "rerank": rerank, **evaluation},
        **({} if table is None else {"data": {"table": str(table)}}),
    }
    return main(["evaluate", write(config, folder)]), folder / "evaluation"


@pytest.mark.slow
def test_one_and_two_workers_train_the_same_model(
    trained: Path, small_table: Path, store: Path, tmp_path: Path
) -> None:
    config = pair_config(small_table, store, tmp_path, scaling={"num_workers": 1})
    assert main(["train", write(config, tmp_path)]) == 0
    one, other = weights(tmp_path / "run"), weights(trained)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-10
    validations = [
        [{key: value for key, value in row.items() if "." in key} for row in rows(run, "validation")]
        for run in (trained, tmp_path / "run")
    ]
    assert validations[0] == validations[1]
    assert len(validations[0]) == 3
    assert [row["loss"] for row in rows(trained, "train")] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "run", "train")], abs=1e-12
    )


@pytest.mark.slow
def test_the_final_evaluation_shows_before_and_after(trained: Path, store: Path, small_table: Path) -> None:
    document = metrics(trained)
    assert [stage["name"].split()[0] for stage in document["reranking"]] == ["search", "pairwise"]
    best = (trained / "checkpoints" / "best").read_text()
    row = next(row for row in rows(trained, "validation") if f"step_{row['step']:08d}" == best)
    for name in ("cmc.1", "cmc.2", "precision.2", "map.2"):
        family, k = name.split(".")
        assert document["overall"][family][k]["value"] == pytest.approx(row[name], abs=1e-9)
    assert "Re-ranking" in (trained / "report.html").read_text()


@pytest.mark.slow
def test_a_checkpoint_reranks_a_store_as_its_training_did(
    trained: Path, store: Path, small_table: Path, tmp_path: Path
) -> None:
    node = {"name": "pairwise", "checkpoint": str(trained / "checkpoints" / "best")}
    code, run = evaluate(tmp_path, store, [node], small_table, embed={"rows_per_part": 10, "batch_size": 4})
    assert code == 0
    assert neighbors(run)[:2] == neighbors(trained)[:2]
    np.testing.assert_allclose(neighbors(run)[2], neighbors(trained)[2], atol=1e-6)
    assert metrics(run)["overall"] == metrics(trained)["overall"]
    (tmp_path / "plain").mkdir()
    _, plain = evaluate(tmp_path / "plain", store, [], small_table)
    _, plain_ids, plain_distances = neighbors(plain)
    found = neighbors(run)
    for query, before in enumerate(plain_ids):
        assert sorted(found[1][query][:3]) == sorted(before[:3])  # as model.top_n says
        assert found[1][query][3 : len(before)] == before[3:]
        assert found[2][query][3 : len(before)] == plain_distances[query][3:]
    assert found[1] != [before[: len(row)] for before, row in zip(plain_ids, found[1], strict=True)]  # it has an effect


def test_the_trivial_reranker_changes_nothing(store: Path, tmp_path: Path) -> None:
    found = []
    for name, rerank in (("plain", []), ("judged", [{"name": "trivial_distance", "top_n": 4}])):
        (tmp_path / name).mkdir()
        code, run = evaluate(tmp_path / name, store, rerank, metrics={**EVALUATION["metrics"], "cmc": [1, 6]})
        assert code == 0
        found.append((neighbors(run), metrics(run)["overall"]))
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_budget_is_spent_on_the_uncertain(trained: Path, store: Path, small_table: Path, tmp_path: Path) -> None:
    node = {"name": "pairwise", "checkpoint": str(trained / "checkpoints" / "best"), "top_n": 2, "budget": 0.25}
    lists = []
    for name, rerank in (("plain", []), ("judged", [node])):
        (tmp_path / name).mkdir()
        code, run = evaluate(tmp_path / name, store, rerank, small_table)
        assert code == 0
        lists.append(neighbors(run))
    gaps = [row[1] - row[0] for row in lists[0][2]]
    chosen = np.argsort(gaps, kind="stable")[:3]  # a quarter of 12
    for query in range(12):
        if query not in chosen:
            assert lists[1][1][query][:4] == lists[0][1][query][:4]
            assert lists[1][2][query][:4] == lists[0][2][query][:4]
    assert any(lists[1][2][query][0] != lists[0][2][query][0] for query in chosen)


@pytest.mark.slow
def test_a_linear_model_needs_no_images(small_table: Path, store: Path, tmp_path: Path) -> None:
    model = {"name": "linear_siamese", "top_n": 4}
    config = pair_config(small_table, store, tmp_path, model=model, scaling={"num_workers": 1})
    assert main(["train", write(config, tmp_path)]) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0]
    node = {"name": "pairwise", "checkpoint": str(tmp_path / "run" / "checkpoints" / "best")}
    (tmp_path / "evaluated").mkdir()
    code, run = evaluate(tmp_path / "evaluated", store, [node])  # by the store alone
    assert code == 0
    assert neighbors(run)[:2] == neighbors(tmp_path / "run")[:2]


@pytest.mark.slow
def test_images_are_needed_and_broken_ones_are_named_with_their_pair(
    trained: Path, small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(small_table.parent, own)
    table = own / small_table.name
    store = embed(table, tmp_path)
    node = {"name": "pairwise", "checkpoint": str(trained / "checkpoints" / "best")}
    code, _ = evaluate(tmp_path, store, [node])
    assert code == 2
    assert "set data.table" in capsys.readouterr().err
    images = sorted((own / "images").glob("1[6-9]_*.png"))
    for image in images:  # queries and gallery of validation
        image.write_bytes(b"no image")
    config = {
        "run": {"name": "broken", "storage": str(tmp_path)},
        "data": {"table": str(table), "on_bad_image": "skip"},
        "source": {"store": str(store)},
        "evaluation": {**EVALUATION, "rerank": [node]},
    }
    assert main(["evaluate", write(config, tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "The pair of row" in captured.err
    assert "not a readable image" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.slow
def test_an_actor_that_dies_changes_nothing(trained: Path, store: Path, small_table: Path, tmp_path: Path) -> None:
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        while not over.is_set() and not killed:
            for process in psutil.process_iter(["cmdline"]):
                if any("_Judging" in part and "ray::" in part for part in process.info["cmdline"] or []):
                    process.kill()
                    killed.append(process.pid)
                    break

    thread = threading.Thread(target=kill_one)
    thread.start()
    node = {"name": "pairwise", "checkpoint": str(trained / "checkpoints" / "best")}
    try:
        code, run = evaluate(tmp_path, store, [node], small_table, embed={"rows_per_part": 2, "batch_size": 2})
    finally:
        over.set()
        thread.join()
    assert code == 0
    assert killed
    assert neighbors(run)[:2] == neighbors(trained)[:2]


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ({"criterion": {"name": "triplet"}}, "criterion: a model of pairs needs name: pairs_bce"),
        ({"sampler": {"name": "balance", "n_labels": 4, "n_instances": 2}}, "sampler: a model of pairs needs"),
        ({"data": {"table": "figures"}}, "data.store: a model of pairs needs"),
        ({"model": None, "extractor": EXTRACTOR}, "criterion: pairs_bce is for models that judge pairs"),
        ({"extractor": EXTRACTOR}, "extractor and model exclude each other"),
        ({"scaling": {"num_workers": 11}}, "10 pairs"),
        ({"validation": {"mode": "async"}}, "validated inline"),
        ({"sampler": {"name": "hard_pairs", "n_pairs": 7}}, "sampler.n_pairs"),
        ({"data": {"table": "figures", "store": "/nowhere"}}, "/nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(
    nodes: dict[str, Any], told: str, small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pair_config(small_table, tmp_path / "none", tmp_path, **nodes)
    assert main(["train", write(config, tmp_path)]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.slow
def test_checkpoints_of_the_other_kind_are_refused(
    trained: Path, store: Path, small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "run": {"name": "other", "storage": str(tmp_path)},
        "data": {"table": str(small_table)},
        "source": {"checkpoint": str(trained / "checkpoints" / "best")},
    }
    assert main(["evaluate", write(config, tmp_path)]) == 2
    assert "judges pairs" in capsys.readouterr().err
