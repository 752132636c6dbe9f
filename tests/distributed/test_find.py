"""Search of images in a store, through the command line: against a naive search with the bare extractor; bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import write_images
from PIL import Image

from oml_ray import build
from oml_ray.cli import main
from oml_ray.config import SearchConfig, dump, load, nodes
from oml_ray.distributed import find
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.neighbors_file import read_neighbors

pytestmark = pytest.mark.usefixtures("ray_session")

SOURCE = {"extractor": {"name": "timm", "model": "test_vit"}, "size": 32}
EVIL = "<script>alert(1)<\"'&.png"
BROKEN = 5  # row of the gallery without a readable image: ids of the store are no positions in it
CONFIGS = Path(__file__).parents[2] / "configs" / "search"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 23 images, embedded as run `gallery`, and a folder of four queries among other files."""
    root = tmp_path_factory.mktemp("search")
    table = write_images(root / "data", labels=6, instances=4, validation=2)
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},label_name", *(f"{row},bird <{row[0]}>" for row in rows)]))
    images = sorted((root / "data" / "images").iterdir())
    (root / "queries" / "b").mkdir(parents=True)
    (root / "queries" / ".git").mkdir()
    # The first query is the gallery's row 0, and has its id: it must be found all the same.
    for query, row in (("0.png", 0), (EVIL, 9), ("b/c.png", 7), (".hidden.png", 1), (".git/x.png", 1)):
        shutil.copy(images[row], root / "queries" / query)
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / "queries" / "b" / "Upper.JPG")
    (root / "queries" / "notes.txt").write_text("no image")
    images[BROKEN].write_text("no image either")
    write(root, "gallery", {"data": {"table": str(table), "split": "all", "on_bad_image": "skip"}})
    assert main(["embed", str(root / "gallery.yaml")]) == 0
    return root


QUERIES = ["0.png", EVIL, "b/Upper.JPG", "b/c.png"]


def write(folder: Path, name: str, keys: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    common = {"run": {"name": name, "storage": str(folder)}, "source": SOURCE}
    path.write_text(yaml.safe_dump({**common, "evaluation": {"embed": {"rows_per_part": 3}}, **keys}))
    return path


def search(folder: Path, name: str, **keys: Any) -> int:
    keys = {"queries": str(folder / "queries"), "gallery": str(folder / "gallery"), **keys}
    return main(["search", str(write(folder, name, keys))])


@pytest.fixture(scope="module")
def searched(folder: Path) -> Path:
    """A run that has searched for three neighbors of each query, exactly."""
    assert search(folder, "searched", k=3, gallery_root=str(folder / "data")) == 0
    return folder / "searched"


def embedded(paths: list[Path]) -> np.ndarray:
    """Embeddings of pictures of the right size by the bare extractor."""
    torch.manual_seed(42)
    extractor = build.extractor(nodes.TimmExtractor(**SOURCE["extractor"]), 32).eval()  # type: ignore[arg-type]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths])
    with torch.no_grad():
        return extractor(torch.from_numpy(pixels)).double().numpy()


def check_nearest(folder: Path, queries: list[Path], found: Neighbors, k: int) -> None:
    """Check neighbors against all distances to all gallery images that can be read."""
    images = sorted((folder / "data" / "images").iterdir())
    ids = np.array([row for row in range(len(images)) if row != BROKEN])
    gallery = embedded([images[row] for row in ids])
    distances = np.linalg.norm(embedded(queries)[:, None] - gallery[None], axis=2)  # (queries, gallery)
    assert found.counts.tolist() == [k] * len(queries)
    assert set(found.ids.ravel().tolist()) <= set(ids.tolist())
    assert all(len(set(row)) == k for row in found.ids.tolist())
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :k], atol=1e-5)
    of_found = np.take_along_axis(distances, np.searchsorted(ids, found.ids), axis=1)
    np.testing.assert_allclose(found.distances, of_found, atol=1e-5)


def read(run: Path) -> tuple[list[int], Neighbors]:
    ids, found = read_neighbors(pyarrow.fs.LocalFileSystem(), str(run / "neighbors.parquet"))
    return ids.tolist(), found


def test_a_folder_is_searched_as_naively(folder: Path, searched: Path) -> None:
    ids, found = read(searched)
    assert ids == [0, 1, 2, 3]
    check_nearest(folder, [folder / "queries" / name for name in QUERIES], found, 3)
    assert found.ids[[0, 1, 3], 0].tolist() == [0, 9, 7]  # copies find what they are copies of, whatever their ids
    assert pq.read_table(searched / "queries.parquet").to_pydict() == {"query_id": ids, "path": QUERIES}
    metrics = json.loads((searched / "metrics.json").read_text())
    assert metrics["counts"] == {"queries": 4, "gallery": 23, "neighbors": 12, "second_searches": 0, "bad_images": 0}
    assert metrics["timings"].keys() == {"search/embed", "search/search", "search/pictures"}
    assert metrics["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_page_has_pictures_and_no_hostile_names(searched: Path) -> None:
    page = (searched / "report.html").read_text()
    assert page.count("<img ") == page.count("data:image/jpeg") == 4 * (1 + 3)
    assert "no picture" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;&#34;&#39;&amp;.png" in page
    assert "All 4 queries, in order, with their 3 neighbors" in page
    assert "id 9, label 2 (bird &lt;2&gt;)" in page
    assert "1 file(s) in" in page  # notes.txt; what is hidden does not count


def test_a_finished_run_is_left_alone(folder: Path, searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in searched.rglob("*")}
    assert search(folder, "searched", k=3, gallery_root=str(folder / "data")) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in searched.rglob("*")}


def test_an_unfinished_run_embeds_what_is_missing(folder: Path, searched: Path) -> None:
    shutil.copytree(searched, folder / "kept")
    parts = sorted((searched / "embeddings").glob("part-*.parquet"))
    kept = parts[0].stat().st_mtime_ns
    for path in (parts[1], searched / "metrics.json", searched / "neighbors.parquet"):
        path.unlink()
    assert search(folder, "searched", k=3, gallery_root=str(folder / "data")) == 0
    assert len(parts) == 2
    assert parts[0].stat().st_mtime_ns == kept
    for one, other in zip(read(searched), read(folder / "kept"), strict=True):
        assert str(one) == str(other) if isinstance(one, list) else (one.ids == other.ids).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("gallery", [{"backend": "faiss", "factory": "HNSW8"}, {"backend": "hnswlib"}])
def test_a_table_without_labels_in_an_index(
    gallery: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One query cannot be read, k is larger than the gallery, and nothing says where the gallery's images lie."""
    if gallery["backend"] == "hnswlib":
        pytest.importorskip("hnswlib")
    name = gallery["backend"]
    table = folder / f"{name}.csv"
    (folder / "queries" / ".git" / "broken").write_text("no image")
    table.write_text("path,caption\nb/c.png,a\n.git/broken,b\n0.png,c\n")
    data = {"root": str(folder / "queries"), "on_bad_image": "skip"}
    evaluation = {"gallery": gallery, "pictures": {"queries": 1}}
    assert search(folder, name, queries=str(table), data=data, evaluation=evaluation, k=99) == 0
    assert "The gallery has 23 items: each query has 23 neighbors at most, not k = 99." in capsys.readouterr().out
    ids, found = read(folder / name)
    assert ids == [0, 2]
    check_nearest(folder, [folder / "queries" / "b" / "c.png", folder / "queries" / "0.png"], found, 23)
    assert pq.read_table(folder / name / "queries.parquet").num_rows == 3
    page = (folder / name / "report.html").read_text()
    assert "The first 1 of 2 queries, in order, with the first 6 of their 23 neighbors" in page
    assert page.count("<img ") == 1
    assert "images/1_3.png" in page  # row 7
    assert "set gallery_root" in page
    assert "broken: not a readable image" in page


@pytest.mark.slow
def test_an_unreadable_query_is_one_message(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "damaged").mkdir()
    (folder / "damaged" / "x.jpg").write_text("no image")
    assert search(folder, "damaged_search", queries=str(folder / "damaged")) == 2
    error = capfd.readouterr().err
    assert "x.jpg: not a readable image" in error
    assert "data.on_bad_image: skip" in error
    assert error.count("\n") == 1
    assert search(folder, "damaged_skipped", queries=str(folder / "damaged"), data={"on_bad_image": "skip"}) == 2
    error = capfd.readouterr().err
    assert "None of the 1 images of" in error
    assert error.count("\n") == 1


def without_a_part(folder: Path) -> dict[str, Any]:
    shutil.copytree(folder / "gallery", folder / "cut")
    (folder / "cut" / "embeddings" / "part-000002.parquet").unlink()
    return {"gallery": str(folder / "cut" / "embeddings")}


def table_without_paths(folder: Path) -> dict[str, Any]:
    (folder / "no_paths.csv").write_text("label,image\n1,a.png\n")
    return {"queries": str(folder / "no_paths.csv")}


def empty_folder(folder: Path) -> dict[str, Any]:
    (folder / "empty" / "inside").mkdir(parents=True)
    (folder / "empty" / "inside" / "readme.md").touch()
    return {"queries": str(folder / "empty")}


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "empty folder": (empty_folder, "empty holds no images, and 1 other file(s): the names of images end in .avif"),
    "no such folder": (lambda folder: {"queries": str(folder / "nowhere")}, "queries: there is no "),
    "k": (lambda folder: {"k": 0}, "k: should be greater than 0, found 0"),
    "another model": (lambda folder: {"seed": 1}, "was made by something else than source: weights ("),
    "another size": (
        lambda folder: {"source": {**SOURCE, "size": 48}},
        "transform ({'name': 'resize', 'size': 32} there",
    ),
    "missing part": (without_a_part, "is not whole: 1 of 8 parts are missing (part-000002.parquet)"),
    "another background": (
        lambda folder: {"data": {"background": [0, 0, 0]}},
        "decoded by {'exif': 'apply', 'background': [255, 255, 255]}, the queries would be by {'exif': 'apply', "
        "'background': [0, 0, 0]}: set data.exif and data.background as the store has them",
    ),
    "a background of two numbers": (lambda folder: {"data": {"background": [0, 0]}}, "data.background: "),
    "an orientation that is no rule": (lambda folder: {"data": {"exif": "turn"}}, "data.exif: should be 'apply' or"),
    "no store": (
        lambda folder: {"gallery": str(folder / "queries")},
        "is no embeddings store: it has no manifest.json",
    ),
    "a store as source": (lambda folder: {"source": {"store": "x"}}, "needs one of the keys: checkpoint, extractor"),
    "the gallery's own run": (
        lambda folder: {"run": {"name": "gallery", "storage": str(folder), "resume": "never"}},
        "that would be written: change run.name",
    ),
    "no paths": (table_without_paths, "queries need the column path (found: label)"),
    "a root for a folder": (lambda folder: {"data": {"root": str(folder)}}, "a root is for the paths of a table"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, expected = CASES[name]
    assert search(folder, "bad", **change(folder)) == 2
    error = capfd.readouterr().err
    assert expected in error
    assert error.startswith("oml-ray: ")
    assert error.count("\n") == 1 + error.count("\n  "), "one message, whose further lines are indented"
    assert not (folder / "bad").exists(), "found before anything is written"
    assert (folder / "gallery" / "embeddings" / "manifest.json").exists()


def test_a_store_of_an_older_version_is_searched_with_a_note(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "gallery", folder / "older")
    manifest = folder / "older" / "embeddings" / "manifest.json"
    kept = json.loads(manifest.read_text())
    del kept["decoding"]
    manifest.write_text(json.dumps(kept))
    path = write(folder, "of_older", {"queries": str(folder / "queries"), "gallery": str(folder / "older")})
    _, _, searched, notes = find._prepare(load(SearchConfig, path))
    assert searched.manifest.decoding is None
    assert "made by a version that ignored EXIF orientation and transparency" in notes[-1]


def test_dry_run_prints_the_config_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, "dry", {"queries": str(folder / "queries"), "gallery": str(folder / "gallery")})
    assert main(["search", str(path), "--dry-run", "--set", "k=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["k"], printed["data"]["on_bad_image"]) == (7, "error")
    assert not (folder / "dry").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    config = load(SearchConfig, path)
    assert SearchConfig.model_validate(yaml.safe_load(dump(config))) == config


def test_there_are_shipped_configs_and_a_job() -> None:
    assert [path.name for path in sorted(CONFIGS.glob("*.yaml"))] == ["figures.yaml", "figures_smoke.yaml"]
    assert 'job("search")' in (CONFIGS.parents[1] / "jobs" / "search.py").read_text()
