"""Inline validation on one rank against a naive loop; over several ranks it is compared by test_world_size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oml_ray.data.images import Batch
from oml_ray.data.table import Table, read_table
from oml_ray.errors import EmbeddingError
from oml_ray.learning.extractors import Extractor
from oml_ray.training.context import LocalContext
from oml_ray.training.validation import Validator


class Rows:
    """A stream whose images are 1 x 1 pixels of the row's number; some rows are bad."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def evaluation(self, ids: np.ndarray, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(ids), batch_size):
            rows = np.array([row for row in ids[start : start + batch_size] if row not in self.bad], dtype=np.int64)
            images = np.repeat(rows[:, None, None, None], 3, axis=1).astype(np.uint8)
            yield Batch(rows, images, np.empty(0, np.int64), [])


class Lookup(nn.Module):
    """A backbone that looks the row's embedding up."""

    def __init__(self, embeddings: np.ndarray) -> None:
        super().__init__()
        self.table = torch.from_numpy(embeddings)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.table[(pixels[:, 0, 0, 0] * 255).round().long()]


def naive(table: Table, embeddings: np.ndarray, bad: set[int], k: int) -> tuple[float, float]:
    hits, averages = [], []
    for query in table.query_ids.tolist():
        if query in bad:
            continue
        gallery = [
            row
            for row in table.gallery_ids.tolist()
            if row not in bad
            and row != query
            and not (table.sequences[row] == table.sequences[query] and table.sequences[row] >= 0)
        ]
        relevant = [row for row in gallery if table.labels[row] == table.labels[query]]
        if not relevant:
            continue
        near = sorted(gallery, key=lambda row: (np.float32(math.dist(embeddings[row], embeddings[query])), row))[:k]
        found = [table.labels[row] == table.labels[query] for row in near]
        hits.append(any(found))
        precisions = [sum(found[: i + 1]) / (i + 1) for i, hit in enumerate(found) if hit]
        averages.append(sum(precisions) / len(precisions) if precisions else 0.0)
    return float(np.mean(hits)), float(np.mean(averages))


@pytest.mark.parametrize("bad", [set(), {3, 17, 18}])
@pytest.mark.parametrize("block_rows", [3, 100])
def test_scores_equal_a_naive_loop(tmp_path: Path, bad: set[int], block_rows: int) -> None:
    generator = np.random.default_rng(0)
    rows = ["label,path,split,is_query,is_gallery,sequence"]
    for _ in range(60):
        query, gallery = generator.choice([(1, 0), (0, 1), (1, 1)])
        rows.append(f"{generator.integers(6)},a.png,validation,{query},{gallery},{generator.integers(25)}")
    (tmp_path / "df.csv").write_text("\n".join(rows) + "\n")
    table = read_table(str(tmp_path / "df.csv"))
    embeddings = generator.integers(0, 3, (60, 3)).astype(np.float32)  # many ties
    extractor = Extractor(
        Lookup(embeddings), nn.Identity(), embedding_dim=3, mean=[0.0] * 3, std=[1.0] * 3, normalize=False
    )
    validator = Validator(table, {"cmc": [4], "map": [4]}, "euclidean", batch_size=7, block_rows=block_rows)
    scores = validator(extractor, LocalContext(Rows(bad)))  # type: ignore[arg-type]
    expected = naive(table, embeddings, bad, 4)
    assert (scores["cmc.4"], scores["map.4"]) == pytest.approx(expected, abs=1e-12)
    readable = embeddings[[row for row in range(60) if row not in bad]].astype(np.float64)
    deviations = ((readable - readable.mean(axis=0)) ** 2).sum(axis=1)
    assert scores["spread"] == pytest.approx(deviations.mean() / (readable**2).sum(axis=1).mean(), abs=1e-12)


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(
        "label,path,split,is_query,is_gallery\n1,a.png,validation,1,0\n1,a.png,validation,0,1\n2,a.png,validation,0,1\n"
    )
    table = read_table(str(tmp_path / "df.csv"))
    extractor = Extractor(
        Lookup(np.zeros((3, 2), np.float32)),
        nn.Identity(),
        embedding_dim=2,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        normalize=False,
    )
    validator = Validator(table, {"cmc": [1]}, "euclidean", batch_size=7, block_rows=4)
    with pytest.raises(EmbeddingError, match="No validation query is left"):
        validator(extractor, LocalContext(Rows({1})))  # type: ignore[arg-type]
