"""`oml-ray check` with images and embeddings: planted faults are told and shown, a clean table has none; no Ray."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml
from helpers import HEADER, write_images
from numpy.typing import NDArray
from PIL import Image

from oml_ray.cli import main
from oml_ray.data.filesystem import resolve
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table, read_table
from oml_ray.distributed import doctor_findings
from oml_ray.distributed.embed import columns_of
from oml_ray.retrieval.store import MANIFEST, Manifest, Store

Check = Callable[..., tuple[int, list[str], str]]
Floats = NDArray[np.float32]


@pytest.fixture
def check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Check:
    """Run the verb on a table; return the exit status, the lines of stdout, and stderr."""

    def run(table: Path, *arguments: str) -> tuple[int, list[str], str]:
        config = {
            "run": {"name": "run", "storage": str(tmp_path / "runs")},
            "data": {"table": str(table), "max_pixels": 100_000},
            "source": {"checkpoint": str(tmp_path / "none")},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        capfd.readouterr()
        status = main(["check", str(tmp_path / "config.yaml"), *arguments])
        assert not ray.is_initialized()
        out, error = capfd.readouterr()
        return status, out.splitlines(), error

    return run


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Labels 0 to 5 of 4 instances each, 4 and 5 for validation."""
    return write_images(tmp_path / "clean", labels=6, instances=4, validation=2, size=64)


@pytest.fixture
def faulty(clean: Path) -> Path:
    """The clean table with a fault of every kind, in rows 24 to 32."""
    images = clean.parent / "images"
    own, smooth = (
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((90, 90), 3)
        for seed in (4, 5)
    )
    own.save(images / "own.png")
    own.save(images / "copy.bmp")
    smooth.save(images / "smooth.png")
    smooth.resize((60, 60)).save(images / "small.jpg", quality=60)
    (images / "cut.png").write_bytes((images / "1_1.png").read_bytes()[:2000])
    Image.new("1", (5000, 5000)).save(images / "bomb.png")
    Image.new("RGB", (64, 64), "white").save(images / "white.png")
    rows = [f"{row},,,," for row in clean.read_text().splitlines()]
    rows[0] = f"{HEADER},x_1,y_1,x_2,y_2"
    rows += [
        *("1,images/own.png,train,,,,,,", "3,images/copy.bmp,train,,,,,,", "1,images/smooth.png,train,,,,,,"),
        *("5,images/small.jpg,validation,0,1,,,,", "1,images/cut.png,train,,,,,,", "1,images/bomb.png,train,,,,,,"),
        *("1,images/white.png,train,,,,,,", "1,images/1_0.png,train,,,0,0,65,64", "1,images/1_0.png,train,,,3,3,5,5"),
    ]
    clean.write_text("\n".join(rows) + "\n")
    return clean


def write_store(
    folder: Path, table: Table, embeddings: Floats, ids: Ids, split: str = "all", made_from: str = ""
) -> str:
    """A store of some rows of a table, in two parts."""
    manifest = Manifest(
        num_rows=len(ids),
        rows_per_part=(len(ids) + 1) // 2,
        embedding_dim=embeddings.shape[1],
        weights="w",
        transform={},
        table=made_from or table.fingerprint,
        split=split,
    )
    store = Store(*resolve(str(folder)))
    store.begin(manifest)
    for part in range(manifest.num_parts):
        some = ids[part * manifest.rows_per_part :][: manifest.rows_per_part]
        store.write_part(part, columns_of(table, some), embeddings[some], {})
    return str(folder)


def clustered(labels: Sequence[int]) -> Floats:
    noise = np.random.default_rng(0).normal(0, 0.1, (len(labels), 16))
    return (np.eye(16)[np.asarray(labels)] + noise).astype(np.float32)


def warnings_of(lines: list[str]) -> list[str]:
    return [line.removeprefix("  warning: ") for line in lines if line.startswith("  warning: ")]


def test_planted_faults_of_images_are_told_and_shown(faulty: Path, check: Check, tmp_path: Path) -> None:
    page = tmp_path / "new" / "doctor.html"
    status, lines, error = check(faulty, "--images", "--page", str(page))
    assert (status, error) == (0, "")
    assert f"{faulty}: 33 instances" in lines
    assert "images: 30 of 33 are readable" in lines
    told = warnings_of(lines)
    for expected in (
        "3 images cannot be read: rows 28, 29, 31",
        "2 rows have a picture that is also under another label: rows 24, 25",
        "2 rows have a near copy (at most 4 of 64 bits) in the other split: rows 26, 27",
        "2 rows have a near copy (at most 4 of 64 bits) under another label: rows 26, 27",
        "1 images or boxes have a side of less than 32 pixels: rows 32",
        "1 boxes leave their image: rows 31",
        "1 boxes cover less than 1% of their image: rows 32",
    ):
        assert expected in told
    assert [line for line in told if "of one brightness" in line] == [
        "1 images are of one brightness, and not looked for near copies: rows 30"
    ]
    assert not [line for line in told if "also in the other split" in line]
    assert lines[-1] == f"page: {page}"
    text = page.read_text()
    assert "row 25, label 3, train" in text
    assert "images/small.jpg" in text
    assert "25000000 pixels" not in text
    assert "5000 x 5000 pixels are more than data.max_pixels (100000) allows" in text
    assert "--store looks for wrong labels" in text
    assert len(re.findall("<img", text)) == 2 + 2 + 2 + 1 + 1 + 1  # three pairs; blank, tiny, small box
    assert [path.name for path in page.parent.iterdir()] == ["doctor.html"]


def test_labels_are_shown_with_their_names(clean: Path, check: Check, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(clean.parent / "images" / "0_0.png")
    header, *rows = clean.read_text().splitlines()
    named = [f"{header},label_name", *(f"{row},bird {row.partition(',')[0]}" for row in rows)]
    clean.write_text("\n".join(named) + "\n")
    status, _, error = check(clean, "--images", "--page", str(tmp_path / "page.html"))
    assert (status, error) == (0, "")
    assert "row 0, label 0 (bird 0), train" in (tmp_path / "page.html").read_text()


def test_a_clean_table_has_no_findings(clean: Path, check: Check, tmp_path: Path) -> None:
    table = read_table(clean)
    store = write_store(tmp_path / "store", table, clustered(table.labels), np.arange(len(table)))
    status, lines, error = check(clean, "--images", "--store", store, "--page", str(tmp_path / "p.html"))
    assert (status, error) == (0, "")
    assert warnings_of(lines) == []
    assert f"embeddings: 24 rows of {store}" in lines
    text = (tmp_path / "p.html").read_text()
    assert "<img" not in text
    counts = re.findall(r'<td class="number( main)?">([0-9,]+)</td></tr>', text.partition("</table>")[0])
    assert counts == [("", "0")] * 12


def test_planted_faults_of_embeddings_are_told_and_shown(clean: Path, check: Check, tmp_path: Path) -> None:
    rows = clean.read_text().splitlines()
    rows[1 + 5] = rows[1 + 5].replace("1,", "2,", 1)  # row 5 is of label 1
    clean.write_text("\n".join(rows) + "\n")
    table = read_table(clean)
    embeddings = clustered(np.repeat(np.arange(6), 4))
    embeddings[17] = 2 * embeddings[3]  # of validation; in the same direction as one of train
    store = write_store(tmp_path / "run" / "embeddings", table, embeddings, np.arange(24))
    status, lines, error = check(clean, "--store", str(tmp_path / "run"), "--page", str(tmp_path / "p.html"))
    assert (status, error) == (0, "")
    assert warnings_of(lines) == [
        "1 validation rows have a near copy (cosine distance at most 0.05) in train: rows 17",
        "2 rows have 3 nearest neighbors of one other label: rows 5, 17",
    ]
    assert f"embeddings: 24 rows of {store}" in lines
    text = (tmp_path / "p.html").read_text()
    assert len(re.findall("<img", text)) == 2 + 2 * 4
    assert "row 5, label 2, train" in text
    assert "--images looks for" in text


def test_a_store_of_one_split_says_what_it_cannot_tell(clean: Path, check: Check, tmp_path: Path) -> None:
    table = read_table(clean)
    store = write_store(tmp_path / "store", table, clustered(table.labels), table.validation_ids, "validation")
    status, lines, _ = check(clean, "--store", store)
    assert status == 0
    assert lines[-1] == f"  {doctor_findings.ONE_SPLIT}"


def test_a_page_shows_a_bounded_number_of_pictures(
    clean: Path, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_findings, "GROUPS_SHOWN", 2)
    for path in (clean.parent / "images").iterdir():
        Image.open(path).resize((20, 20)).save(path)
    assert check(clean, "--images", "--page", str(tmp_path / "p.html"))[0] == 0
    text = (tmp_path / "p.html").read_text()
    assert len(re.findall("<img", text)) == 2
    assert "The first 2 of 24 are shown." in text


def test_mistakes_are_one_message(clean: Path, check: Check, tmp_path: Path) -> None:
    table, page = read_table(clean), str(tmp_path / "p.html")
    whole = np.arange(len(table))
    other = write_store(tmp_path / "other", table, clustered(table.labels), whole, made_from="0" * 64)
    forged = write_store(tmp_path / "forged", table, clustered(table.labels), whole)
    broken = write_store(tmp_path / "broken", table, clustered(table.labels), whole)
    (tmp_path / "broken" / "part-000001.parquet").unlink()
    # A part that says it has rows which the table does not have.
    Store(*resolve(forged)).write_part(
        1, {**columns_of(table, whole[:12]), "id": whole[:12] + 100}, clustered(table.labels)[:12], {}
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, expected in (
        (["--page", page], "--page: there are no pictures to show without --images or --store"),
        (["--images", "--page", str(tmp_path / "folder")], "is a folder: name a file in it"),
        (["--images", "--page", "s3://bucket/p.html"], "the page is written to a local path"),
        (["--images", "--page", str(tmp_path / "file" / "p.html")], "cannot be written"),
        (["--store", str(tmp_path / "nowhere")], f"is no embeddings store: it has no {MANIFEST}"),
        (["--store", broken], "is not whole: 1 of 2 parts are missing"),
        (["--store", other], f"--store: {other} was not made from the table {clean} as it is now"),
        (["--store", forged], f"--store: {forged} holds row 111, but the table {clean} has 24 rows"),
    ):
        status, _, error = check(clean, *arguments)
        assert status == 2
        assert expected in error
        assert error.startswith("oml-ray: ")
        assert error.count("\n") == 1
    assert not Path(page).exists()


def test_without_the_flags_nothing_is_decoded(faulty: Path, check: Check) -> None:
    status, lines, _ = check(faulty)
    assert status == 0
    assert not [line for line in lines if "images:" in line or "copy" in line]
