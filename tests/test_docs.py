"""The pages beside the README: what they name is there, and what they tell to write works."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from oml_ray.config import EvaluateConfig, SearchConfig, TrainConfig
from oml_ray.data import converters
from oml_ray.data.plan import Plan
from oml_ray.data.table import read_table
from oml_ray.learning.bank import Bank, BankedCriterion
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.retrieval import exact
from oml_ray.retrieval.index import GalleryIndex
from oml_ray.retrieval.rows import Rows

PACKAGE = Path(__file__).parents[1] / "oml_ray"
MAP, FROM_OML = ((PACKAGE / name).read_text() for name in ("README.md", "COMING_FROM_OML.md"))
SCHEMAS = json.dumps([schema.model_json_schema() for schema in (TrainConfig, EvaluateConfig, SearchConfig)])


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """What the map's recipes define."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", MAP, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 0, 1, 2, 0])


def test_files_of_the_map_are_there() -> None:
    files = re.findall(r"`((?:config|data|learning|retrieval|training|build|distributed)/[\w/.]+)`", MAP)
    assert len(files) > 20
    for file in files:
        assert (PACKAGE / file).exists(), file


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(oml_ray\.[\w.]+)`", FROM_OML))))
def test_our_names_are_there(name: str) -> None:
    module, _, last = name.rpartition(".")
    if not hasattr(importlib.import_module(module), last):
        importlib.import_module(name)


def test_names_of_configs_are_there() -> None:
    names = re.findall(r"name: (\w+)", FROM_OML)
    assert len(names) > 20
    for name in names:
        assert f'"const": "{name}"' in SCHEMAS, name


def test_a_loss(written: dict[str, Any], batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    embeddings, labels = batch
    pairs = {True: [], False: []}  # type: dict[bool, list[float]]
    for i in range(6):
        for j in range(6):
            if i != j:
                pairs[bool(labels[i] == labels[j])].append(float((embeddings[i] - embeddings[j]).norm()))
    criterion = BankedCriterion(written["SpreadLoss"](), Bank(2))
    loss, logs = criterion(embeddings, labels)
    assert loss.item() == pytest.approx(np.mean(pairs[True]) - np.mean(pairs[False]), abs=1e-6)
    assert logs["positive"].item() == pytest.approx(np.mean(pairs[True]), abs=1e-6)


def test_a_miner(written: dict[str, Any], batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    embeddings, labels = batch
    losses = []
    for anchor, label in enumerate(labels.tolist()):
        same = [i for i, other in enumerate(labels.tolist()) if other == label and i != anchor]
        others = [i for i, other in enumerate(labels.tolist()) if other != label]
        if same:
            near, far = ((embeddings[anchor] - embeddings[i]).norm() for i in (same[0], others[0]))
            losses.append(max(0.0, float(near - far) + 0.2))
    loss, _ = TripletLoss(written["FirstTriplets"](), margin=0.2)(embeddings, labels)
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-6)


def test_a_sampler(written: dict[str, Any]) -> None:
    ids, labels = np.arange(10, 22), np.arange(12) // 3
    epoch = Plan(written["PairSampler"](ids, labels), seed=0).epoch(0)
    assert epoch.shape == (4, 2)
    found = [set(labels[batch - 10].tolist()) for batch in epoch]
    assert sorted(found, key=min) == [{0}, {1}, {2}, {3}]


def test_a_backend(written: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    gallery = Rows(np.arange(50), generator.normal(size=(50, 8)).astype(np.float32))
    queries = Rows(100 + np.arange(5), generator.normal(size=(5, 8)).astype(np.float32), name="queries")
    index, expected = GalleryIndex.build(written["BruteForce"](), gallery), exact.search(queries, gallery, 4)
    found = index.search(queries, 4)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert index.num_bytes() == 50 * 8 * 4


def test_a_converter(written: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{label} {label}_{shot}.png" for label in (1, 2, 3, 4) for shot in range(2)]
    for line in lines:
        Image.new("RGB", (8, 8)).save(tmp_path / line.split()[1])
    (tmp_path / "list.txt").write_text("\n".join(lines))
    monkeypatch.setitem(converters.CONVERTERS, "listed", written["convert_listed"])
    converters.convert("listed", tmp_path, tmp_path / "df.csv")
    table = read_table(str(tmp_path / "df.csv"))
    assert (table.labels.tolist(), table.train_ids.tolist()) == ([1, 1, 2, 2, 3, 3, 4, 4], [0, 1, 2, 3])
