"""Queries without ground truth, against a naive search of all pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.cli import main
from oml_ray.data.ground_truth import check_ground_truth, without_ground_truth
from oml_ray.data.table import read_table
from oml_ray.errors import TableError

HEADER = "label,path,split,is_query,is_gallery,sequence"
Row = tuple[int, bool, bool, int]


def naive(rows: list[Row]) -> list[int]:
    lost = []
    for query, (label, is_query, _, sequence) in enumerate(rows):
        relevant = [
            other
            for other, (other_label, _, is_gallery, other_sequence) in enumerate(rows)
            if is_gallery and other_label == label and other != query
            if sequence < 0 or other_sequence != sequence
        ]
        lost += [query] if is_query and not relevant else []
    return lost


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), st.integers(-1, 2)), min_size=1))
def test_against_all_pairs(rows: list[Row]) -> None:
    labels, is_query, is_gallery, sequences = map(np.array, zip(*rows, strict=True))
    assert without_ground_truth(labels * 10**15, is_query, is_gallery, sequences).tolist() == naive(rows)


@pytest.mark.parametrize(
    "rows", [["1,a,validation,1,1,", "2,b,validation,0,1,"], ["1,a,validation,1,0,s", "1,b,validation,0,1,s"]]
)
def test_a_table_without_any_ground_truth_is_refused_for_evaluation(rows: list[str], tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text("\n".join([HEADER, *rows]))
    table = read_table(tmp_path / "df.csv")  # to embed it needs no ground truth
    assert any("1 of 1 queries have no ground truth" in warning for warning in table.warnings)
    with pytest.raises(TableError, match="none of the 1 queries has a ground truth"):
        check_ground_truth(table)


def test_a_query_with_ground_truth_is_enough(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(
        "\n".join([HEADER, "1,a,validation,1,1,", "2,b,validation,1,1,", "2,c,validation,0,1,"])
    )
    table = read_table(tmp_path / "df.csv")
    check_ground_truth(table)
    assert table.warnings[-1].startswith("1 of 2 queries have no ground truth")
    assert table.warnings[-1].endswith(": 0")


def test_a_dry_run_finds_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / name).touch()
    (tmp_path / "df.csv").write_text("\n".join([HEADER, "1,a,validation,1,1,", "2,b,validation,0,1,"]))
    config = {
        "run": {"name": "e", "storage": str(tmp_path)},
        "data": {"table": str(tmp_path / "df.csv")},
        "source": {"extractor": {"name": "timm", "model": "test_vit"}, "size": 32},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(tmp_path / "c.yaml"), "--dry-run"]) == 2
    assert "none of the 1 queries has a ground truth" in capfd.readouterr().err
