"""`oml-ray export`: what other programs read gives what oml_ray gives; what cannot be exported leaves no trace."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import numpy as np
import onnxruntime
import pyarrow.fs
import pytest
import timm
import torch
from helpers import train_config
from PIL import Image

from oml_ray import build
from oml_ray.build.export import in_words_of_timm
from oml_ray.cli import main
from oml_ray.config import TrainConfig, nodes, validate
from oml_ray.data.transforms import Resize, ResizeCrop
from oml_ray.learning.extractors import Extractor
from oml_ray.retrieval.store import Manifest, Store, part_name
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.run_directory import RunDirectory

SIZE, ROWS, DIM = 32, 300, 16


def make_checkpoint(folder: Path, name: str, **changes: Any) -> str:
    """The best checkpoint of a run that has drawn its weights, and learned nothing."""
    config = validate(TrainConfig, train_config(folder / "df.csv", folder, run={"name": name}, **changes), "test")
    torch.manual_seed(1)
    assert config.extractor is not None
    state = build.extractor(config.extractor, config.transforms.eval.size).state_dict()
    moved = {key: value + 0.02 * torch.rand(value.shape).to(value.dtype) for key, value in state.items()}
    meta = {"config": config.model_dump(mode="json")}
    made = Checkpoint(moved, {"criterion": {}}, Position(0, 0, 1), None, meta)
    checkpoints.save(RunDirectory(str(folder), name), made, is_best=True, keep=1)
    return str(folder / name / "checkpoints" / "best")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("runs"), "vit")


@pytest.fixture(scope="module")
def gem_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("runs"), "gem", extractor={"pooling": "gem"})


@pytest.fixture(scope="module")
def run_with_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose store lacks the embedding of one row."""
    folder = tmp_path_factory.mktemp("runs") / "embedded"
    store = Store(pyarrow.fs.LocalFileSystem(), str(folder / "embeddings"))
    transform = {"name": "resize", "size": SIZE}
    manifest = Manifest(ROWS, 64, DIM, "of the weights", transform, "of the table", "validation", "float16")
    ids, made = np.arange(ROWS) * 3, embeddings()
    for part in store.begin(manifest):
        rows = np.array([row for row in range(part * 64, min(part * 64 + 64, ROWS)) if row != 5])
        store.write_part(part, {"id": ids[rows], "label": rows}, made[rows], {15: "truncated"} if part == 0 else {})
    return folder


def embeddings() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float16)


def trained(checkpoint: str) -> Extractor:
    return build.trained_extractor(checkpoint)[0].eval()


def picture(width: int, height: int) -> Image.Image:
    smooth = np.random.default_rng(width).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def embedded(extractor: Extractor, pixels: np.ndarray) -> torch.Tensor:
    found: torch.Tensor = extractor(torch.from_numpy(np.ascontiguousarray(pixels)))
    return found


def test_onnx(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "model.onnx"
    assert main(["export", "onnx", checkpoint, str(out)]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        rf"{re.escape(str(out))}: images \(n, 3, 32, 32\) -> embeddings \(n, 16\), "
        r"within \d.\de-\d\d of torch on random images\n",
        said,
    )
    session, extractor = onnxruntime.InferenceSession(out), trained(checkpoint)
    pixels = Resize(SIZE)(picture(50, 40), np.random.default_rng())[None]
    (found,) = session.run(["embeddings"], {"images": np.ascontiguousarray(pixels)})
    torch.testing.assert_close(torch.from_numpy(found), embedded(extractor, pixels), atol=1e-4, rtol=0)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["network"] == "test_vit"
    assert facts["weights"] == build.weights_of(extractor), "that which stores and their indexes name"
    assert json.loads(facts["transform"]) == {"name": "resize", "size": SIZE}
    cfg = extractor.backbone.pretrained_cfg
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == (list(cfg["mean"]), list(cfg["std"]))
    assert facts["output"] == "embeddings: float32 (n, 16) of unit norm"
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx"]


def test_torch(gem_checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert main(["export", "torch", gem_checkpoint, str(out)]) == 0
    kept = {"oml_ray.json": ""}
    loaded, extractor = torch.export.load(out, extra_files=kept).module(), trained(gem_checkpoint)
    assert json.loads(kept["oml_ray.json"])["weights"] == build.weights_of(extractor)
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    torch.testing.assert_close(loaded(images), extractor(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("transform", "ours"),
    [
        ({"name": "resize", "size": 48}, Resize(48)),
        (
            {"name": "resize_crop", "size": 48, "resize": 55, "interpolation": "bicubic"},
            ResizeCrop(48, resize=55, interpolation="bicubic"),
        ),
    ],
)
def test_timm_prepares_the_images_and_gives_the_embeddings(
    transform: dict[str, Any], ours: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """Of a picture file to an embedding, by nothing but timm."""
    transforms = {"train": {"name": "crop_flip", "size": 48}, "eval": transform}
    checkpoint = make_checkpoint(tmp_path, "run", transforms=transforms, extractor={"model": "test_resnet"})
    out = tmp_path / "model"
    assert main(["export", "timm", checkpoint, str(out)]) == 0
    network = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    facts = json.loads((out / "oml_ray.json").read_text())
    assert facts["after"] == "divide each embedding by its norm"
    extractor = trained(checkpoint)
    for size in ((90, 70), (48, 61), (333, 48)):
        with torch.no_grad():
            found = network(prepare(picture(*size))[None])
        expected = embedded(extractor, ours(picture(*size), np.random.default_rng())[None])
        torch.testing.assert_close(found / found.norm(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("resize", range(224, 300, 5))
def test_timm_resizes_to_the_very_pixel(resize: int) -> None:
    words = in_words_of_timm(nodes.ResizeCrop(name="resize_crop", size=224, resize=resize))
    made = timm.data.create_transform((3, 224, 224), is_training=False, **words)
    assert made.transforms[0].size == resize


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("library", [["--factory", "Flat"], ["--factory", "HNSW16"], ["--hnswlib"]])
@pytest.mark.parametrize("inside", ["", "embeddings"])
def test_index(
    inside: str,
    library: list[str],
    distance: str,
    run_with_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "gallery.index"
    arguments = [str(run_with_store / inside), str(out), *library, "--set", f"distance={distance}"]
    assert main(["export", "index", *arguments]) == 0
    assert capsys.readouterr().out == (
        f"{out}: 299 rows, ids of the table, 16 dimensions, {distance}; 100 of 100 rows tried are among the 10 nearest "
        "of their own embeddings\n"
    )
    queries = embeddings().astype(np.float32)[[7, 8, 299]]
    if distance == "cosine":
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    if library == ["--hnswlib"]:
        graph = hnswlib.Index(space="l2", dim=DIM)
        graph.load_index(str(out))
        ids, _ = graph.knn_query(queries, 1)
    else:
        _, ids = faiss.read_index(str(out)).search(queries, 1)
    assert ids[:, 0].tolist() == [21, 24, 897], "ids of the table, which are three times the row's place in the store"
    facts = json.loads((tmp_path / "gallery.index.json").read_text())["made_of"]
    assert (facts["weights"], facts["table"], facts["split"]) == ("of the weights", "of the table", "validation")
    assert facts["transform"] == {"name": "resize", "size": SIZE}
    assert (facts["rows"], facts["dimension"], facts["distance"]) == (299, DIM, distance)


def test_what_is_there_is_replaced_only_by_force(
    checkpoint: str, run_with_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm_args = ["export", "timm", checkpoint, str(tmp_path / "model")]
    index_args = ["export", "index", str(run_with_store), str(tmp_path / "index"), "--factory", "Flat"]
    for arguments, written in ((timm_args, tmp_path / "model" / "config.json"), (index_args, tmp_path / "index.json")):
        assert main(arguments) == 0
        content = written.read_bytes()
        written.write_bytes(b"old")
        assert main(arguments) == 2
        assert "is there already: --force replaces it." in capsys.readouterr().err
        assert written.read_bytes() == b"old"
        assert main([*arguments, "--force"]) == 0
        assert written.read_bytes() == content
    (tmp_path / "index").unlink()
    assert main(index_args) == 2, "its facts are there"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.json", "model"]


def test_force_takes_no_folder_away_that_was_not_exported(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    for form, out in (("timm", "home"), ("torch", "home"), ("timm", "home/thesis.tex")):
        assert main(["export", form, checkpoint, str(tmp_path / out), "--force"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(str(tmp_path))[2] for line in said] == [
        "/home holds other files than an exported model: choose another place.",
        "/home is a folder: choose another place.",
        "/home/thesis.tex is a file: choose another place.",
    ]
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert main(["export", "timm", checkpoint, str(tmp_path / "empty")]) == 0


CASES: dict[str, tuple[list[str], str]] = {
    "no checkpoint": (["onnx", "nowhere", "OUT"], "There is no checkpoint at"),
    "damaged checkpoint": (["timm", "DAMAGED", "OUT"], "is damaged: extractor.safetensors has checksum"),
    "no place for URIs": (["onnx", "CHECKPOINT", "s3://bucket/model.onnx"], "exports are written to local paths"),
    "a name that torch refuses": (["torch", "CHECKPOINT", "OUT.pt"], "wants a name that ends with .pt2"),
    "a place in a file": (["timm", "CHECKPOINT", "FILE/model"], "FILE/model cannot be written"),
    "an index in a file": (["index", "STORE", "FILE/gallery", "--hnswlib"], "FILE/gallery cannot be written"),
    "timm has no gem": (["timm", "GEM", "OUT"], "timm's networks have no pooling gem: export the form torch"),
    "no store": (["index", ".", "OUT", "--hnswlib"], "is no embeddings store: it has no manifest.json"),
    "a store that is not whole": (["index", "PARTIAL", "OUT", "--hnswlib"], "not whole: 1 of 5 parts are missing"),
    "no such index": (["index", "STORE", "OUT", "--factory", "FLAT"], "'FLAT' is not one for 16 dimensions"),
    "too few rows": (["index", "STORE", "OUT", "--factory", "IVF999,Flat"], "cannot be built of 299 rows"),
    "not of this index": (["index", "STORE", "OUT", "--factory", "Flat", "--set", "nprobe=2"], "'Flat' has no nprobe"),
    "unknown key": (["index", "STORE", "OUT", "--hnswlib", "--set", "m=9"], "unknown key 'm'"),
    "another library's key": (["index", "STORE", "OUT", "--hnswlib", "--set", "nprobe=2"], "unknown key 'nprobe'"),
    "another library": (["index", "STORE", "OUT", "--hnswlib", "--set", "backend=exact"], "backend: should be 'hnsw"),
    "shards": (["index", "STORE", "OUT", "--hnswlib", "--set", "shards=2"], "shards belongs to a gallery of a run"),
    "unknown distance": (["index", "STORE", "OUT", "--hnswlib", "--set", "distance=dot"], "distance: should be"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_exported_is_one_message(
    name: str,
    checkpoint: str,
    gem_checkpoint: str,
    run_with_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = CASES[name]
    Path("FILE").write_text("")
    if "DAMAGED" in arguments:
        shutil.copytree(Path(checkpoint).with_name("step_00000001"), "DAMAGED")
        with open("DAMAGED/extractor.safetensors", "r+b") as file:
            file.write(b"x")
    if "PARTIAL" in arguments:
        shutil.copytree(run_with_store, "PARTIAL")
        Path("PARTIAL", "embeddings", part_name(3)).unlink()
    given = {"CHECKPOINT": checkpoint, "GEM": gem_checkpoint, "STORE": str(run_with_store)}
    before = sorted(Path().rglob("*"))
    assert main(["export", *(given.get(argument, argument) for argument in arguments)]) == 2
    out, error = capfd.readouterr()
    assert expected in error
    assert error.startswith("oml-ray: ")
    assert (out, error.count("\n")) == ("", 1)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pickle", "a", "b"],
        ["onnx", "a"],
        ["index", "a", "b"],
        ["index", "a", "b", "--hnswlib", "--factory", "Flat"],
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_exporting_starts_no_ray(run_with_store: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from oml_ray.cli import main\n"
        f"assert main(['export', 'index', {str(run_with_store)!r}, 'index', '--factory', 'Flat']) == 0\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
